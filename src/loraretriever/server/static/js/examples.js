// Prompts to try: the samples of the pool's adapters.
import { call } from "./api.js";
import { html, useEffect, useState } from "./html.js";
import { change } from "./play.js";
import { loadAdapters, pool } from "./pool-state.js";
import { useStore } from "./store.js";

const drawn = new Map(); // adapter -> its samples in random order, and how many were shown

async function draw(name) {
  if (!drawn.has(name)) {
    const { samples } = await call(`v1/adapters/${encodeURIComponent(name)}/samples`);
    const order = samples.map(({ text }) => [Math.random(), text]).sort(([a], [b]) => a - b);
    drawn.set(name, { texts: order.map(([, text]) => text), next: 0 });
  }
  const known = drawn.get(name);
  return known.texts[known.next++ % known.texts.length];
}

export function AdapterSelect() {
  const adapters = useStore(pool, (state) => state.names);
  const [chosen, choose] = useState("");
  const [error, setError] = useState(null);
  useEffect(() => void loadAdapters(), []);
  const take = async (name) => {
    choose(name);
    try {
      const text = await draw(name || adapters[Math.floor(Math.random() * adapters.length)]);
      if (text !== undefined) change({ prompt: text }, 0);
      setError(text === undefined ? "It has no samples." : null);
    } catch (failure) {
      setError(failure.message);
    }
  };
  if (adapters.length === 0) return null;
  return html`
    <div class="row tight">
      ${error && html`<span class="bad" role="alert">${error}</span>`}
      <label class="hidden" for="example">Example of the adapter</label>
      <select id="example" class="small" value=${chosen} onChange=${(event) => take(event.currentTarget.value)}>
        <option value="">Example of any adapter</option>
        ${adapters.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
      </select>
      <button class="small" onClick=${() => take(chosen)}>Next example</button>
    </div>
  `;
}

// One adapter: what it is, where it comes from, its samples.
import { Dialog } from "./dialog.js";
import { bytes, date, shorten } from "./format.js";
import { html, useEffect, useState } from "./html.js";
import { Alert, Field } from "./parts.js";
import { change, forgetRoute } from "./play.js";
import { addSamples, getAdapter, getSamples, remove, update } from "./pool-state.js";
import { isOperator, mayChange, session } from "./session.js";
import { useStore } from "./store.js";

export function AdapterDialog({ name, onClose }) {
  const me = useStore(session, (state) => state.me);
  const [adapter, setAdapter] = useState(null);
  const [samples, setSamples] = useState(null);
  const [error, setError] = useState(null);
  const load = async () => {
    try {
      setAdapter(await getAdapter(name));
      setSamples(await getSamples(name));
      setError(null);
    } catch (failure) {
      setError(failure.message);
    }
  };
  useEffect(() => void load(), [name]);
  const act = async (work) => {
    try {
      await work();
      forgetRoute();
      return true;
    } catch (failure) {
      setError(failure.message);
      return false;
    }
  };
  const mayWrite = adapter !== null && mayChange(me, adapter);
  return html`
    <${Dialog} title=${name} onClose=${onClose}>
      <${Alert} text=${error} />
      ${adapter && html`<p>${adapter.description || html`<span class="muted">No description.</span>`}</p>`}
      ${adapter && html`<${Provenance} adapter=${adapter} me=${me} />`}
      ${
        mayWrite &&
        html`<${Edit}
        adapter=${adapter} onSave=${(changes) => act(() => update(name, changes)).then(load)}
        onRemove=${() => act(() => remove(name)).then((done) => done && onClose())}
      />`
      }
      ${
        samples &&
        html`<${Samples}
        samples=${samples} mayWrite=${mayWrite}
        onAdd=${(texts, counter) => act(() => addSamples(name, texts, counter)).then((done) => load().then(() => done))}
      />`
      }
    <//>
  `;
}

function Provenance({ adapter, me }) {
  const { enabled, source, created, revision, digest, base_model: base, ranks, targets, tags } = adapter;
  const facts = {
    State: enabled ? "enabled" : "disabled",
    Source: source || "unknown",
    Added: `${date(created)}, revision ${revision}`,
    "Base model": base,
    Rank: ranks.join(", "),
    Modules: targets.join(", "),
    Size: bytes(adapter.bytes),
    Tags: tags.join(", ") || "none",
    ...(isOperator(me) && { Tenant: adapter.tenant ?? "none: shared by all" }),
    "SHA-256": html`<code class="digest">${digest}</code>`,
  };
  return html`
    <dl class="facts-list">
      ${Object.entries(facts).map(([term, text]) => html`<dt key=${term}>${term}</dt><dd>${text}</dd>`)}
    </dl>
  `;
}

function Edit({ adapter, onSave, onRemove }) {
  const [sure, setSure] = useState(false);
  const submit = (event) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    onSave({ description: form.get("description").trim(), tags: words(form.get("tags")) });
  };
  return html`
    <details class="edit">
      <summary>Change or remove</summary>
      <form onSubmit=${submit}>
        <${Field} label="Description"><input name="description" defaultValue=${adapter.description} /><//>
        <${Field} label="Tags, with commas between"><input name="tags" defaultValue=${adapter.tags.join(", ")} /><//>
        <div class="row">
          <button>Save</button>
          <button type="button" onClick=${() => onSave({ enabled: !adapter.enabled })}>
            ${adapter.enabled ? "Disable" : "Enable"}
          </button>
          ${
            sure
              ? html`<button type="button" class="danger" onClick=${onRemove}>Remove ${adapter.name} for good</button>`
              : html`<button type="button" onClick=${() => setSure(true)}>Remove …</button>`
          }
        </div>
      </form>
    </details>
  `;
}

export const words = (text) =>
  text
    .split(",")
    .map((word) => word.trim())
    .filter(Boolean);

function Samples({ samples, mayWrite, onAdd }) {
  const { samples: given, counter_samples: against } = samples;
  return html`
    <h3>Samples <span class="muted number">${given.length}</span></h3>
    <${SampleList} samples=${given} empty="None: it is found by its description or name." />
    ${against.length > 0 && html`<h3>Counter samples <span class="muted number">${against.length}</span></h3>`}
    <${SampleList} samples=${against} />
    ${mayWrite && html`<${AddSamples} onAdd=${onAdd} />`}
  `;
}

function tryOut(prompt) {
  change({ prompt }, 0);
  location.hash = "#playground";
}

function SampleList({ samples, empty }) {
  if (samples.length === 0) return empty ? html`<p class="muted">${empty}</p>` : null;
  return html`
    <ul class="samples">
      ${samples.map(({ text, source }) => {
        return html`
          <li key=${text}>
            <span class="sample-text">${text}</span>
            <span class="row tight">
              ${source && source !== "given" && html`<span class="tag">${source}</span>`}
              <button class="small" onClick=${() => tryOut(text)}>
                Try<span class="hidden"> this sample: ${shorten(text)}</span>
              </button>
            </span>
          </li>
        `;
      })}
    </ul>
  `;
}

function AddSamples({ onAdd }) {
  const submit = async (event) => {
    event.preventDefault();
    const form = event.currentTarget;
    const data = new FormData(form);
    if (await onAdd([data.get("text").trim()], data.get("kind") === "counter")) form.reset();
  };
  return html`
    <form onSubmit=${submit}>
      <${Field} label="Another prompt"><textarea name="text" rows="3" required /><//>
      <div class="row">
        <label class="check"><input type="radio" name="kind" value="given" defaultChecked />that it is meant for</label>
        <label class="check"><input type="radio" name="kind" value="counter" />that it must not be chosen for</label>
        <button>Add the sample</button>
      </div>
    </form>
  `;
}

// The playground: a prompt, its settings, its answers; beside them why these adapters were chosen.
import { Answer } from "./answer.js";
import { AdapterSelect } from "./examples.js";
import { html, useEffect, useRef } from "./html.js";
import { Field, Lacks } from "./parts.js";
import { answers, change, generate, isRunning, play, route, stop, STRATEGIES } from "./play.js";
import { can, isOperator, session } from "./session.js";
import { useStore } from "./store.js";
import { Why } from "./why.js";

export function Playground() {
  const me = useStore(session, (state) => state.me);
  useEffect(() => void route(), []);
  return html`
    <div class="columns">
      <section class="column" aria-label="Prompt and answer">
        <h1 class="hidden">Playground</h1>
        ${!can(me, "generate") && html`<${Lacks} what="answer prompts" scope="generate" />`}
        <${Prompt} />
        <${Settings} />
        <${Answers} />
      </section>
      <${Why} />
    </div>
  `;
}

function Prompt() {
  const prompt = useStore(play, (state) => state.prompt);
  const me = useStore(session, (state) => state.me);
  const area = useRef();
  useEffect(() => {
    area.current.style.height = "auto";
    area.current.style.height = `${Math.min(Math.max(area.current.scrollHeight + 2, 112), 400)}px`;
  }, [prompt]);
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (can(me, "generate")) generate();
    }
    if (event.key === "Escape") stop();
  };
  return html`
    <div class="field">
      <div class="row spread">
        <label for="prompt">Prompt</label>
        ${can(me, "pool:read") && html`<${AdapterSelect} />`}
      </div>
      <textarea
        id="prompt" ref=${area} value=${prompt} rows="4" spellcheck=${false}
        placeholder="Type a prompt, or take an example of one of the pool's adapters."
        onInput=${(event) => change({ prompt: event.currentTarget.value })} onKeyDown=${onKeyDown}
      />
    </div>
  `;
}

function Settings() {
  const { k, strategy, weighting, maxTokens, temperature, live, tenant } = useStore(play);
  const me = useStore(session, (state) => state.me);
  const { defaults, strategies } = me;
  const atMost = k ?? defaults.k;
  return html`
    <div class="settings">
      <div class="setting">
        <span class="row spread"><label for="k">Adapters at most</label> <output for="k">${atMost}</output></span>
        <input
          id="k" type="range" min="1" max="8" step="1" value=${atMost} disabled=${weighting === "own"}
          onInput=${(event) => change({ k: Number(event.currentTarget.value) }, 80)}
        />
      </div>
      <${Field} label="Strategy">
        <select
          id="strategy" value=${strategy ?? ""}
          onChange=${(event) => change({ strategy: event.currentTarget.value || null }, 0)}
        >
          <option value="">default: ${defaults.strategy}</option>
          ${strategies.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
        </select>
      <//>
      <${Field} label="Weights">
        <select
          id="weighting" value=${weighting ?? ""}
          onChange=${(event) => change({ weighting: event.currentTarget.value || null, weights: null }, 0)}
        >
          <option value="">default: ${defaults.weighting === "score" ? "by score" : "equal"}</option>
          <option value="score">by score</option>
          <option value="uniform">equal</option>
          ${weighting === "own" && html`<option value="own">set by hand</option>`}
        </select>
      <//>
      ${STRATEGIES[strategy] && html`<p class="muted hint">${STRATEGIES[strategy]}</p>`}
      <details class="more">
        <summary>More settings</summary>
        <div class="settings">
          <${Field} label="Tokens at most">
            <input
              type="number" min="1" value=${maxTokens}
              onChange=${({ currentTarget: field }) =>
                field.checkValidity() && play.set({ maxTokens: field.valueAsNumber })}
            />
          <//>
          <div class="setting">
            <span class="row spread">
              <label for="temperature">Temperature</label> <output for="temperature">${temperature.toFixed(1)}</output>
            </span>
            <input
              id="temperature" type="range" min="0" max="1.5" step="0.1" value=${temperature}
              onInput=${(event) => play.set({ temperature: Number(event.currentTarget.value) })}
            />
          </div>
          ${isOperator(me) && html`<${AsTenant} tenant=${tenant} />`}
          <label class="check">
            <input
              type="checkbox" checked=${live} onChange=${(event) => change({ live: event.currentTarget.checked }, 0)}
            />
            Find adapters while I type
          </label>
        </div>
      </details>
    </div>
  `;
}

function AsTenant({ tenant }) {
  const onChange = (event) => change({ tenant: event.currentTarget.value.trim() || null }, 0);
  return html`<${Field} label="As tenant"><input value=${tenant ?? ""} onChange=${onChange} /><//>`;
}

function Answers() {
  const { adapted, base } = useStore(answers);
  const { compare, prompt } = useStore(play);
  const me = useStore(session, (state) => state.me);
  const running = isRunning(adapted) || isRunning(base);
  return html`
    <div class="row actions">
      <button
        class="primary" id="generate" disabled=${!prompt.trim() || !can(me, "generate")} onClick=${generate}
        aria-keyshortcuts="Control+Enter" title="Ctrl+Enter, or ⌘+Enter"
      >Answer</button>
      <button id="stop" disabled=${!running} onClick=${stop} aria-keyshortcuts="Escape">Stop</button>
      <label class="check">
        <input
          id="compare" type="checkbox" checked=${compare}
          onChange=${(event) => play.set({ compare: event.currentTarget.checked })}
        />
        Base model beside it
      </label>
      <span class="hidden" role="status">${status(adapted, base)}</span>
    </div>
    ${
      !adapted &&
      !base &&
      html`<p class="muted">
      The adapters that fit the prompt are looked up and joined, and the answer is written with them. Where none fits,
      the base model answers.
    </p>`
    }
    ${
      (adapted || base) &&
      html`<div class=${base ? "answers two" : "answers"}>
      <${Answer} id="adapted" title=${base ? "With adapters" : "Answer"} answer=${adapted} />
      ${base && html`<${Answer} id="base" title="Base model alone" answer=${base} />`}
    </div>`
    }
  `;
}

/** What a screen reader hears: when answers begin and end, not each token. */
function status(...all) {
  const known = all.filter(Boolean);
  if (known.length === 0) return "";
  if (known.some(isRunning)) return "Answering.";
  if (known.some((answer) => answer.state === "failed")) return "The answer failed.";
  return known.some((answer) => answer.state === "stopped") ? "Stopped." : "The answer is complete.";
}

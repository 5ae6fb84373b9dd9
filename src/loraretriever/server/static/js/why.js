// Why these adapters: the fit, scores and weights, nearest samples, terms.
import { duration, share, shorten, signed } from "./format.js";
import { html } from "./html.js";
import { PoolMap } from "./map.js";
import { addressOf, Alert, Bar, Lacks } from "./parts.js";
import { change, currentWeights, play, resetWeights, route as findRoute, setWeight } from "./play.js";
import { pool } from "./pool-state.js";
import { can, session } from "./session.js";
import { useStore } from "./store.js";

export function Why() {
  const state = useStore(play);
  const me = useStore(session, (known) => known.me);
  const map = useStore(pool, (known) => known.map);
  const { route, routeError, weighting, live } = state;
  const names = (route?.hits ?? []).map((hit) => hit.adapter);
  return html`
    <section class="column" aria-labelledby="why-title">
      <div class="row spread">
        <h2 id="why-title">Adapters for this prompt</h2>
        ${weighting === "own" && html`<button class="small" onClick=${resetWeights}>Back to the weights found</button>`}
        ${!live && html`<button class="small" onClick=${findRoute}>Find adapters</button>`}
      </div>
      ${!can(me, "route") && html`<${Lacks} what="see how prompts are routed" scope="route" />`}
      <${Alert} text=${routeError} />
      ${
        route
          ? html`<${Fit} route=${route} state=${state} />`
          : html`<p class="muted">${live && can(me, "route") && "They are found while you type."}</p>`
      }
      <ol class="hits">
        ${(route?.hits ?? []).map(
          (hit, index) => html`<${HitRow} key=${hit.adapter} hit=${hit} state=${state} open=${index === 0} />`,
        )}
      </ol>
      ${
        map &&
        html`<${PoolMap} map=${map} point=${route?.point} chosen=${names} height=${260} onChoose=${openAdapter} />`
      }
    </section>
  `;
}

const openAdapter = (name) => {
  location.hash = addressOf(name);
};

function Fit({ route, state }) {
  const { fit, threshold, fallback } = route;
  const isUsed = Object.values(currentWeights(state)).some((weight) => weight > 0);
  const [low, high] = [Math.min(0, fit, threshold), Math.max(1, fit, threshold)];
  const place = (value) => `${(100 * (value - low)) / (high - low)}%`;
  const verdict = state.weights
    ? isUsed
      ? "The answer uses the weights that you set."
      : "All weights are zero: the base model answers."
    : fallback
      ? "No adapter fits well enough: the base model answers."
      : null;
  return html`
    <div class="fit">
      <div class="row spread">
        <span>
          Fit <strong class="number">${share(fit)}</strong> <span class="muted">needs ${share(threshold)}</span>
        </span>
        <span class="muted number">${duration(route.milliseconds)}</span>
      </div>
      <div
        class="meter" role="meter" aria-label="Fit of the best adapter"
        aria-valuenow=${share(fit)} aria-valuemin=${low} aria-valuemax=${high}
        aria-valuetext=${`${share(fit)}, the threshold is ${share(threshold)}`}
      >
        <span class=${fallback ? "fill weak" : "fill"} style=${{ width: place(fit) }}></span>
        <span class="tick" style=${{ left: place(threshold) }}></span>
      </div>
      ${verdict && html`<p class="note" role="status">${verdict}</p>`}
      ${!verdict && route.adapters.length > 1 && html`<code class="composition">${route.composition}</code>`}
    </div>
  `;
}

function HitRow({ hit, state, open }) {
  const weight = currentWeights(state)[hit.adapter] ?? 0;
  const reason = state.route.why?.find((each) => each.adapter === hit.adapter);
  return html`
    <li class=${weight > 0 ? "hit" : "hit unused"}>
      <div class="hit-line">
        <a class="name" href=${addressOf(hit.adapter)}>${hit.adapter}</a>
        <${Bar} share=${hit.score} />
        <span class="number"><span class="hidden">score </span>${share(hit.score)}</span>
      </div>
      <div class="weight">
        <span class="muted" aria-hidden="true">weight</span>
        <input
          type="range" min="0" max="1" step="0.01" value=${weight} aria-label=${`Weight of ${hit.adapter}`}
          onInput=${(event) => setWeight(hit.adapter, Number(event.currentTarget.value))}
        />
        <span class="number" aria-hidden="true">${share(weight)}</span>
      </div>
      ${reason && html`<${Reason} reason=${reason} open=${open} />`}
    </li>
  `;
}

function Reason({ reason, open }) {
  const { dense, sparse, penalty, samples, terms } = reason;
  const largest = Math.max(...terms.map(({ part }) => Math.abs(part)), 0.01);
  return html`
    <details open=${open}>
      <summary>
        Meaning and form <span class="number">${signed(dense)}</span>, words${" "}
        <span class="number">${signed(sparse)}</span>
        ${penalty > 0.005 && html`, counter samples <span class="number">${signed(-penalty)}</span>`}
      </summary>
      ${samples.length > 0 && html`<h3>Nearest samples</h3>`}
      <ul class="near">
        ${samples.map(
          ({ text, cosine }) => html`
            <li key=${text}>
              <span class="number" title="cosine with the prompt">${share(cosine)}</span>
              <button class="link" title=${text} onClick=${() => change({ prompt: text }, 0)}>
                <span class="hidden">Take as prompt: </span>${shorten(text, 120)}
              </button>
            </li>
          `,
        )}
      </ul>
      <h3>${terms.length > 0 ? "Words that count" : "No words in common"}</h3>
      <ul class="terms">
        ${terms.map(
          ({ term, part }) => html`
            <li key=${term}>
              <code>${term}</code>
              <${Bar} share=${Math.abs(part) / largest} against=${part < 0} />
              <span class="number">${signed(part)}</span>
            </li>
          `,
        )}
      </ul>
    </details>
  `;
}

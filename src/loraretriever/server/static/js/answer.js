// One answer: its text as it comes, and what it took.
import { url } from "./api.js";
import { duration, plural } from "./format.js";
import { html, useState } from "./html.js";
import { Alert } from "./parts.js";
import { isRunning } from "./play.js";

export function Answer({ id, title, answer }) {
  if (!answer) return null;
  const { state, text, lora, error } = answer;
  return html`
    <article class="answer" aria-labelledby=${`${id}-title`}>
      <header class="row spread">
        <h2 id=${`${id}-title`}>${title}</h2>
        ${lora && html`<code class="composition" title="A request's model can be this">${lora.composition}</code>`}
      </header>
      <div id=${`${id}-text`} class="text" aria-busy=${isRunning(answer)}>
        ${text || (isRunning(answer) ? html`<span class="muted">…</span>` : null)}
        ${state === "streaming" && html`<span class="caret" aria-hidden="true"></span>`}
      </div>
      <${Alert} text=${error} />
      <p class="facts">${facts(answer).map((fact) => html`<span key=${fact}>${fact}</span>`)}</p>
      ${!isRunning(answer) && html`<${Curl} request=${answer.request} />`}
    </article>
  `;
}

function facts({ state, finish, lora, usage, seconds }) {
  const times = lora?.milliseconds ?? {};
  const found = [];
  if (usage) {
    found.push(`${plural(usage.prompt_tokens, "token")} in`, `${plural(usage.completion_tokens, "token")} out`);
    const writing = (times.total ?? seconds * 1000) - (times.first_token ?? 0);
    if (usage.completion_tokens > 1 && writing > 0) {
      found.push(`${Math.round(((usage.completion_tokens - 1) / writing) * 1000)} tokens/s`);
    }
  }
  if (times.retrieve > 0.1) found.push(`${duration(times.retrieve)} retrieval`);
  if (times.first_token != null) found.push(`${duration(times.first_token)} to the first token`);
  if (state !== "waiting" && state !== "streaming") found.push(`${duration(times.total ?? seconds * 1000)} in all`);
  if (finish === "length") found.push("cut at its length");
  if (state === "stopped") found.push("stopped");
  return found;
}

/** The same request for a terminal, quoted for a POSIX shell. */
export function curl(request) {
  const body = JSON.stringify(request, null, 1).replaceAll("'", "'\\''");
  const head = ["Content-Type: application/json", "Authorization: Bearer $KEY"].map((each) => `-H "${each}"`).join(" ");
  return `curl ${url("v1/chat/completions")} ${head} \\\n  -d '${body}'`;
}

function Curl({ request }) {
  const [copied, setCopied] = useState(false);
  const text = curl(request);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
  };
  return html`
    <details class="curl">
      <summary>This request with curl</summary>
      <pre tabindex="0" aria-label="Command">${text}</pre>
      ${navigator.clipboard && html`<button class="small" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`}
    </details>
  `;
}

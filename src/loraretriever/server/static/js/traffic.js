// Live charts of what the server does.
import { Chart } from "./chart.js";
import { count, duration, plural } from "./format.js";
import { html, useEffect, useMemo } from "./html.js";
import { addressOf, Alert, Bar, Lacks } from "./parts.js";
import { isOperator, session } from "./session.js";
import { total, traffic, watch } from "./stats.js";
import { useStore } from "./store.js";

const MOST_BARS = 25;

export function Traffic() {
  const me = useStore(session, (state) => state.me);
  const mayRead = isOperator(me);
  useEffect(() => (mayRead ? watch() : undefined), [mayRead]);
  useEffect(addStyle, []);
  const { now, readings, error } = useStore(traffic);
  if (!mayRead) {
    return html`
      <h1>Traffic</h1>
      <${Lacks} what="see the server's figures" scope="admin, or belongs to a tenant" />
    `;
  }
  return html`
    <h1>Traffic</h1>
    <${Alert} text=${error} />
    ${now && html`<${Totals} now=${now} />`}
    ${now && html`<${Charts} readings=${readings} />`}
    ${now && html`<${Adapters} now=${now} />`}
  `;
}

/** uPlot's own style, which no other part needs. */
function addStyle() {
  if (document.getElementById("uplot-style")) return;
  const link = document.createElement("link");
  Object.assign(link, { id: "uplot-style", rel: "stylesheet", href: new URL("../vendor/uplot.css", import.meta.url) });
  document.head.append(link);
}

const percent = (part, whole) =>
  whole > 0 ? `${((100 * part) / whole).toFixed(part > 0 && part < whole ? 1 : 0)} %` : "–";

function Totals({ now }) {
  const counter = (name) => total(now, "counters", name);
  const gauge = (name) => total(now, "gauges", name);
  const steps = now.histograms.engine_step_sequences?.[0];
  const facts = {
    "Running for": uptime(now.time - now.started),
    Answers: count(counter("request_success_total")),
    "No adapter fitted": percent(counter("fallbacks_total"), counter("routed_prompts_total")),
    "Turned away": count(counter("requests_rejected_total")),
    "Sequences per step": steps?.count > 0 ? (steps.sum / steps.count).toFixed(1) : "–",
    "Prompt tokens cached": percent(counter("prompt_tokens_cached_total"), counter("prompt_tokens_total")),
    "Key and value memory": percent(gauge("kv_cache_tokens_used"), gauge("kv_cache_tokens")),
  };
  return html`
    <dl class="totals">
      ${Object.entries(facts).map(
        ([term, text]) => html`<div key=${term}><dt>${term}</dt><dd class="number">${text}</dd></div>`,
      )}
    </dl>
  `;
}

function uptime(seconds) {
  if (seconds < 120) return plural(Math.round(seconds), "second");
  if (seconds < 7200) return plural(Math.round(seconds / 60), "minute");
  return seconds < 172800 ? plural(Math.round(seconds / 3600), "hour") : plural(Math.round(seconds / 86400), "day");
}

const CHARTS = [
  {
    title: "Prompts per second",
    format: count,
    lines: [
      ["routed", "routed", "prompt"],
      ["answered", "answered", "accent"],
    ],
  },
  {
    title: "Tokens per second",
    format: count,
    lines: [
      ["read", "read", "prompt"],
      ["generated", "generated", "accent"],
    ],
  },
  {
    title: "To the first token",
    format: duration,
    lines: [
      ["median", "first50", "accent"],
      ["95 %", "first95", "prompt", true],
    ],
  },
  {
    title: "To the last token",
    format: duration,
    lines: [
      ["median", "whole50", "accent"],
      ["95 %", "whole95", "prompt", true],
    ],
  },
  {
    title: "Retrieval",
    format: duration,
    lines: [
      ["median", "retrieval50", "accent"],
      ["95 %", "retrieval95", "prompt", true],
    ],
  },
  {
    title: "Slots and sequences",
    format: count,
    lines: [
      ["running", "running", "accent"],
      ["waiting", "waiting", "prompt"],
      ["slots used", "slotsUsed", "text", true],
      ["slots", "slots", "muted", true],
    ],
  },
];

function Charts({ readings }) {
  const times = useMemo(() => readings.map(({ time }) => time), [readings]);
  return html`
    <div class="charts">
      ${CHARTS.map(({ title, format, lines }) => {
        const series = lines.map(([label, field, color, dashed]) => ({
          label,
          color,
          dashed,
          values: readings.map((each) => each[field]),
        }));
        return html`<${Chart} key=${title} title=${title} times=${times} series=${series} format=${format} />`;
      })}
    </div>
  `;
}

function Adapters({ now }) {
  const used = (now.counters.adapter_used_total ?? [])
    .map(({ labels, value }) => ({ name: labels.adapter, tenant: labels.tenant, value }))
    .sort((a, b) => b.value - a.value);
  const most = Math.max(1, used[0]?.value ?? 0);
  return html`
    <section aria-labelledby="used-title">
      <h2 id="used-title">Prompts per adapter</h2>
      ${used.length === 0 && html`<p class="muted">No adapter was used since the server started.</p>`}
      <ol class="used">
        ${used.slice(0, MOST_BARS).map(
          ({ name, value }) => html`
            <li key=${name}>
              <a href=${addressOf(name)}>${name}</a>
              <${Bar} share=${value / most} />
              <span class="number">${count(value)}</span>
            </li>
          `,
        )}
      </ol>
      ${used.length > MOST_BARS && html`<p class="muted">and ${used.length - MOST_BARS} more, each with fewer</p>`}
    </section>
  `;
}

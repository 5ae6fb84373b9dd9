// The server's figures over time, read while the page of charts is shown.
import { call } from "./api.js";
import { createStore } from "./store.js";

const EVERY = 2000; // milliseconds
const KEPT = 300; // readings: ten minutes

// now: of /v1/stats; readings: {time, and the figures of `SERIES`}
export const traffic = createStore({ now: null, readings: [], error: null });

/** The sum of a counter or gauge over its labels. */
export function total(stats, kind, name) {
  return (stats[kind][name] ?? []).reduce((sum, { value }) => sum + value, 0);
}

/** A quantile of the last minute, in milliseconds; null: nothing was counted. */
function recent(stats, name, quantile) {
  const value = stats.histograms[name]?.[0]?.recent[quantile];
  return value == null ? null : value * 1000;
}

// name -> what is counted per second
const RATES = {
  routed: "routed_prompts_total",
  answered: "request_success_total",
  generated: "generation_tokens_total",
  read: "prompt_tokens_total",
};
const GAUGES = {
  running: "num_requests_running",
  waiting: "num_requests_waiting",
  slots: "adapter_slots",
  slotsUsed: "adapter_slots_used",
};
const QUANTILES = {
  first: "time_to_first_token_seconds",
  retrieval: "retrieval_seconds",
  whole: "e2e_request_latency_seconds",
};

function reading(stats, before) {
  const found = { time: stats.time };
  const seconds = before && stats.time - before.time;
  for (const [name, counter] of Object.entries(RATES)) {
    const more = before && total(stats, "counters", counter) - total(before, "counters", counter);
    found[name] = seconds > 0 && more >= 0 ? more / seconds : null; // below zero: the server was started again
  }
  for (const [name, gauge] of Object.entries(GAUGES)) found[name] = total(stats, "gauges", gauge);
  for (const [name, histogram] of Object.entries(QUANTILES)) {
    found[`${name}50`] = recent(stats, histogram, "p50");
    found[`${name}95`] = recent(stats, histogram, "p95");
  }
  return found;
}

async function read(signal) {
  try {
    const stats = await call("v1/stats", { signal });
    const { now, readings } = traffic.get();
    traffic.set({ now: stats, readings: [...readings, reading(stats, now)].slice(-KEPT), error: null });
  } catch (error) {
    if (error.name !== "AbortError")
      traffic.set({
        error: error.status === 404 ? "This server keeps no figures (its setting metrics is off)." : error.message,
      });
  }
}

/** Read now and then, except while the tab is hidden. Returns what ends it. */
export function watch() {
  const control = new AbortController();
  const timer = setInterval(() => document.hidden || read(control.signal), EVERY);
  read(control.signal);
  return () => {
    clearInterval(timer);
    control.abort();
  };
}

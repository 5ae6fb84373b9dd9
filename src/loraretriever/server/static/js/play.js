// The playground's state and what changes it: the prompt, its route, its answers.
import { post, stream } from "./api.js";
import { can, session } from "./session.js";
import { createStore } from "./store.js";

export const play = createStore({
  prompt: "",
  k: null, // null, here and below: as the server is set
  strategy: null,
  weighting: null, // "own": `weights` is what is used
  maxTokens: 200,
  temperature: 0,
  compare: false,
  live: true, // route while the prompt is typed
  route: null, // of `routed`
  routed: null, // the request that `route` answers, as JSON
  routeError: null,
  weights: null, // {adapter: weight}
  tenant: null, // whose adapters an operator wants to see
});

// Apart, because they change with every token. Each is null or {state, text, lora, usage, error, seconds, request};
// state: "waiting", "streaming", "done", "stopped" or "failed".
export const answers = createStore({ adapted: null, base: null });

/** What the strategies do that come with the server; it tells which there are. */
export const STRATEGIES = {
  selection: "The best adapter alone.",
  mixture: "The weighted sum of the adapters' outputs.",
  fusion: "The weighted average of the adapters' parameters.",
  ties: "One new adapter: small entries dropped, signs put to the vote.",
  dare_ties: "One new adapter: entries dropped at random, signs put to the vote.",
  dare_linear: "One new adapter: entries dropped at random, the rest summed.",
  svd: "One new adapter: the weighted sum, cut to the rank of the largest.",
  arrow: "Each token weighs the adapters by the main direction of each.",
  spectral: "Each token weighs the adapters by how strongly they act on it.",
  ramole: "Each token weighs the adapters by a trained router's attention.",
  moe: "Each token weighs the adapters by a trained linear router.",
};

let timer = null;
let routing = null;
let running = null;

/** The settings that are not left to the server. */
const retrieval = (settings) => Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== null));

function routeRequest({ prompt, k, strategy, weighting, tenant }) {
  return {
    input: prompt,
    ...retrieval({ k, strategy, weighting: weighting === "own" ? null : weighting, tenant }),
    explain: true,
    map: can(session.get().me, "pool:read"),
  };
}

/** Find the adapters for the prompt as it is, unless that has been done. */
export async function route() {
  clearTimeout(timer);
  const state = play.get();
  if (!state.prompt.trim() || !can(session.get().me, "route")) {
    routing?.abort();
    play.set({ route: null, routed: null, routeError: null });
    return;
  }
  const request = routeRequest(state);
  const routed = JSON.stringify(request);
  if (routed === state.routed && !state.routeError) return;
  routing?.abort();
  const control = new AbortController();
  routing = control;
  try {
    const { data, milliseconds } = await post("v1/route", request, control.signal);
    if (control === routing) play.set({ route: { ...data[0], milliseconds }, routed, routeError: null });
  } catch (error) {
    if (control === routing && error.name !== "AbortError")
      play.set({ route: null, routed, routeError: error.message });
  }
}

/** The next route is found anew: the pool has changed. */
export function forgetRoute() {
  play.set({ routed: null });
  route();
}

const FOUND = { weighting: null, weights: null };

/** Change settings; the route follows after `wait` milliseconds. Weights set by hand go with their prompt. */
export function change(changes, wait = 300) {
  if ("prompt" in changes) changes = { ...changes, ...(play.get().weighting === "own" ? FOUND : {}) };
  play.set(changes);
  clearTimeout(timer);
  if (play.get().live) timer = setTimeout(route, wait);
}

export const resetWeights = () => change(FOUND, 0);

/** The weights that an answer has now: those set by hand, or those found. */
export function currentWeights({ weights, route: known }) {
  return weights ?? Object.fromEntries((known?.adapters ?? []).map(({ name, weight }) => [name, weight]));
}

export function setWeight(adapter, weight) {
  const weights = { ...currentWeights(play.get()), [adapter]: weight };
  play.set({ weighting: "own", weights });
}

/** The request for an answer: by hand-set weights, by what is retrieved, or of the base model. */
function answerRequest(state, isBase) {
  const { prompt, k, strategy, weighting, weights, tenant, maxTokens, temperature } = state;
  const chosen = Object.entries(weights ?? {}).filter(([, weight]) => weight > 0);
  const request = {
    model: isBase || (weights && chosen.length === 0) ? "base" : "auto",
    messages: [{ role: "user", content: prompt }],
    max_tokens: maxTokens,
    temperature,
  };
  if (request.model === "auto") {
    const lora = weights
      ? { adapters: Object.fromEntries(chosen), ...retrieval({ strategy, tenant }) }
      : retrieval({ k, strategy, weighting, tenant });
    if (Object.keys(lora).length > 0) request.lora = lora;
  }
  return request;
}

async function answer(name, request, signal) {
  const start = performance.now();
  let current = { state: "waiting", text: "", lora: null, usage: null, error: null, seconds: 0, request };
  const show = (changes) => {
    current = { ...current, ...changes, seconds: (performance.now() - start) / 1000 };
    answers.set({ [name]: current });
  };
  show({});
  try {
    const body = { ...request, stream_options: { include_usage: true } };
    for await (const chunk of stream("v1/chat/completions", body, signal)) {
      const choice = chunk.choices[0];
      show({
        state: "streaming",
        text: current.text + (choice?.delta?.content ?? ""),
        finish: choice?.finish_reason ?? current.finish,
        lora: chunk.lora ? { ...current.lora, ...chunk.lora } : current.lora,
        usage: chunk.usage ?? current.usage,
      });
    }
    show({ state: "done" });
  } catch (error) {
    show(error.name === "AbortError" ? { state: "stopped" } : { state: "failed", error: error.message });
  }
}

/** Answer the prompt, and by the base model beside it if that is asked for. */
export async function generate() {
  const state = play.get();
  if (!state.prompt.trim()) return;
  stop();
  const control = new AbortController();
  running = control;
  answers.set({ adapted: null, base: null });
  const names = state.compare ? ["adapted", "base"] : ["adapted"];
  const work = names.map((name) => answer(name, answerRequest(state, name === "base"), control.signal));
  await Promise.all([route(), ...work]);
}

export function stop() {
  running?.abort();
}

export const isRunning = (answer) => answer?.state === "waiting" || answer?.state === "streaming";

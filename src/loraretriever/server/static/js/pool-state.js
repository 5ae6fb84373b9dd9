// The pool as far as it is known here, and what changes it.
import { call, post, upload } from "./api.js";
import { createStore } from "./store.js";

const PAGE = 200; // adapters in one request

export const pool = createStore({
  adapters: null, // what the table shows, or null before the first answer
  hasMore: false,
  query: "",
  error: null,
  names: [], // of the enabled adapters that were listed last without a query
  map: null,
  jobs: [], // begun on this page, as the API has them
});

let listing = 0;

async function list(query, after) {
  const parameters = new URLSearchParams({ limit: PAGE, ...(query && { query }), ...(after && { after }) });
  return call(`v1/adapters?${parameters}`);
}

/** List anew by the query that is set. */
export async function loadAdapters() {
  const turn = ++listing;
  const { query } = pool.get();
  try {
    const { data, has_more: hasMore } = await list(query);
    if (turn !== listing) return;
    pool.set({ adapters: data, hasMore, error: null });
    if (!query) pool.set({ names: data.filter((adapter) => adapter.enabled).map((adapter) => adapter.name) });
  } catch (error) {
    if (turn === listing) pool.set({ adapters: null, hasMore: false, error: error.message });
  }
}

export async function loadMore() {
  const turn = listing;
  const { query, adapters } = pool.get();
  const { data, has_more: hasMore } = await list(query, adapters.at(-1).name);
  if (turn === listing) pool.set({ adapters: [...adapters, ...data], hasMore });
}

export function search(query) {
  pool.set({ query });
  loadAdapters();
}

export async function loadMap() {
  try {
    pool.set({ map: await call("v1/map") });
  } catch {
    pool.set({ map: null }); // not allowed, or the models are still being loaded; the table says so
  }
}

const reload = () => Promise.all([loadAdapters(), loadMap()]);
const path = (name) => `v1/adapters/${encodeURIComponent(name)}`;

export const getAdapter = (name) => call(path(name));
export const getSamples = (name) => call(`${path(name)}/samples`);

export async function update(name, changes) {
  await call(path(name), { method: "PATCH", body: changes });
  await reload();
}

export async function remove(name) {
  await call(path(name), { method: "DELETE" });
  await reload();
}

export async function addSamples(name, samples, counter) {
  await post(`${path(name)}/samples`, { samples, counter });
  await reload();
}

/** Add an adapter, from files (a form) or from a place that the server knows (a body); follows the job to its end. */
export async function add({ form, body }, onProgress, signal) {
  const job = form ? await upload("v1/adapters", form, onProgress, signal) : await post("v1/adapters", body, signal);
  return follow(job);
}

async function follow(job) {
  for (;;) {
    note(job);
    if (job.state === "succeeded") break;
    if (job.state === "failed") throw new Error(job.error?.message ?? job.message ?? "the job failed.");
    await new Promise((resolve) => setTimeout(resolve, 400));
    job = await call(`v1/jobs/${job.id}`);
  }
  await reload();
  return job;
}

export const hideJob = (id) => pool.set({ jobs: pool.get().jobs.filter((job) => job.id !== id) });

const note = (job) => pool.set({ jobs: [job, ...pool.get().jobs.filter((other) => other.id !== job.id)].slice(0, 5) });

// Who we are to the server, and whether it is ready.
import { call, isReady, key, whenUnauthorized } from "./api.js";
import { createStore } from "./store.js";

// state: "starting", "wants-key", "failed" (with `error`) or "known" (with `me`)
export const session = createStore({ state: "starting", me: null, error: null, ready: false });

export function can(me, ...scopes) {
  return me !== null && scopes.some((scope) => me.scopes.includes(scope) || me.scopes.includes("admin"));
}

export const isOperator = (me) => me !== null && me.operator;

/** A tenant may change its own adapters; what is shared only who belongs to none. */
export const mayChange = (me, adapter) => can(me, "pool:write") && (me.tenant === null || !adapter.shared);

whenUnauthorized(() => session.set({ state: "wants-key", me: null }));

let wasKnown = false; // the page may hold what an earlier key was shown

export async function enter(secret) {
  if (secret !== undefined) key.set(secret);
  try {
    const me = await call("v1/keys/me");
    if (wasKnown) location.reload();
    wasKnown = true;
    session.set({ me, state: "known", error: null });
  } catch (error) {
    if (error.status === 401) {
      const refused = key.get() !== "";
      key.forget();
      session.set({ state: "wants-key", me: null, error: refused ? error.message : null });
    } else {
      session.set({ state: "failed", error: error.message });
    }
  }
}

export function leave() {
  key.forget();
  location.reload(); // nothing stays of what the key was shown
}

/** Ask until the models are loaded. */
export async function waitUntilReady() {
  while (!(await isReady())) await new Promise((resolve) => setTimeout(resolve, 1500));
  session.set({ ready: true });
  if (session.get().state === "failed") await enter();
}

// State that several parts of the page share.
import { useLayoutEffect, useReducer, useRef } from "./html.js";

export function createStore(state) {
  const listeners = new Set();
  return {
    get: () => state,
    set(changes) {
      state = { ...state, ...changes };
      for (const listener of [...listeners]) listener(state);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** What `pick` takes of a store's state; the component is drawn again when it changes. */
export function useStore(store, pick = (state) => state) {
  const [, redraw] = useReducer((count) => count + 1, 0);
  const last = useRef();
  last.current = pick(store.get());
  useLayoutEffect(
    () =>
      store.subscribe((state) => {
        if (pick(state) !== last.current) redraw();
      }),
    [store],
  );
  return last.current;
}

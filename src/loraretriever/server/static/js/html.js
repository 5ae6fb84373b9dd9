// Preact with htm: templates in plain JavaScript. Whatever stands in ${} becomes text or a property, never HTML.
import htm from "../vendor/htm.js";
import { h } from "../vendor/preact.js";

export { Fragment, render } from "../vendor/preact.js";
export { useEffect, useId, useLayoutEffect, useMemo, useReducer, useRef, useState } from "../vendor/preact-hooks.js";
export const html = htm.bind(h);

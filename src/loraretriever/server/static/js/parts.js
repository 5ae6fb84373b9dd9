// Small parts that recur.
import { html } from "./html.js";

/** A label above its control. */
export const Field = ({ label, children }) => html`<label class="setting"><span>${label}</span>${children}</label>`;

/** A share, from 0 to 1, as a length; the number stands beside it. */
export const Bar = ({ share, against = false }) => html`
  <span class="bar" aria-hidden="true">
    <span class=${against ? "fill against" : "fill"} style=${{ width: `${100 * Math.min(1, Math.max(0, share))}%` }} />
  </span>
`;

/** Says that the key does not allow something. */
export const Lacks = ({ what, scope }) =>
  html`<p class="note">This key may not ${what}: it lacks the scope ${scope}.</p>`;

export const Alert = ({ text }) => text && html`<p class="bad" role="alert">${text}</p>`;

/** The address of an adapter on this page. */
export const addressOf = (adapter) => `#pool/${encodeURIComponent(adapter)}`;

// Numbers, sizes and times for people.
const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const days = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const minutes = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export const share = (value) => value.toFixed(2);
export const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
export const count = (value) => (Math.abs(value) < 10000 ? plain.format(value) : compact.format(value));
export const day = (seconds) => days.format(new Date(seconds * 1000));
export const date = (seconds) => minutes.format(new Date(seconds * 1000));
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  for (; value >= 1024 && step < units.length - 1; step += 1) value /= 1024;
  return `${plain.format(value)} ${units[step]}`;
}

/** A time in milliseconds. */
export function duration(milliseconds) {
  if (milliseconds >= 1000) return `${plain.format(milliseconds / 1000)} s`;
  return `${milliseconds < 10 ? plain.format(milliseconds) : Math.round(milliseconds)} ms`;
}

/** Text on one line, cut with an ellipsis. */
export function shorten(text, length = 160) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length <= length ? line : `${line.slice(0, length - 1)}…`;
}

// The theme's colours for canvases, which cannot read custom properties by themselves.
const NAMES = ["text", "muted", "line", "panel", "accent", "prompt", "against"];
const KEY = "loraretriever.theme";
const listeners = new Set();
const dark = matchMedia("(prefers-color-scheme: dark)");

/** {name: rgb(...)}; base.css registers these properties as colours, so that they come resolved. */
export function colors() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

export function onThemeChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

const announce = () => listeners.forEach((listener) => listener());
dark.addEventListener("change", announce);

/** "system", "light" or "dark". */
export const theme = () => document.documentElement.dataset.theme ?? "system";

export function setTheme(name) {
  if (name === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(KEY);
  } else {
    document.documentElement.dataset.theme = name;
    localStorage.setItem(KEY, name);
  }
  announce();
}

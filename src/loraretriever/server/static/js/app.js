// The page: its head, its three parts, and the key if the server wants one.
import { setTheme, theme } from "./colors.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import { Alert, Field } from "./parts.js";
import { Playground } from "./playground.js";
import { forgetRoute } from "./play.js";
import { loadAdapters, loadMap } from "./pool-state.js";
import { can, enter, leave, session, waitUntilReady } from "./session.js";
import { useStore } from "./store.js";

const PARTS = { playground: "Playground", pool: "Pool", traffic: "Traffic" };

/** The part and the adapter that the address names, such as #pool/sql. */
function place() {
  const [part, ...rest] = location.hash.slice(1).split("/");
  return {
    part: part in PARTS ? part : "playground",
    name: rest.length > 0 ? decodeURIComponent(rest.join("/")) : null,
  };
}

function App() {
  const { state, ready } = useStore(session);
  const [{ part, name }, setPlace] = useState(place);
  const main = useRef();
  useEffect(() => {
    const onHashChange = () => setPlace(place());
    addEventListener("hashchange", onHashChange);
    return () => removeEventListener("hashchange", onHashChange);
  }, []);
  useEffect(() => {
    document.title = `${PARTS[part]} – LoraRetriever`;
  }, [part]);
  useEffect(() => {
    if (!ready || state !== "known") return;
    if (can(session.get().me, "pool:read")) Promise.all([loadMap(), loadAdapters()]);
    forgetRoute();
  }, [ready, state]);
  const skip = (event) => {
    event.preventDefault();
    main.current.focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header class="head">
      <span class="brand">LoraRetriever</span>
      <nav aria-label="Parts">
        ${Object.entries(PARTS).map(
          ([id, title]) =>
            html`<a key=${id} href=${`#${id}`} aria-current=${id === part ? "page" : undefined}>${title}</a>`,
        )}
      </nav>
      <${Who} />
      <${Theme} />
    </header>
    <main id="main" ref=${main} tabindex="-1">
      ${!ready && state !== "failed" && html`<p class="note" role="status">The models are being loaded.</p>`}
      <${Content} part=${part} name=${name} />
    </main>
  `;
}

function Content({ part, name }) {
  const { state, error } = useStore(session);
  if (state === "wants-key") return html`<${KeyForm} />`;
  if (state === "failed") return html`<${Alert} text=${error} /><button onClick=${() => enter()}>Try again</button>`;
  if (state === "starting") return null;
  if (part === "pool") return html`<${Lazy} key="pool" load=${() => import("./pool.js")} name="Pool" chosen=${name} />`;
  if (part === "traffic") return html`<${Lazy} key="traffic" load=${() => import("./traffic.js")} name="Traffic" />`;
  return html`<${Playground} />`;
}

/** A part whose code is fetched when it is first shown. */
function Lazy({ load, name, ...rest }) {
  const [loaded, setLoaded] = useState(null);
  useEffect(() => void load().then((module) => setLoaded({ part: module[name] })), []);
  return loaded && html`<${loaded.part} ...${rest} />`;
}

function KeyForm() {
  const { error } = useStore(session);
  const submit = (event) => {
    event.preventDefault();
    enter(new FormData(event.currentTarget).get("key").trim());
  };
  return html`
    <form class="key" onSubmit=${submit}>
      <h1>This server needs an API key</h1>
      <${Field} label="Key"><input name="key" type="password" required autocomplete="off" spellcheck=${false} /><//>
      <${Alert} text=${error} />
      <p class="muted">It stays in this tab, and is forgotten when the tab is closed.</p>
      <button class="primary">Enter</button>
    </form>
  `;
}

function Who() {
  const { me } = useStore(session);
  if (me === null) return html`<span class="who"></span>`;
  if (me.open)
    return html`<span class="who muted" title="Only programs on the server's machine may ask">no keys</span>`;
  return html`
    <span class="who">
      <span class="muted" title=${`Scopes: ${me.scopes.join(", ")}`}>
        ${me.label}${me.tenant ? ` (${me.tenant})` : ""}
      </span>
      <button class="small" onClick=${leave}>Forget the key</button>
    </span>
  `;
}

function Theme() {
  const [name, setName] = useState(theme);
  const choose = (chosen) => {
    setTheme(chosen);
    setName(chosen);
  };
  return html`
    <select class="small" aria-label="Theme" value=${name} onChange=${(event) => choose(event.currentTarget.value)}>
      <option value="system">System</option>
      <option value="light">Light</option>
      <option value="dark">Dark</option>
    </select>
  `;
}

render(html`<${App} />`, document.getElementById("app"));
enter();
waitUntilReady();

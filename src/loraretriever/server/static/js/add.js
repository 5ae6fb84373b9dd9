// Adding an adapter: from files of this computer, from a folder of the server, or from the hub.
import { words } from "./adapter.js";
import { Dialog } from "./dialog.js";
import { html, useRef, useState } from "./html.js";
import { Alert, Field } from "./parts.js";
import { forgetRoute } from "./play.js";
import { add } from "./pool-state.js";
import { isOperator, session } from "./session.js";
import { useStore } from "./store.js";

// The API's field for each file of a PEFT folder.
const FIELDS = {
  "adapter_config.json": "config",
  "adapter_model.safetensors": "weights",
  "samples.jsonl": "samples",
  "README.md": "card",
};

const FROM = { files: "My files", place: "A folder of the server, or the hub" };
const NAME = "[A-Za-z0-9][A-Za-z0-9._\\-]*"; // as the pool's names

export function AddDialog({ onClose }) {
  const me = useStore(session, (state) => state.me);
  const [from, setFrom] = useState("files");
  const [files, setFiles] = useState([]);
  const [sent, setSent] = useState(null); // the share of the files that is sent, null: nothing is under way
  const [error, setError] = useState(null);
  const control = useRef(null);
  const close = () => {
    control.current?.abort();
    onClose();
  };
  const submit = async (event) => {
    event.preventDefault();
    const data = new FormData(event.currentTarget);
    setError(null);
    try {
      const what = from === "files" ? { form: toForm(files, data) } : { body: toBody(data) };
      control.current = new AbortController();
      setSent(0);
      await add(what, setSent, control.current.signal);
      forgetRoute();
      if (!control.current.signal.aborted) onClose(); // else it is closed, and may be open again for another one
    } catch (failure) {
      setSent(null);
      if (failure.name !== "AbortError") setError(failure.message);
    }
  };
  return html`
    <${Dialog} title="Add an adapter" onClose=${close}>
      <form onSubmit=${submit} class="stack">
        <fieldset class="row">
          <legend class="hidden">Where it is</legend>
          ${Object.entries(FROM).map(
            ([each, text]) => html`
              <label key=${each} class="check">
                <input type="radio" name="from" checked=${from === each} onChange=${() => setFrom(each)} />${text}
              </label>
            `,
          )}
        </fieldset>
        ${from === "files" ? html`<${Files} files=${files} setFiles=${setFiles} />` : html`<${Place} />`}
        <${Field} label="Name">
          <input
            name="name" required maxlength="64" pattern=${NAME} title="Letters, digits, . _ -" autocomplete="off"
          />
        <//>
        <${Field} label="Description"><input name="description" /><//>
        <${Field} label="Tags, with commas between"><input name="tags" /><//>
        ${isOperator(me) && html`<${Field} label="Tenant, if it is not for all"><input name="tenant" /><//>`}
        <${Field} label="Prompts that it is meant for, with an empty line between; about 20">
          <textarea name="samples" rows="6" />
        <//>
        <label class="check">
          <input type="checkbox" name="mismatch" />Take it even if it names another base model
        </label>
        <${Alert} text=${error} />
        <div class="row">
          <button class="primary" disabled=${sent !== null}>Add</button>
          ${sent !== null && html`<progress max="1" value=${sent} aria-label="Sent" />`}
          <span role="status">
            ${sent !== null && (sent < 1 && from === "files" ? "Sending" : "The server reads it")}
          </span>
        </div>
      </form>
    <//>
  `;
}

function Files({ files, setFiles }) {
  const known = files.filter((file) => file.name in FIELDS);
  return html`
    <${Field} label="Files of a PEFT adapter">
      <input
        type="file" multiple aria-describedby="files-help" accept=".json,.jsonl,.safetensors,.md"
        onChange=${(event) => setFiles([...event.currentTarget.files])}
      />
    <//>
    <p id="files-help" class="muted">
      ${
        known.length > 0
          ? `Taken: ${known.map((file) => file.name).join(", ")}`
          : "adapter_config.json and adapter_model.safetensors; samples.jsonl and README.md if there are any"
      }
    </p>
  `;
}

function Place() {
  return html`
    <${Field} label="Folder below the server's folder of adapters, or owner/name on the hub">
      <input name="source" required autocomplete="off" />
    <//>
  `;
}

const paragraphs = (text) =>
  text
    .split(/\n\s*\n/)
    .map((part) => part.trim())
    .filter(Boolean);

function toForm(files, data) {
  const form = new FormData();
  for (const file of files) if (file.name in FIELDS) form.append(FIELDS[file.name], file, file.name);
  for (const name of ["adapter_config.json", "adapter_model.safetensors"]) {
    if (!form.has(FIELDS[name])) throw new Error(`${name} is missing; choose it with the other files.`);
  }
  const samples = paragraphs(data.get("samples"));
  if (samples.length > 0) {
    const lines = samples.map((inputs) => JSON.stringify({ inputs })).join("\n");
    form.set("samples", new File([lines], "samples.jsonl"));
  }
  for (const field of ["name", "description", "tenant"]) {
    const text = data.get(field)?.trim();
    if (text) form.append(field, text);
  }
  if (data.has("mismatch")) form.append("allow_base_mismatch", "true");
  for (const tag of words(data.get("tags"))) form.append("tags", tag);
  return form;
}

function toBody(data) {
  const samples = paragraphs(data.get("samples"));
  const tags = words(data.get("tags"));
  const description = data.get("description").trim();
  const tenant = data.get("tenant")?.trim();
  return {
    source: data.get("source").trim(),
    name: data.get("name").trim(),
    ...(samples.length > 0 && { samples }),
    ...(description && { description }),
    ...(tags.length > 0 && { tags }),
    ...(tenant && { tenant }),
    ...(data.has("mismatch") && { allow_base_mismatch: true }),
  };
}

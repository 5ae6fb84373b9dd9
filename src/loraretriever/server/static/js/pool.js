// The pool: its map, and its adapters as a table.
import { AddDialog } from "./add.js";
import { AdapterDialog } from "./adapter.js";
import { bytes, count, date, day } from "./format.js";
import { html, useEffect, useMemo, useState } from "./html.js";
import { PoolMap } from "./map.js";
import { addressOf, Alert, Lacks } from "./parts.js";
import { forgetRoute, play } from "./play.js";
import { hideJob, loadAdapters, loadMap, loadMore, pool, search, update } from "./pool-state.js";
import { can, isOperator, mayChange, session } from "./session.js";
import { useStore } from "./store.js";

const open = (name) => {
  location.hash = addressOf(name);
};

export function Pool({ chosen }) {
  const me = useStore(session, (state) => state.me);
  const { map, error, jobs } = useStore(pool);
  const route = useStore(play, (state) => state.route);
  const [adding, setAdding] = useState(false);
  const mayRead = can(me, "pool:read");
  useEffect(() => {
    if (mayRead) Promise.all([loadAdapters(), loadMap()]);
  }, [mayRead]);
  if (!mayRead) return html`<${Lacks} what="look at the pool" scope="pool:read" />`;
  const names = chosen ? [chosen] : (route?.hits ?? []).map((hit) => hit.adapter);
  return html`
    <div class="stack">
      <div class="row spread">
        <h1>Pool</h1>
        <button class="primary" id="add" disabled=${!can(me, "pool:write")} onClick=${() => setAdding(true)}>
          Add an adapter
        </button>
      </div>
      ${!can(me, "pool:write") && html`<${Lacks} what="change the pool" scope="pool:write" />`}
      ${jobs.map((job) => html`<${Job} key=${job.id} job=${job} />`)}
      <${Alert} text=${error} />
      <div class="pool-columns">
        <section aria-labelledby="map-title">
          <h2 id="map-title">Map</h2>
          <p class="muted">
            Near means alike to the retriever. ${route?.point && "The diamond is the prompt in the playground."}
          </p>
          ${
            map
              ? html`<${PoolMap} map=${map} point=${route?.point} chosen=${names} height=${420} onChoose=${open} />`
              : html`<p class="muted">It is not there yet.</p>`
          }
        </section>
        <${Table} me=${me} />
      </div>
      ${adding && html`<${AddDialog} onClose=${() => setAdding(false)} />`}
      ${chosen && html`<${AdapterDialog} key=${chosen} name=${chosen} onClose=${() => (location.hash = "#pool")} />`}
    </div>
  `;
}

function Job({ job }) {
  const [done, failed] = [job.state === "succeeded", job.state === "failed"];
  const text = failed ? (job.error?.message ?? job.message) : done ? "is in the pool" : job.message || job.state;
  return html`
    <p class=${failed ? "bad job" : "note job"} role="status">
      <strong>${job.adapter}</strong> ${text}
      ${
        done || failed
          ? html`<button class="small" onClick=${() => hideJob(job.id)}>Hide</button>`
          : html`<progress max="1" value=${job.progress} aria-label=${`Adding ${job.adapter}`} />`
      }
    </p>
  `;
}

const COLUMNS = [
  { title: "Adapter", of: (adapter) => adapter.name },
  { title: "Samples", of: (adapter) => adapter.samples, number: true },
  { title: "Rank", of: (adapter) => Math.max(0, ...adapter.ranks), number: true },
  { title: "Size", of: (adapter) => adapter.bytes, number: true },
  { title: "Added", of: (adapter) => adapter.created },
];

function Table({ me }) {
  const { adapters, hasMore, query } = useStore(pool);
  const [sorting, sort] = useState({ column: 0, down: false });
  const rows = useMemo(() => sorted(adapters ?? [], sorting), [adapters, sorting]);
  return html`
    <section aria-labelledby="table-title">
      <div class="row spread">
        <h2 id="table-title">
          Adapters <span class="muted number">${adapters && count(adapters.length)}${hasMore && "+"}</span>
        </h2>
        <input
          id="search" type="search" class="search" value=${query} placeholder="Search" aria-label="Search adapters"
          onInput=${(event) => search(event.currentTarget.value)}
        />
      </div>
      <table class="adapters">
        <thead>
          <tr>
            ${COLUMNS.map(
              ({ title, number }, column) => html`
                <th key=${title} scope="col" class=${number ? "number" : ""} aria-sort=${ariaSort(sorting, column)}>
                  <button
                    class="plain" onClick=${() => sort({ column, down: sorting.column === column && !sorting.down })}
                  >
                    ${title}<span aria-hidden="true">${arrow(sorting, column)}</span>
                  </button>
                </th>
              `,
            )}
            <th scope="col">Enabled</th>
          </tr>
        </thead>
        <tbody>${rows.map((adapter) => html`<${Row} key=${adapter.name} adapter=${adapter} me=${me} />`)}</tbody>
      </table>
      ${adapters?.length === 0 && html`<p class="muted">${query ? "No adapter matches." : "The pool is empty."}</p>`}
      ${hasMore && html`<button onClick=${loadMore}>More</button>`}
    </section>
  `;
}

const arrow = (sorting, column) => (sorting.column !== column ? "" : sorting.down ? " ↓" : " ↑");
const ariaSort = (sorting, column) =>
  sorting.column !== column ? undefined : sorting.down ? "descending" : "ascending";

function sorted(adapters, { column, down }) {
  const { of } = COLUMNS[column];
  const compare = (a, b) => (of(a) < of(b) ? -1 : of(a) > of(b) ? 1 : 0);
  return [...adapters].sort((a, b) => (down ? compare(b, a) : compare(a, b)));
}

function Row({ adapter, me }) {
  const { name, description, tags, samples, ranks, enabled, created, revision } = adapter;
  const owner = isOperator(me) ? adapter.tenant : adapter.shared && me.tenant ? "shared" : null;
  const [error, setError] = useState(null);
  const [wanted, want] = useState(null); // shown until the server has done it: the list may still come as it was
  const toggle = async () => {
    want(!enabled);
    try {
      await update(name, { enabled: !enabled });
      setError(null);
    } catch (failure) {
      setError(failure.message);
    }
    want(null);
    forgetRoute();
  };
  const mayWrite = mayChange(me, adapter);
  return html`
    <tr class=${enabled ? "" : "disabled"}>
      <th scope="row">
        <a href=${addressOf(name)}>${name}</a>
        ${tags.map((tag) => html`<span key=${tag} class="tag">${tag}</span>`)}
        ${owner && html`<span class="tag owner">${owner}</span>`}
        ${description && html`<span class="about">${description}</span>`}
        ${error && html`<span class="bad" role="alert">${error}</span>`}
      </th>
      <td class="number" data-title="samples">${samples}</td>
      <td class="number" data-title="rank">${ranks.join(", ")}</td>
      <td class="number" data-title="">${bytes(adapter.bytes)}</td>
      <td data-title="" title=${`${date(created)}, revision ${revision}`}>${day(created)}</td>
      <td>
        <input
          type="checkbox" role="switch" class="switch" aria-label=${`${name} enabled`}
          checked=${wanted ?? enabled} disabled=${!mayWrite} onChange=${toggle}
        />
      </td>
    </tr>
  `;
}

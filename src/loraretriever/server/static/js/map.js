// The pool in two dimensions: adapters, their samples, the prompt. Drawn on a canvas, because pools may be large; the
// table of the pool says the same in words.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./html.js";
import { colors, onThemeChange } from "./colors.js";
import { bounds, drawMap, nearest } from "./map-drawing.js";

const PADDING = 28;
const WHOLE = { scale: 1, x: 0, y: 0 }; // shifts in pixels

/** map: of /v1/map; point: [x, y] of the prompt; chosen: names to bring out; onChoose: is given an adapter's name. */
export function PoolMap({ map, point, chosen = [], height, onChoose }) {
  const canvas = useRef();
  const [width, setWidth] = useState(0);
  const [hovered, hover] = useState(null);
  const [zoom, setZoom] = useState(WHOLE);
  const [theme, setTheme] = useState(0);
  const box = useMemo(() => bounds(map, point), [map, point]);
  const project = useMemo(() => projection(box, width, height, zoom), [box, width, height, zoom]);

  useLayoutEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(canvas.current.parentElement);
    return () => observer.disconnect();
  }, []);
  useEffect(() => onThemeChange(() => setTheme((count) => count + 1)), []);
  useLayoutEffect(() => {
    if (width > 0) drawMap(canvas.current, { map, point, chosen, hovered, project, width, height, colors: colors() });
  }, [map, point, chosen.join("\n"), hovered, project, theme]);

  const zoomBy = (factor, at = [width / 2, height / 2]) =>
    setZoom((old) => {
      const scale = Math.min(40, Math.max(1, old.scale * factor));
      const real = scale / old.scale;
      const move = (shift, centre, size) => (scale === 1 ? 0 : (shift + size / 2 - centre) * real + centre - size / 2);
      return { scale, x: move(old.x, at[0], width), y: move(old.y, at[1], height) };
    });
  const drag = useDrag(setZoom);
  const here = (event) => nearest(map, project, [event.offsetX, event.offsetY]);

  // A listener of its own: one that prevents scrolling must not be passive. Plain scrolling stays the page's.
  useEffect(() => {
    const onWheel = (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, [event.offsetX, event.offsetY]);
    };
    canvas.current.addEventListener("wheel", onWheel, { passive: false });
    return () => canvas.current?.removeEventListener("wheel", onWheel);
  }, [width, height]);

  const drawn = `${map.adapters.length} adapters and ${map.samples.length} samples`;
  const isWhole = zoom.scale === 1;
  return html`
    <figure class="map">
      <div class="map-frame">
        <canvas
          ref=${canvas} role="img" aria-label=${`Map of ${drawn}${point ? ", with the prompt" : ""}`}
          class=${isWhole ? (hovered ? "over" : "") : "movable"}
          onPointerDown=${drag.start} onPointerUp=${drag.end} onPointerLeave=${() => hover(null)}
          onPointerMove=${(event) => drag.move(event) || hover(here(event))}
          onClick=${(event) => {
            const name = here(event);
            if (name && !drag.moved()) onChoose?.(name);
          }}
        />
      </div>
      <figcaption class="row spread">
        <span class="legend">
          <span><i class="dot adapter"></i>adapter</span><span><i class="dot sample"></i>sample</span>
          ${point && html`<span><i class="dot prompt"></i>this prompt</span>`}
        </span>
        <span class="row tight">
          <button class="small" aria-label="Zoom in" onClick=${() => zoomBy(1.5)}>+</button>
          <button class="small" aria-label="Zoom out" disabled=${isWhole} onClick=${() => zoomBy(1 / 1.5)}>−</button>
          <button class="small" disabled=${isWhole} onClick=${() => setZoom(WHOLE)}>Whole map</button>
        </span>
      </figcaption>
    </figure>
  `;
}

/** Map coordinates to pixels; both axes have the same scale, so that distances look as they are. */
function projection({ left, right, bottom, top }, width, height, zoom) {
  const scale = Math.min((width - 2 * PADDING) / (right - left), (height - 2 * PADDING) / (top - bottom)) * zoom.scale;
  return ([x, y]) => [
    width / 2 + (x - (left + right) / 2) * scale + zoom.x,
    height / 2 - (y - (bottom + top) / 2) * scale + zoom.y,
  ];
}

function useDrag(setZoom) {
  const state = useRef({ from: null, moved: false }).current;
  return {
    start: (event) => Object.assign(state, { from: [event.clientX, event.clientY], moved: false }),
    end: () => Object.assign(state, { from: null }),
    moved: () => state.moved,
    move(event) {
      if (state.from === null || event.buttons === 0) return false;
      const [x, y] = [event.clientX - state.from[0], event.clientY - state.from[1]];
      if (!state.moved && Math.hypot(x, y) < 4) return false;
      Object.assign(state, { from: [event.clientX, event.clientY], moved: true });
      setZoom((old) => (old.scale === 1 ? old : { ...old, x: old.x + x, y: old.y + y }));
      return true;
    },
  };
}

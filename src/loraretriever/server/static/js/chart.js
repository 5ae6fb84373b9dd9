// A chart over time. Its legend has the figures as text, the latest or those under the pointer.
import uPlot from "../vendor/uplot.js";
import { colors, onThemeChange } from "./colors.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./html.js";

const HEIGHT = 150;
const WINDOW = 120; // seconds that are shown at least
const clock = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});

/** times: seconds since 1970; series: {label, color (a name), values, dashed}; format: a value as text. */
export function Chart({ title, times, series, format }) {
  const place = useRef();
  const chart = useRef(null);
  const [pointed, point] = useState(null); // index under the pointer
  const [theme, setTheme] = useState(0);
  const palette = colors();

  useEffect(() => onThemeChange(() => setTheme((count) => count + 1)), []);
  useLayoutEffect(() => {
    chart.current = new uPlot(
      options(series, format, palette, point),
      [times, ...series.map(({ values }) => values)],
      place.current,
    );
    const observer = new ResizeObserver(([{ contentRect }]) =>
      chart.current.setSize({ width: contentRect.width, height: HEIGHT }),
    );
    observer.observe(place.current);
    return () => {
      observer.disconnect();
      chart.current.destroy();
    };
  }, [theme]);
  useLayoutEffect(() => chart.current.setData([times, ...series.map(({ values }) => values)]), [times]);

  const shown = pointed ?? times.length - 1;
  return html`
    <figure class="chart">
      <figcaption>
        <h2>${title}</h2>
        <ul class="chart-legend">
          ${series.map(
            ({ label, color, dashed, values }) => html`
              <li key=${label}>
                <i class=${dashed ? "stroke dashed" : "stroke"} style=${{ borderColor: palette[color] }}></i>
                ${label} <strong class="number">${values[shown] == null ? "–" : format(values[shown])}</strong>
              </li>
            `,
          )}
          <li class="muted number">${pointed !== null && clock.format(new Date(times[pointed] * 1000))}</li>
        </ul>
      </figcaption>
      <div ref=${place} aria-hidden="true"></div>
    </figure>
  `;
}

function options(series, format, palette, point) {
  const axis = {
    stroke: palette.muted,
    font: `12px ${getComputedStyle(document.body).fontFamily}`,
    grid: { stroke: palette.line, width: 1 },
    ticks: { show: false },
  };
  return {
    width: 300,
    height: HEIGHT,
    padding: [6, 16, 0, 0],
    legend: { show: false },
    cursor: { x: true, y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: {
      x: { time: true, range: (_, low, high) => [Math.min(low, high - WINDOW), high] },
      y: { range: (_, __, high) => [0, (high || 1) * 1.1] },
    },
    axes: [
      { ...axis, space: 80, size: 24, values: (_, ticks) => ticks.map((time) => clock.format(new Date(time * 1000))) },
      { ...axis, space: 34, size: 56, values: (_, ticks) => ticks.map(format) },
    ],
    series: [
      {},
      ...series.map(({ label, color, dashed }) => ({
        label,
        stroke: palette[color],
        width: 1.5,
        dash: dashed ? [4, 3] : undefined,
        points: { show: false },
      })),
    ],
    hooks: { setCursor: [(chart) => point(chart.cursor.idx ?? null)] },
  };
}

// How the map is drawn.
const HIT = 14; // pixels around an adapter that belong to it

/** What the map must show: the adapters, most samples, and the prompt. */
export function bounds({ adapters, samples }, point) {
  const points = [...adapters, ...samples].map(({ x, y }) => [x, y]);
  if (point) points.push(point);
  const [left, right] = range(points.map(([x]) => x));
  const [bottom, top] = range(points.map(([, y]) => y));
  return { left, right, bottom, top };
}

function range(values) {
  if (values.length === 0) return [-1, 1];
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  return high - low < 1e-9 ? [low - 1, high + 1] : [low, high];
}

/** The name of the adapter at a pixel, or null. */
export function nearest({ adapters }, project, [x, y]) {
  let [best, name] = [HIT, null];
  for (const adapter of adapters) {
    const [px, py] = project([adapter.x, adapter.y]);
    const distance = Math.hypot(px - x, py - y);
    if (distance < best) [best, name] = [distance, adapter.name];
  }
  return name;
}

export function drawMap(canvas, { map, point, chosen, hovered, project, width, height, colors }) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const bright = new Set(hovered ? [hovered] : chosen);

  for (const { adapter, x, y } of map.samples) {
    context.globalAlpha = bright.has(adapter) ? 0.8 : 0.35;
    disc(context, project([x, y]), 1.75, bright.has(adapter) ? colors.accent : colors.muted);
  }
  context.globalAlpha = 1;
  if (point) drawLines(context, { map, point, chosen, project, colors });
  for (const { name, x, y, enabled } of map.adapters) {
    const color = bright.has(name) ? colors.accent : colors.text;
    if (enabled === false) ring(context, project([x, y]), 4, colors.muted);
    else disc(context, project([x, y]), bright.has(name) ? 5 : 4, color, colors.panel);
  }
  if (point) diamond(context, project(point), 7, colors.prompt, colors.panel);
  drawLabels(context, { map, point, bright, project, width, height, colors });
}

/** From the prompt to the adapters that were found for it. */
function drawLines(context, { map, point, chosen, project, colors }) {
  context.strokeStyle = colors.accent;
  context.lineWidth = 1;
  for (const { name, x, y } of map.adapters) {
    const rank = chosen.indexOf(name);
    if (rank < 0) continue;
    context.globalAlpha = rank === 0 ? 0.9 : 0.35;
    context.beginPath();
    context.moveTo(...project(point));
    context.lineTo(...project([x, y]));
    context.stroke();
  }
  context.globalAlpha = 1;
}

/** Names, those that matter first; a name that would cover another is left out. */
function drawLabels(context, { map, point, bright, project, width, height, colors }) {
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  context.lineJoin = "round";
  const taken = map.adapters.length > 300 ? [] : map.adapters.map(({ x, y }) => around(project([x, y]), 4));
  if (point) taken.push(around(project(point), 7));
  const ordered = [...map.adapters].sort((a, b) => bright.has(b.name) - bright.has(a.name));
  for (const { name, x, y, enabled } of ordered) {
    const [px, py] = project([x, y]);
    if (px < 0 || px > width || py < 0 || py > height) continue;
    const size = context.measureText(name).width;
    const places = [
      [px + 8, py],
      [px - 8 - size, py],
      [px - size / 2, py - 12],
      [px - size / 2, py + 12],
    ];
    const place =
      places.find(([left, middle]) => {
        const box = [left, middle - 7, left + size, middle + 7];
        return (
          left >= 2 &&
          box[2] <= width - 2 &&
          box[1] >= 2 &&
          box[3] <= height - 2 &&
          !taken.some((other) => overlap(box, other))
        );
      }) ?? (bright.has(name) ? places[px + 8 + size > width ? 1 : 0] : null);
    if (!place) continue;
    taken.push([place[0], place[1] - 7, place[0] + size, place[1] + 7]);
    context.strokeStyle = colors.panel; // keeps the letters readable over points
    context.lineWidth = 3;
    context.strokeText(name, ...place);
    context.fillStyle = bright.has(name) ? colors.accent : enabled === false ? colors.muted : colors.text;
    context.fillText(name, ...place);
  }
}

const around = ([x, y], size) => [x - size, y - size, x + size, y + size];
const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

function disc(context, [x, y], radius, fill, border = null) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = fill;
  context.fill();
  if (border) outline(context, border);
}

function ring(context, [x, y], radius, color) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  outline(context, color);
}

function diamond(context, [x, y], size, fill, border) {
  context.beginPath();
  context.moveTo(x, y - size);
  context.lineTo(x + size, y);
  context.lineTo(x, y + size);
  context.lineTo(x - size, y);
  context.closePath();
  context.fillStyle = fill;
  context.fill();
  outline(context, border);
}

function outline(context, color) {
  context.strokeStyle = color;
  context.lineWidth = 1.5;
  context.stroke();
}

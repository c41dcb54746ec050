// Draws a figure, described by plain data, as SVG: on the page and in files it is the same.

/**
 * A point that can be asked. `top` places it at the top of the panel instead of at a y, that many lines down.
 * @typedef {{x: number, y?: number, top?: number, run?: number, picked?: boolean, faint?: boolean, text: () => string[]}} Dot
 *
 * @typedef {Object} Mark
 * @property {"line"|"band"|"bars"|"hbars"|"dots"|"rule"|"shade"} type
 * @property {any[]} [points] line: [x, y]; band and bars: [x, low, high]; hbars: [y, low, high]
 * @property {Dot[]} [dots]
 * @property {"dot"|"star"|"cross"|"triangle"|"diamond"} [shape]
 * @property {string} [colour]
 * @property {number[]} [dashes]
 * @property {number} [size] radius of a dot or width of a line
 * @property {boolean} [hollow]
 * @property {number} [opacity]
 * @property {number} [y] of a rule
 * @property {number} [from] of a shade along x
 * @property {number} [to]
 *
 * @typedef {{label: string, log?: 0|2|10, ticks?: number[], names?: string[], domain?: [number, number]}} Axis
 * @typedef {{title: string, x: Axis, y: Axis, marks: Mark[]}} Panel
 * @typedef {{name: string, colour: string, dashes?: number[], shape?: string, hollow?: boolean}} Entry
 * @typedef {{rows: {panels: Panel[], shared?: boolean, height?: number}[], legend: Entry[], data: object[]}} Figure
 * @typedef {{svg: SVGElement, hits: {x: number, y: number, dot: Dot}[], panels: number}} Drawing
 */

const INKS = {
  light: { ink: "#1d2433", muted: "#667085", grid: "#e8ebf0", paper: "#ffffff", shade: "#f1f3f6" },
  dark: { ink: "#e7eaf0", muted: "#98a2b3", grid: "#2a303b", paper: "#151922", shade: "#1d222d" },
};
// Colours of the static figures that a dark page would swallow.
const LIGHTER = { "#000000": "#f2f4f7", "#0072b2": "#4aa8e8", "#d55e00": "#ff8a3d", "#009e73": "#2fcf9f", "#404040": "#b6bdc9", "#666666": "#a2a9b4", "#808080": "#b3bac6" };
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
const PLOT = { top: 44, right: 12, bottom: 40, left: 50 };
const LEAST_PANEL = 250;
const NOTHING = "Nothing to draw of what is chosen.";

function seen(colour, theme) {
  return (theme === "dark" && LIGHTER[colour.toLowerCase()]) || colour;
}

/** @param {Figure} figure @param {number} width @param {"light"|"dark"} theme @returns {Drawing} */
function draw(figure, width, theme, label) {
  const inks = INKS[theme];
  const hits = [];
  const parts = [];
  let top = 0;
  let panels = 0;
  const across = Math.max(1, Math.floor(width / LEAST_PANEL));
  for (const row of figure.rows.filter((row) => row.panels.length)) {
    const y = row.shared ? extent(row.panels, "y") : null;
    // Nine panels are 3 x 3, where four would fit beside one another.
    const columns = Math.ceil(row.panels.length / Math.ceil(row.panels.length / across));
    const each = width / columns;
    const height = row.height ?? (each > 420 ? 300 : 240);
    for (let start = 0; start < row.panels.length; start += columns) {
      const here = row.panels.slice(start, start + columns);
      here.forEach((panel, place) => {
        const first = !row.shared || place === 0;
        parts.push(drawPanel(panel, place * each, top, each, height, y, first, inks, theme, hits));
        panels += 1;
      });
      top += height;
    }
  }
  if (!panels) {
    parts.push(s("text", { x: 6, y: 26, "font-size": 12.5, fill: inks.muted }, NOTHING));
    top = 44;
  }
  const legend = drawLegend(figure.legend, width, top, inks, theme);
  const attributes = { viewBox: `0 0 ${width} ${legend.bottom}`, width, height: legend.bottom, "font-family": FONT, role: "img", "aria-label": label };
  const svg = s("svg", attributes, s("rect", { width, height: legend.bottom, fill: inks.paper }), ...parts, ...legend.parts);
  return { svg, hits, panels };
}

function drawPanel(panel, left, top, width, height, shared, first, inks, theme, hits) {
  const names = panel.y.names ?? [];
  const wide = names.length ? Math.min(0.4 * width, 12 + 6.2 * Math.max(...names.map((name) => name.length))) : PLOT.left;
  const box = { left: left + wide, right: left + width - PLOT.right, top: top + PLOT.top, bottom: top + height - PLOT.bottom };
  const x = scale(panel.x, domainOf(panel.x) ?? extent([panel], "x"), box.left, box.right);
  const y = scale(panel.y, domainOf(panel.y) ?? shared ?? extent([panel], "y"), box.bottom, box.top);
  const clip = `clip${(drawPanel.count = (drawPanel.count ?? 0) + 1)}`;
  const text = (attributes, ...content) => s("text", { "font-size": 11, fill: inks.muted, ...attributes }, ...content);
  const grid = [];
  for (const mark of panel.marks.filter((mark) => mark.type === "shade")) {
    const [from, to] = [x(Math.max(mark.from, x.low)), x(Math.min(mark.to, x.high))];
    if (to > from) grid.push(s("rect", { x: from, y: box.top, width: to - from, height: box.bottom - box.top, fill: inks.shade }));
  }
  const down = ticksOf(panel.y, y, Math.max(3, Math.floor((box.bottom - box.top) / 38)));
  const digits = decimals(panel.y, down);
  for (const tick of down) {
    grid.push(s("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), stroke: inks.grid }));
    const name = tickText(panel.y, tick, digits);
    grid.push(text({ x: box.left - 7, y: y(tick), dy: "0.32em", "text-anchor": "end" }, ...(panel.y.names ? [cut(name, wide - 8)] : powers(name))));
  }
  let taken = -Infinity;
  const along = ticksOf(panel.x, x, Math.max(2, Math.floor((box.right - box.left) / 62)));
  const places = decimals(panel.x, along);
  for (const tick of along) {
    const name = tickText(panel.x, tick, places);
    const half = name.replace("^", "").length * 3.2;
    grid.push(s("line", { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4, stroke: inks.muted }));
    if (x(tick) - half < taken + 4) continue;
    taken = x(tick) + half;
    grid.push(text({ x: x(tick), y: box.bottom + 16, "text-anchor": "middle" }, ...powers(name)));
  }
  grid.push(s("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, stroke: inks.muted }));
  const labels = [text({ x: left + 4, y: top + 15, "font-size": 12.5, "font-weight": 600, fill: inks.ink }, cut(panel.title, width - 8, 6.8))];
  if (first && panel.y.label) labels.push(text({ x: left + 4, y: top + 30 }, cut(`↑ ${panel.y.label}`, width - 8)));
  if (panel.x.label) labels.push(text({ x: box.right, y: box.bottom + 32, "text-anchor": "end" }, cut(`${panel.x.label} →`, box.right - left)));
  const marks = panel.marks.flatMap((mark) => drawMark(mark, x, y, box, inks, theme, hits));
  const around = { x: box.left - 6, y: box.top - 3, width: box.right - box.left + 12, height: box.bottom - box.top + 7 };
  const defs = s("defs", {}, s("clipPath", { id: clip }, s("rect", around)));
  return s("g", {}, defs, ...grid, s("g", { "clip-path": `url(#${clip})` }, ...marks), ...labels);
}

function drawMark(mark, x, y, box, inks, theme, hits) {
  const colour = seen(mark.colour ?? inks.muted, theme);
  const dashed = mark.dashes?.length ? mark.dashes.join(" ") : null;
  const known = (...values) => values.every((value) => value !== null && Number.isFinite(value));
  // An interval may reach down to 0 or below, where a logarithmic axis has no place: it is drawn to the axis's end.
  const end = (place, value) => at(place(place.log && value <= 0 ? place.low : value));
  switch (mark.type) {
    case "line": {
      let path = "";
      let up = true;
      for (const [a, b] of mark.points) {
        if (!known(a, b)) up = true;
        else {
          path += `${up ? "M" : "L"}${at(x(a))},${at(y(b))}`;
          up = false;
        }
      }
      return [s("path", { d: path, fill: "none", stroke: colour, "stroke-width": mark.size ?? 1.8, "stroke-dasharray": dashed, "stroke-linejoin": "round", opacity: mark.opacity ?? null })];
    }
    case "band": {
      const parts = [];
      let run = [];
      const close = () => {
        const back = [...run].reverse();
        if (run.length > 1) {
          const path = "M" + run.map(([a, low]) => `${at(x(a))},${end(y, low)}`).join("L") + "L" + back.map(([a, , high]) => `${at(x(a))},${end(y, high)}`).join("L") + "Z";
          parts.push(s("path", { d: path, fill: colour, opacity: 0.15 }));
        }
        run = [];
      };
      for (const point of mark.points) known(...point) ? run.push(point) : close();
      close();
      return parts;
    }
    case "bars": {
      const path = mark.points.filter((point) => known(...point)).map(([a, low, high]) => `M${at(x(a))},${end(y, low)}V${end(y, high)}`).join("");
      return [s("path", { d: path, stroke: colour, "stroke-width": mark.size ?? 1.3, fill: "none" })];
    }
    case "hbars": {
      const path = mark.points.filter((point) => known(...point)).map(([b, low, high]) => `M${end(x, low)},${at(y(b))}H${end(x, high)}`).join("");
      return [s("path", { d: path, stroke: colour, "stroke-width": mark.size ?? 1.3, fill: "none" })];
    }
    case "rule":
      return [s("line", { x1: box.left, x2: box.right, y1: y(mark.y), y2: y(mark.y), stroke: colour, "stroke-width": mark.size ?? 1, "stroke-dasharray": dashed })];
    case "dots":
      return drawDots(mark, colour, x, y, box, inks, hits);
    default:
      return [];
  }
}

/** All dots of a mark are one path: ten thousand of them take the time of one element. */
function drawDots(mark, colour, x, y, box, inks, hits) {
  const size = mark.size ?? 2.6;
  const shape = mark.shape ?? "dot";
  const round = shape === "dot" && !mark.hollow;
  const paths = ["", "", ""]; // plain, faint, picked
  for (const dot of mark.dots) {
    const across = x(dot.x);
    const down = dot.top === undefined ? y(dot.y) : box.top + 4 + 10 * dot.top;
    if (!Number.isFinite(across) || !Number.isFinite(down) || down < box.top - 5 || down > box.bottom + 5) continue;
    if (across < box.left - 5 || across > box.right + 5) continue;
    paths[dot.picked ? 2 : dot.faint ? 1 : 0] += round ? `M${at(across)},${at(down)}h0` : SHAPES[shape](at(across), at(down), size);
    hits.push({ x: across, y: down, dot });
  }
  const look = round
    ? { stroke: colour, "stroke-width": 2 * size, "stroke-linecap": "round" }
    : { stroke: shape === "star" ? inks.ink : colour, "stroke-width": shape === "cross" ? 1.6 : shape === "star" ? 0.8 : 1.4, fill: mark.hollow ? inks.paper : shape === "cross" ? "none" : colour };
  const looks = [{ opacity: mark.opacity ?? null }, { opacity: 0.1 }, round ? { "stroke-width": 3.4 * size } : {}];
  return paths.map((path, place) => path && s("path", { d: path, ...look, ...looks[place] })).filter(Boolean);
}

const SHAPES = {
  dot: (x, y, r) => `M${x},${y}m${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  cross: (x, y, r) => `M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`,
  triangle: (x, y, r) => `M${x},${y - r}l${r},${1.7 * r}h${-2 * r}Z`,
  diamond: (x, y, r) => `M${x},${y - 1.3 * r}l${1.1 * r},${1.3 * r}l${-1.1 * r},${1.3 * r}l${-1.1 * r},${-1.3 * r}Z`,
  star: (x, y, r) => {
    const points = Array.from({ length: 10 }, (_, place) => {
      const radius = place % 2 ? 0.42 * r : r;
      const angle = (Math.PI * place) / 5 - Math.PI / 2;
      return `${at(x + radius * Math.cos(angle))},${at(y + radius * Math.sin(angle))}`;
    });
    return `M${points.join("L")}Z`;
  },
};

const at = (value) => Math.round(value * 10) / 10;

function cut(text, width, each = 6.1) {
  const room = Math.max(4, Math.floor(width / each));
  return text.length > room ? `${text.slice(0, room - 1)}…` : text;
}

function drawLegend(entries, width, top, inks, theme) {
  const parts = [];
  let x = 6;
  let y = top + 12;
  for (const entry of entries) {
    const size = 44 + 7.2 * entry.name.length;
    if (x > 6 && x + size > width) [x, y] = [6, y + 20];
    const colour = seen(entry.colour ?? inks.muted, theme);
    if (entry.shape === "shade") parts.push(s("rect", { x, y: y - 6, width: 22, height: 12, fill: inks.shade, stroke: inks.grid }));
    else {
      if (!entry.shape) parts.push(s("line", { x1: x, x2: x + 24, y1: y, y2: y, stroke: colour, "stroke-width": 2, "stroke-dasharray": entry.dashes?.join(" ") || null }));
      const shape = entry.shape ?? "dot";
      const filling = entry.hollow ? inks.paper : shape === "cross" ? "none" : colour;
      parts.push(s("path", { d: SHAPES[shape](x + 12, y, shape === "star" ? 6 : 3.2), fill: filling, stroke: shape === "star" ? inks.ink : colour, "stroke-width": 1.2 }));
    }
    parts.push(s("text", { x: x + 30, y, dy: "0.34em", "font-size": 12, fill: inks.ink }, entry.name));
    x += size;
  }
  return { parts, bottom: entries.length ? y + 14 : top };
}

/** The domain that an axis asks for, unless it is logarithmic and the domain is not above 0. */
function domainOf({ domain, log }) {
  return domain && (!log || domain[0] > 0) ? domain : null;
}

/** From data to pixels, with the domain's ends as `low` and `high`. */
function scale(axis, [low, high], from, to) {
  const change = axis.log ? Math.log : (value) => value;
  const [start, end] = [change(low), change(high)];
  const span = end - start || 1;
  const place = (value) => from + ((change(value) - start) / span) * (to - from);
  return Object.assign(place, { low, high, log: Boolean(axis.log) });
}

/** The ends of all data along an axis, with room around. */
function extent(panels, which) {
  const axis = panels[0][which];
  let [low, high] = [Infinity, -Infinity];
  const take = (value) => {
    if (value === null || !Number.isFinite(value) || (axis.log && value <= 0)) return;
    low = Math.min(low, value);
    high = Math.max(high, value);
  };
  const along = which === "x" ? 0 : 1;
  for (const panel of panels) {
    for (const mark of panel.marks) {
      for (const dot of mark.dots ?? []) take(which === "x" ? dot.x : dot.y ?? null);
      const spread = mark.type === "hbars" ? 1 - along : along;
      for (const point of mark.points ?? []) spread ? point.slice(1).forEach(take) : take(point[0]);
      if (mark.type === "rule" && which === "y") take(mark.y);
    }
    (panel[which].ticks ?? []).forEach(take);
  }
  if (low > high) return axis.log ? [0.5, 2] : [0, 1];
  if (axis.names) return [low - 0.6, high + 0.6];
  if (axis.log) {
    const room = low === high ? 1.6 : (high / low) ** 0.05;
    return [low / room, high * room];
  }
  const room = low === high ? Math.abs(low) * 0.05 || 0.5 : 0.06 * (high - low);
  return [low - room, high + room];
}

function ticksOf(axis, { low, high }, most) {
  const inside = (ticks) => ticks.filter((tick) => tick >= low && tick <= high);
  if (axis.ticks) return inside(axis.ticks);
  if (axis.log === 2) {
    const [least, greatest] = [Math.log2(low) - 1e-9, Math.log2(high) + 1e-9];
    const stride = [0.25, 0.5, 1, 2, 4, 8, 16].find((one) => (greatest - least) / one <= most) ?? 32;
    const first = Math.ceil(least / stride);
    return Array.from({ length: Math.floor(greatest / stride) - first + 1 }, (_, place) => 2 ** (stride * (first + place)));
  }
  if (axis.log) {
    const powers = Array.from({ length: Math.ceil(Math.log10(high)) - Math.floor(Math.log10(low)) + 1 }, (_, place) => Math.floor(Math.log10(low)) + place);
    for (const factors of [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const ticks = inside(powers.flatMap((power) => factors.map((factor) => factor * 10 ** power)));
      if (ticks.length <= most && ticks.length > 1) return ticks;
    }
    const whole = inside(powers.map((power) => 10 ** power));
    if (whole.length > 1) return whole.filter((_, place) => place % Math.ceil(whole.length / most) === 0);
  }
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
}

/** The most decimals that a tick needs, for all of them. */
function decimals(axis, ticks) {
  if (axis.names || axis.ticks || axis.log) return null;
  return Math.max(0, ...ticks.map((tick) => String(Number(tick.toPrecision(6))).split(".")[1]?.length ?? 0));
}

/** Text with powers, 2^-6, as raised spans. */
function powers(text) {
  const [, before, power] = /^(.*)\^(.+)$/.exec(text) ?? [];
  return power === undefined ? [text] : [before, s("tspan", { dy: -4, "font-size": 9 }, power.replace("-", "−"))];
}

function tickText(axis, tick, digits) {
  if (axis.names) return axis.names[axis.ticks.indexOf(tick)] ?? "";
  if (axis.log === 2 && !axis.ticks) return rateText(tick);
  const size = Math.abs(tick);
  if (size >= 1e5) {
    const power = Math.floor(Math.log10(size) + 1e-9);
    const factor = Number((tick / 10 ** power).toPrecision(3));
    return `${factor === 1 ? "" : `${factor}·`}10^${power}`;
  }
  return (digits === null ? String(Number(tick.toPrecision(6))) : tick.toFixed(digits)).replace("-", "−");
}

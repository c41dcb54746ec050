// Puts the page together, and keeps what the reader has chosen when the report changes.

/**
 * What the parts of the page share.
 * @typedef {Object} Page
 * @property {Object} data the report, unpacked
 * @property {(place: number) => Curve} curve
 * @property {Set<string>} armsOff
 * @property {Set<number>} seedsOff
 * @property {string} filter
 * @property {boolean[]|null} matches
 */
const page = {
  data: null,
  armsOff: new Set(),
  seedsOff: new Set(),
  options: {},
  choices: {},
  open: {},
  filter: "",
  matches: null,
  sort: { name: "", down: false },
  selected: null,
  cards: [],
  addresses: [], // of the images of figures as they are
  theme,
  swatch,
  openRun: (run, from) => page.panel.open(run, from),
  matchesChanged,
  receive,
  tip: tooltip(),
};

function theme() {
  return document.documentElement.dataset.theme;
}

function startTheme() {
  let kept = null;
  try {
    kept = localStorage.getItem("lit-mult-theme");
  } catch {
    // A page of file:// may have no storage.
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (name) => (document.documentElement.dataset.theme = name);
  set(kept ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => {
    if (kept === null) set(dark.matches ? "dark" : "light"), redraw();
  });
  let seenIn = null; // while it is printed, which is on white
  addEventListener("beforeprint", () => {
    seenIn = theme();
    if (seenIn === "dark") set("light"), redraw();
  });
  addEventListener("afterprint", () => {
    if (seenIn === "dark") set(seenIn), redraw();
  });
  return () => {
    kept = set(theme() === "dark" ? "light" : "dark");
    try {
      localStorage.setItem("lit-mult-theme", kept);
    } catch {
      // It holds until the page is left.
    }
    redraw();
  };
}

function tooltip() {
  const node = h("div", { class: "tip", role: "status", hidden: true });
  return {
    node,
    show(lines, x, y) {
      node.replaceChildren(...lines.map((line, place) => h(place ? "div" : "strong", {}, line)));
      node.hidden = false;
      const { width, height } = node.getBoundingClientRect();
      const left = Math.min(Math.max(8, x + 14), innerWidth - width - 8);
      const top = y + 14 + height > innerHeight ? y - height - 14 : y + 14;
      node.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(8, top))}px)`;
    },
    hide() {
      node.hidden = true;
    },
  };
}

function swatch(arm) {
  const colour = page.data.arms.find((one) => one.name === arm)?.colour ?? "#808080";
  return s("svg", { class: "swatch", width: 10, height: 10, "aria-hidden": "true" }, s("circle", { cx: 5, cy: 5, r: 4.5, fill: seen(colour, theme()) }));
}

/** Buttons that take an arm or a seed out of every figure, or back. */
function toggles(title, values, off, named) {
  const buttons = values.map((value) => {
    const button = h("button", { type: "button", class: "chip", "aria-pressed": String(!off.has(value)), onclick: toggle }, ...named(value));
    function toggle() {
      off.has(value) ? off.delete(value) : off.add(value);
      button.setAttribute("aria-pressed", String(!off.has(value)));
      drawFigures();
    }
    return button;
  });
  const all = h("button", { type: "button", class: "chip plain", onclick: every }, "all");
  function every() {
    off.clear();
    buttons.forEach((button) => button.setAttribute("aria-pressed", "true"));
    drawFigures();
  }
  return h("div", { class: "toggles", role: "group", "aria-label": title }, h("span", { class: "note" }, title), ...buttons, ...(values.length > 2 ? [all] : []));
}

function drawFigures() {
  page.cards.forEach((card) => card.update());
}

let waiting = 0;
/** Figures follow the filter once the table has, in a frame of its own. */
function matchesChanged() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => setTimeout(() => page.cards.filter((card) => card.dots).forEach((card) => card.update())));
}

const nav = [["answer", "Answer"], ["figures", "Figures"], ["findings", "Findings"], ["tables", "Tables"], ["runs", "Runs"], ["provenance", "Provenance"]];

function section(id, title, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), ...children);
}

/** The report as the reader has chosen to see it. */
function build() {
  const { data } = page;
  const { runs } = data;
  const seeds = ascending(runs.seed);
  const names = Object.keys(FIGURES).filter((name) => FIGURES[name].has(data));
  page.cards = names.map((name) => ({ ...figureCard(name, page), dots: !["scores", "curves", "diagnostics", "loss_vs_compute"].includes(name) }));
  const [cards, statics] = [page.cards.map((card) => card.node), data.figures.map((figure) => staticCard(figure, page.addresses))];
  page.table = runTable(page);
  const widths = ascending(runs.d_model);
  const facts = [plural(data.runCount, "run"), plural(data.arms.length, "arm"), `width${widths.length > 1 ? "s" : ""} ${widths.join(", ")}`, plural(seeds.length, "seed"), `${written(runs.tokens.reduce((sum, one) => sum + one, 0), 3)} tokens`];
  document.title = data.title;
  return [
    h("header", { class: "title" }, h("h1", {}, data.title), h("p", { class: "note" }, facts.join(" · "))),
    section("answer", "Answer", answer(data, theme())),
    section("figures", "Figures",
      h("div", { class: "controls" }, toggles("Arms", data.arms.map((arm) => arm.name), page.armsOff, (name) => [swatch(name), name]), seeds.length > 1 ? toggles("Seeds", seeds, page.seedsOff, (seed) => [String(seed)]) : null, page.table.picker),
      ...(data.experiment ? [...statics, ...cards] : [...cards, ...statics])),
    section("findings", "Findings", ...lists(data, page), folded("How to read it", "", howToRead(data), page, false)),
    section("tables", "Tables", h("p", { class: "note" }, sentence(data.unit) + (data.unit ? "." : "")), ...tables(data, page)),
    section("runs", "Runs", page.table.node),
    section("provenance", "Provenance", ...provenance(data)),
  ];
}

function redraw() {
  if (!page.data) return;
  const focus = document.activeElement?.id;
  const top = (one) => one.getBoundingClientRect().top;
  const read = [...main.querySelectorAll("section, figure")].filter((one) => one.id && top(one) < 80).at(-1);
  const before = read ? top(read) : 0;
  const rows = document.querySelector(".scroller")?.scrollTop ?? 0;
  for (const address of page.addresses.splice(0)) URL.revokeObjectURL(address);
  main.replaceChildren(...build());
  page.table.filter(page.filter);
  drawFigures();
  document.querySelector(".scroller").scrollTop = rows;
  if (page.selected !== null && !page.panel.node.hidden) page.panel.open(page.selected);
  if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  const again = read && document.getElementById(read.id);
  if (again) scrollBy(0, top(again) - before); // what is read stays where it is
}

/** Show a report; what the reader has chosen stays. */
async function receive({ data: packed, curves }) {
  const data = await unpacked(packed);
  const chosen = page.selected === null ? null : page.data.runs.cell[page.selected];
  data.runs = unpackedColumns(data.runs);
  data.runCount = data.runs.cell.length;
  const config = unpackedColumns(data.config);
  data.config = { paths: Object.keys(config).map((path) => path.split("\t")), values: Object.values(config) };
  for (const name of ["rates", "points", "bill", "scores"]) data[name] = unpackedRows(data[name]);
  quantiles = data.t;
  page.data = data;
  page.curve = await unpackedCurves(curves);
  page.selected = chosen === null ? null : data.runs.cell.indexOf(chosen);
  if (page.selected === -1) page.selected = null;
  redraw();
}

const switchTheme = startTheme();
const main = h("main", { id: "main" });
document.body.append(
  h("nav", { class: "top", "aria-label": "Sections" }, h("a", { href: "#main", class: "brand" }, "lit_mult"), h("div", { class: "links" }, ...nav.map(([id, title]) => h("a", { href: `#${id}` }, title))), h("button", { type: "button", class: "small theme", "aria-label": "Light or dark", onclick: switchTheme }, "◐")),
);
const { live: version } = document.documentElement.dataset;
const watched = version === undefined ? null : live(page, version);
if (watched) document.body.append(watched.node);
page.panel = runPanel(page);
document.body.append(main, page.panel.node, page.tip.node);

const given = ["data", "curves"].map((id) => document.getElementById(id).textContent);
(given[0] ? receive({ data: given[0], curves: given[1] }) : Promise.resolve(main.append(h("p", { class: "empty" }, "No run has ended yet. The report appears with the first record."))))
  .finally(() => watched?.ask())
  .finally(() => (document.documentElement.dataset.ready = "yes"));

// All runs as a table: sorted, filtered, and drawn only where the reader looks, so that ten thousand rows stay quick.

const ROW = 30; // pixels
const COLUMNS = [
  { name: "cell", title: "run" },
  { name: "arm", title: "arm" },
  { name: "setting", title: "setting" },
  { name: "d_model", title: "width", number: true },
  { name: "lr", title: "lr", number: true, write: (value) => written(value, 3) },
  { name: "nuisance", title: "other values" },
  { name: "seed", title: "seed", number: true },
  { name: "status", title: "status" },
  { name: "final_loss", title: "final loss", number: true, write: lossText },
  { name: "steps", title: "steps", number: true },
  { name: "tokens", title: "tokens", number: true, write: (value) => written(value, 3) },
  { name: "wall_seconds", title: "wall time", number: true, write: durationText },
  { name: "tokens_per_second", title: "tokens/s", number: true, write: (value) => Math.round(value).toLocaleString("en-US") },
  { name: "role", title: "beyond the grid" },
];

/** @param {Page} page */
function runTable(page) {
  const runs = page.data.runs;
  const columns = COLUMNS.filter(({ name }) => runs[name].some((value) => value !== "" && value !== null));
  let order = [];
  let shownFrom = -1;

  // The same filter stands above the figures and above the table.
  const fields = ["filter", "filter-table"].map((id) => filterField(id, page.filter, (text) => (filter(text), page.matchesChanged())));
  const heads = columns.map(({ name, title, number }) => h("th", { scope: "col", class: number ? "number" : null, "aria-sort": "none" }, h("button", { type: "button", onclick: () => sort(name) }, title)));
  const body = h("tbody");
  const table = h("table", { class: "runs", "aria-label": "Runs" }, h("thead", {}, h("tr", {}, ...heads)), body);
  const scroller = h("div", { class: "scroller", tabindex: 0, role: "group", "aria-label": "Table of runs", onscroll: () => fill(), onkeydown: step }, table);
  const help = h("p", { class: "help", id: "filter-help" }, "Text, or a field with = != < <= > >= ~ and a value (| between several); - takes the others. Fields: ", ...Object.keys(SHORT).slice(0, 6).flatMap((name) => [h("code", {}, name), " "]), "and every column and factor. Dots of other runs fade in the figures.");
  const save = h("button", { type: "button", class: "small", onclick: saveCsv }, "Save these runs as CSV");
  fields[1].node.append(save);
  const node = h("div", {}, fields[1].node, help, scroller);

  function filter(text) {
    page.filter = text;
    const { test, problem: wrong } = query(text, runs);
    for (const { input, problem } of fields) {
      if (input.value !== text) input.value = text;
      problem.textContent = wrong;
    }
    page.matches = page.filter.trim() && !wrong ? runs.cell.map((_, run) => test(run)) : null;
    update();
  }

  function sort(name) {
    page.sort = page.sort.name === name ? { name, down: !page.sort.down } : { name, down: false };
    update();
  }

  function update() {
    order = runs.cell.map((_, run) => run);
    if (page.matches) order = order.filter((run) => page.matches[run]);
    const { name, down } = page.sort;
    if (name) {
      const values = runs[name];
      const both = typeof values.find((value) => value !== null) === "number" ? (one, other) => one - other : natural;
      order.sort((one, other) => {
        if (values[one] === null || values[other] === null) return (values[one] === null) - (values[other] === null); // last, either way
        return (down ? -1 : 1) * both(values[one], values[other]) || one - other;
      });
    }
    columns.forEach((column, place) => heads[place].setAttribute("aria-sort", column.name === name ? (down ? "descending" : "ascending") : "none"));
    for (const { count } of fields) count.textContent = `${order.length.toLocaleString("en-US")} of ${plural(runs.cell.length, "run")}`;
    table.setAttribute("aria-rowcount", String(order.length + 1));
    shownFrom = -1;
    fill();
  }

  /** Put the rows in sight, and some around, into the table; empty rows keep the place of the others. */
  function fill() {
    const from = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 15);
    const start = from - (from % 10);
    if (start === shownFrom) return;
    shownFrom = start;
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.run : null;
    const end = Math.min(order.length, start + Math.ceil((scroller.clientHeight || 480) / ROW) + 40);
    const gap = (rows) => {
      const row = h("tr", { class: "gap", "aria-hidden": "true" }, h("td", { colspan: columns.length }));
      row.firstChild.style.height = `${rows * ROW}px`;
      return row;
    };
    body.replaceChildren(...(start ? [gap(start)] : []), ...order.slice(start, end).map((run, place) => line(run, start + place)), ...(end < order.length ? [gap(order.length - end)] : []));
    if (focused !== null) body.querySelector(`[data-run="${focused}"]`)?.focus({ preventScroll: true });
  }

  function line(run, place) {
    const cells = columns.map(({ name, number, write }) => {
      const value = runs[name][run];
      const text = value === null ? "–" : write ? write(value) : String(value);
      if (name === "cell") return h("th", { scope: "row" }, h("button", { type: "button", class: "link", "data-run": run, title: text, onclick: (event) => page.openRun(run, event.target) }, text));
      if (name === "arm") return h("td", {}, page.swatch(value), text);
      return h("td", { class: number ? "number" : name === "status" ? `status ${value}` : null, title: text.length > 24 ? text : null }, text);
    });
    return h("tr", { "aria-rowindex": place + 2, class: page.selected === run ? "selected" : null }, ...cells);
  }

  function step(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const run = event.target.dataset?.run;
    if (!move || run === undefined) return;
    event.preventDefault();
    const place = order.indexOf(Number(run)) + move;
    if (place < 0 || place >= order.length) return;
    reveal(place);
    body.querySelector(`[data-run="${order[place]}"]`)?.focus({ preventScroll: true });
  }

  function reveal(place) {
    const top = place * ROW;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    if (top + 2 * ROW > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + 2 * ROW - scroller.clientHeight;
    fill();
  }

  function saveCsv() {
    const names = Object.keys(runs);
    offer("runs.csv", csv(order.map((run) => Object.fromEntries(names.map((name) => [name, runs[name][run]])))), "text/csv");
  }

  /** The run that follows another in the order of the table. */
  function neighbour(run, move) {
    const place = order.indexOf(run);
    return place < 0 ? order[0] : order[(place + move + order.length) % order.length];
  }

  return { node, picker: fields[0].node, filter, neighbour, redraw: () => ((shownFrom = -1), fill()) };
}

function filterField(id, text, changed) {
  const input = h("input", { type: "search", id, placeholder: "vectors lr<2^-6 seed=0|1 -diverged", autocomplete: "off", spellcheck: "false", "aria-describedby": `filter-help ${id}-problem`, oninput: () => changed(input.value) });
  input.value = text;
  const count = h("output", { class: "count", for: id });
  const problem = h("p", { class: "problem", id: `${id}-problem`, role: "status" });
  return { input, count, problem, node: h("div", { class: "filter" }, h("label", { for: id, class: "note" }, "Runs"), input, count, problem) };
}

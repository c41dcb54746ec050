// The parts of the page that are read: the answer, sentences, tables, provenance.

const PILLS = { best: "best arm", doubt: "doubt" };

function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : text;
}

/** The first thing on the page. */
function answer(data, theme) {
  const items = data.headlines.map((headline) => {
    const pill = headline.outcome && h("span", { class: `pill ${headline.outcome.replaceAll(" ", "-")}` }, PILLS[headline.outcome] ?? headline.outcome);
    return h("li", { class: headline.outcome ? null : "tally" }, h("div", { class: "said" }, pill || null, h("span", {}, ...marked(headline.text))), headline.low === null ? null : span(headline, theme));
  });
  return h("ul", { class: "answer" }, ...items);
}

/** An interval on a line of its own: 0, what it is judged by, and where it lies. */
function span({ value, low, high, range_low, range_high }, theme) {
  const inks = INKS[theme];
  const [width, height] = [190, 44];
  const finite = [0, value, low, high, range_low, range_high].filter((one) => one !== null);
  const [least, most] = [Math.min(...finite), Math.max(...finite)];
  const room = 0.08 * (most - least) || 1;
  const x = (at) => 6 + ((at - (least - room)) / (most - least + 2 * room)) * (width - 12);
  const label = `${written(value, 3)}, 95 % interval from ${written(low, 3)} to ${written(high, 3)}`;
  const colour = seen(high < 0 || low > 0 ? "#0072b2" : "#808080", theme);
  const judged = range_low !== null || range_high !== null;
  const [from, to] = [range_low ?? least - room, range_high ?? most + room].map(x);
  return s("svg", { class: "span", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label, "font-family": FONT },
    judged ? s("rect", { x: from, width: Math.max(0, to - from), y: 8, height: 18, fill: inks.shade, rx: 3 }) : null,
    s("line", { x1: 6, x2: width - 6, y1: 17, y2: 17, stroke: inks.grid }),
    s("line", { x1: x(0), x2: x(0), y1: 5, y2: 29, stroke: inks.muted, "stroke-dasharray": "2 2" }),
    s("line", { x1: x(low), x2: x(high), y1: 17, y2: 17, stroke: colour, "stroke-width": 3, "stroke-linecap": "round" }),
    s("circle", { cx: x(value), cy: 17, r: 4.5, fill: colour }),
    s("text", { x: x(0), y: 41, "font-size": 10, fill: inks.muted, "text-anchor": "middle" }, "0"));
}

/** Warnings, verdicts and statements; long lists are folded. */
function lists(data, page) {
  return data.lists.map(([heading, lines]) => {
    const warnings = heading === "Warnings";
    const items = h("ul", { class: warnings ? "warnings" : "sentences" }, ...(lines.length ? lines : ["none"]).map((line) => h("li", {}, ...verdict(line))));
    return folded(`${heading}`, plural(lines.length, warnings ? "warning" : "sentence"), items, page, lines.length <= 16 && lines.length > 0);
  });
}

/** A sentence whose bold beginning is an outcome gets that outcome's pill. */
function verdict(line) {
  const parts = /^\*\*(reproduced|contradicted|undecided|not at this scale)\*\*: (.*)$/s.exec(line);
  return parts ? [h("span", { class: `pill ${parts[1].replaceAll(" ", "-")}` }, parts[1]), " ", ...marked(parts[2])] : marked(line);
}

function tables(data, page) {
  return data.tables.map(({ name, columns, rows }, place) => {
    const numeric = columns.map((_, column) => rows.every((row) => /^[-+−]?[\d.,]+(e-?\d+)?( %| steps)?$|^(n\/a|)$/.test(row[column])));
    const head = h("tr", {}, ...columns.map((title, column) => h("th", { scope: "col", class: numeric[column] ? "number" : null }, title.trim())));
    const body = rows.map((row) => h("tr", {}, ...row.map((cell, column) => h(column ? "td" : "th", { scope: column ? null : "row", class: numeric[column] ? "number" : null }, cell))));
    const title = sentence(name.replaceAll("_", " "));
    const table = h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": title }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...body)));
    return folded(title, plural(rows.length, "row"), table, page, place === 0 || rows.length <= 12);
  });
}

function folded(title, note, content, page, open) {
  const known = page.open[title];
  const details = h("details", { open: known ?? open, ontoggle: () => (page.open[title] = details.open) }, h("summary", {}, h("h3", {}, title), " ", h("span", { class: "note" }, note)), content);
  return details;
}

/** How to read it: lines of a list in Markdown, of which some go on. */
function howToRead(data) {
  const points = data.how_to_read.split(/^- /m).map((point) => point.replace(/\s+/g, " ").trim()).filter(Boolean);
  return h("ul", { class: "sentences" }, ...points.map((point) => h("li", {}, ...marked(point))));
}

function provenance(data) {
  const pairs = data.provenance.map((line) => {
    const place = line.indexOf(": ");
    return place < 0 || place > 40 || /^\d/.test(line) ? ["", line] : [line.slice(0, place), line.slice(place + 2)];
  });
  const made = pairs.find(([name]) => name === "Made by");
  return [
    h("dl", {}, ...pairs.flatMap(([name, value]) => [h("dt", {}, name || "Note"), h("dd", {}, ...marked(value))])),
    ...(made ? [command(made[1].replaceAll("`", ""))] : []),
    h("p", { class: "help" }, "Each run's own commit, config, device and versions are in its panel: choose it in a figure or in the table."),
  ];
}

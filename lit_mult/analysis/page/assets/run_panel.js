// One run: its curves beside those of the other seeds, what it measured, its config, and how to repeat it.

/** @param {Page} page */
function runPanel(page) {
  let opener = null;
  const node = h("aside", { class: "panel", id: "run", "aria-label": "Run", tabindex: -1, hidden: true, onkeydown: keys });

  function open(run, from) {
    opener = from ?? opener;
    page.selected = run;
    const runs = page.data.runs;
    const of = (name) => runs[name]?.[run] ?? null;
    const previous = h("button", { type: "button", class: "small", "aria-label": "Previous run", onclick: () => go(-1) }, "←");
    const next = h("button", { type: "button", class: "small", "aria-label": "Next run", onclick: () => go(1) }, "→");
    const shut = h("button", { type: "button", class: "small", "aria-label": "Close", onclick: close }, "✕");
    const facts = [
      ["status", of("status")],
      ["final loss", of("final_loss") === null ? null : `${lossText(of("final_loss"))} nats per token, ${written(of("final_bits_per_byte"))} bits per byte`],
      ["best loss", of("best_loss") === null ? null : `${lossText(of("best_loss"))}; ${lossText(of("initial_loss"))} before the first step`],
      ["learning rate", rateText(of("lr")) === written(of("lr"), 3) ? written(of("lr")) : `${written(of("lr"))}, ${rateText(of("lr"))}`],
      ["other values", of("nuisance") || null],
      ["seed", of("seed")],
      ["length", `${of("steps").toLocaleString("en-US")} steps, ${of("tokens").toLocaleString("en-US")} tokens`],
      ["parameters", of("parameters_total").toLocaleString("en-US")],
      ["wall time", `${durationText(of("wall_seconds"))}, ${Math.round(of("tokens_per_second")).toLocaleString("en-US")} tokens/s${of("members") > 1 ? `; its share of a stack of ${of("members")}` : ""}`],
      ["beyond the grid", of("role") || null],
    ];
    const sources = [["record", of("path")], ["config hash", of("config_hash")], ["commit", of("git_commit") ?? "none"], ["corpus hash", of("corpus_hash")], ["device", of("device")], ["versions", of("versions")], ["started", of("started_at")]];
    const yaml = configText(page.data.config, run);
    const file = `${String(of("cell")).split("/").at(-1) || "run"}.yaml`;
    const fit = `lit-mult fit --config ${/^[\w.\-=]+$/.test(file) ? file : `'${file.replaceAll("'", "'\\''")}'`}`;
    node.replaceChildren(
      h("header", {}, h("h2", {}, String(of("cell") || "run")), h("div", { class: "tools" }, previous, next, shut)),
      h("p", { class: "where" }, page.swatch(of("arm")), `${of("label")}, d = ${of("d_model")}`),
      list(facts),
      ...charts(run),
      h("h3", {}, "Repeat it"),
      command(fit),
      h("p", { class: "help" }, `with the config below as ${file}`, ...(of("study") && of("study") !== "compare" ? ["; as a cell of its study, which the study file or a shipped name gives: ", h("code", {}, `lit-mult sweep ${of("study")}`)] : [])),
      h("h3", {}, "Config"),
      h("div", { class: "tools" }, copyButton(() => yaml, "Copy the YAML"), h("button", { type: "button", class: "small", onclick: () => offer(file, yaml, "text/yaml") }, "Save")),
      h("pre", { tabindex: 0, "aria-label": "Config as YAML" }, yaml),
      h("h3", {}, "Where its numbers come from"),
      list(sources),
    );
    node.hidden = false;
    document.documentElement.classList.add("with-panel");
    node.scrollTop = 0;
    page.table.redraw();
    if (!node.contains(document.activeElement)) node.focus({ preventScroll: true });
  }

  function charts(run) {
    const data = page.data;
    const { runs, runCount } = data;
    const theme = page.theme();
    const arm = data.arms.find((one) => one.name === runs.arm[run]) ?? { colour: "#808080" };
    const alike = ["arm", "setting", "d_model", "lr", "nuisance"];
    const others = runs.cell.map((_, other) => other).filter((other) => other !== run && alike.every((name) => runs[name][other] === runs[name][run])).slice(0, 20);
    const width = Math.max(280, Math.min(560, Math.floor(node.clientWidth || 480) - 44));
    const points = ({ steps, values }) => steps.map((step, place) => [step, values[place]]);
    const [training, validation] = [page.curve(run), page.curve(runCount + run)];
    const marks = others.map((other) => ({ type: "line", points: points(page.curve(other)), colour: "#98a2b3", size: 0.8, opacity: 0.6 }));
    marks.push({ type: "line", points: points(training), colour: arm.colour, size: 1.6 });
    marks.push({ type: "dots", colour: arm.colour, size: 3, hollow: true, dots: points(validation).filter(([, loss]) => loss !== null).map(([x, y]) => ({ x, y, text: () => [] })) });
    const ends = training.values.slice(Math.floor(training.values.length / 20)).filter(Number.isFinite);
    const bounds = [Math.min(...ends, ...validation.values.slice(1).filter(Number.isFinite)), quantile(ends, 0.98)];
    const domain = ends.length ? [bounds[0] - 0.05 * (bounds[1] - bounds[0]) - 1e-6, bounds[1] + 0.1 * (bounds[1] - bounds[0]) + 1e-6] : undefined;
    const legend = [{ name: "training", colour: arm.colour }, { name: "validation", colour: arm.colour, shape: "dot", hollow: true }, ...(others.length ? [{ name: "other seeds", colour: "#98a2b3" }] : [])];
    const losses = { rows: [{ panels: [{ title: "Loss", x: { label: "step" }, y: { label: "nats per token", domain }, marks }], height: 220 }], legend, data: [] };
    const drawings = [draw(losses, width, theme, `Loss of ${runs.cell[run]} by step`).svg];
    const own = data.diagnostics.map((of, place) => ({ of, place: 2 * runCount + place })).filter(({ of }) => of[0] === run);
    if (own.length) {
      const panels = [...grouped(own.filter(({ of }) => of[1] === "norms" || !own.some((one) => one.of[1] === "norms")), ({ of }) => of[2])].map(([quantity, curves]) => {
        const roles = curves.map(({ of }) => of[3]);
        return { title: quantity.replaceAll("_", " "), x: { label: "step" }, y: { label: "mean of a role", log: curves.every(({ place }) => page.curve(place).values.every((value) => value > 0)) ? 10 : 0 }, marks: curves.map(({ of, place }) => ({ type: "line", points: points(page.curve(place)), colour: ROLE_COLOURS[roles.indexOf(of[3]) % ROLE_COLOURS.length], size: 1.3 })), roles };
      });
      const roles = unique(panels.flatMap((panel) => panel.roles));
      panels.forEach((panel) => panel.marks.forEach((mark, place) => (mark.colour = ROLE_COLOURS[roles.indexOf(panel.roles[place]) % ROLE_COLOURS.length])));
      const norms = { rows: [{ panels, height: 190 }], legend: roles.map((name, place) => ({ name, colour: ROLE_COLOURS[place % ROLE_COLOURS.length] })), data: [] };
      drawings.push(draw(norms, width, theme, `Diagnostics of ${runs.cell[run]} by step`).svg);
    }
    return drawings.map((svg) => h("div", { class: "canvas" }, svg));
  }

  function go(move) {
    open(page.table.neighbour(page.selected, move));
  }

  function close() {
    page.selected = null;
    node.hidden = true;
    document.documentElement.classList.remove("with-panel");
    page.table.redraw();
    if (opener?.isConnected) opener.focus({ preventScroll: true });
  }

  function keys(event) {
    if (event.key === "Escape") close();
    else if (event.target.tagName !== "PRE" && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      event.preventDefault();
      go(event.key === "ArrowRight" ? 1 : -1);
    }
  }

  return { node, open, close };
}

const ROLE_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080", "#9467bd", "#8c564b", "#17becf"];

/** The config of a run as YAML, from columns of paths and of values as YAML writes them. */
function configText({ paths, values }, run) {
  const tree = {};
  paths.forEach((path, place) => {
    if (values[place][run] === null) return; // the run has no such field
    let at = tree;
    for (const name of path.slice(0, -1)) at = at[name] ??= {};
    at[path.at(-1)] = values[place][run];
  });
  const key = (name) => (/^[A-Za-z_][\w.-]*$/.test(name) ? name : JSON.stringify(name));
  const lines = (node, indent) => Object.entries(node).flatMap(([name, value]) => (typeof value === "string" ? [`${indent}${key(name)}: ${value}`] : [`${indent}${key(name)}:`, ...lines(value, `${indent}  `)]));
  return `${lines(tree, "").join("\n")}\n`;
}

function command(text) {
  return h("div", { class: "command" }, h("code", {}, text), copyButton(() => text));
}

/** Names and values; those without a value are left out. */
function list(pairs) {
  return h("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
}

// The figures: from the report's numbers and what the reader has chosen to what `draw` draws.
//
// An arm or a seed that is off is left out; means and intervals (Student's t over seeds) are those of the rest. The best
// learning rate of an arm stays the one that all seeds chose.

/**
 * What a figure is built from.
 * @typedef {Object} View
 * @property {Object} data the report
 * @property {Set<string>} armsOff
 * @property {Set<number>} seedsOff
 * @property {boolean[]|null} matches for each run whether the filter takes it; null: no filter
 * @property {Object<string, boolean>} on the figure's options: x and y, for logarithmic axes, and smooth
 * @property {string} [choice] what to show, of a figure that has `choices`
 * @property {(place: number) => Curve} curve
 */

/**
 * Figures in their order. `options` are the switches that a figure has and where they stand at first: axes that can be
 * logarithmic, and curves that can be smoothed.
 * @type {Object<string, {title: string, caption: string, has: (data) => boolean, build: (view: View) => Figure, options: Object<string, boolean>, choices?: (data) => string[]}>}
 */
const FIGURES = {
  loss_vs_lr: {
    title: "Loss against learning rate",
    caption: "A dot a run, a line the mean over seeds with its 95 % interval, a star the interpolated optimum (hollow: one at the edge), a cross a diverged run, a triangle a run above the axis. Shaded are rates too low for noise and decay to balance before the run ends.",
    has: (data) => ratesOf(data).some((rates) => rates > 1),
    build: lossAgainstRate,
    options: { x: true, y: false },
  },
  sensitivity: {
    title: "Best loss and sensitivity",
    caption: "Best loss, and learning-rate sensitivity (arXiv:2309.14322 sec. 2.2): a dot a seed, means with 95 % intervals over seeds.",
    has: (data) => data.points.some((point) => point.best_loss !== null),
    build: bestAndSensitivity,
    options: { x: true, y: false },
  },
  optimum_drift: {
    title: "Drift of the optimum",
    caption: "Optimal learning rate against width; a dot a seed, hollow at the edge of the rates. Slope 0: the optimum transfers across widths. The slope is the mean over seeds of least-squares slopes, with its 95 % interval; it is doubtful where an optimum is at the edge or runs are missing.",
    has: (data) => [...grouped(withOptimum(data), (point) => JSON.stringify([point.arm, point.setting])).values()].some((points) => Number.isFinite(driftOf(points).mean)),
    build: optimumDrift,
    options: { x: true, y: true },
  },
  adam_vs_muon: {
    title: "AdamW against Muon",
    caption: "Best loss under both optimizers, and the difference at equal arm, width and seed: mean over seeds with its 95 % interval.",
    has: (data) => ["AdamW", "Muon"].every((name) => swept(data).some((point) => point.optimizer === name)),
    build: adamAgainstMuon,
    options: { x: true, y: false },
  },
  loss_vs_compute: {
    title: "Loss against compute",
    caption: "Best loss against the training FLOPs that one seed took: all runs of the search at that width and, in full, the tuning of the preset. A thin line leads from the search alone to search and tuning.",
    has: (data) => data.bill.some((row) => row.tuning_flops > 0 && row.total_flops !== null) && data.points.some((point) => point.best_loss !== null),
    build: lossAgainstCompute,
    options: { x: true, y: false },
  },
  scores: {
    title: "Downstream scores",
    caption: "Scores at the last checkpoint of the runs at the best rate, per cent, with 95 % intervals over seeds and items. They are computed in the report: seeds cannot be left out. Thin marks: chance.",
    has: (data) => data.scores.length > 0,
    build: downstreamScores,
    options: {},
  },
  curves: {
    title: "Training curves",
    caption: "Training loss at each arm's best learning rate: mean over seeds with its 95 % interval; smoothed, each point is the mean over a fortieth of the run around it.",
    has: (data) => data.points.some((point) => point.run !== null),
    build: trainingCurves,
    options: { x: false, y: false, smooth: true },
  },
  diagnostics: {
    title: "Diagnostics",
    caption: "What runs measured, by role: mean over the modules of the role and over seeds, with 95 % intervals.",
    has: (data) => data.diagnostics.length > 0,
    build: diagnosticsAlongSteps,
    options: { x: false, y: true },
    choices: (data) => unique(data.diagnostics.map(([, group, quantity]) => `${group}: ${quantity}`)),
  },
};

const LOSS = "validation loss (nats per token)";
const swept = (data) => data.points.filter((point) => !point.reference);
/** As `sensitivity.with_optimum`. */
const withOptimum = (data) => swept(data).filter((point) => point.lrs > 1 && point.optimum_lr !== null);
const where = (setting, width) => [setting, `d = ${width}`].filter(Boolean).join(", ");
const natural = (one, other) => String(one).localeCompare(String(other), "en", { numeric: true });
const spanText = ({ mean, low, high, n }, write = lossText) =>
  `${write(mean)}${Number.isFinite(low) ? ` [${write(low)}, ${write(high)}]` : ""}, ${plural(n, "seed")}`;

function ratesOf(data) {
  return [...grouped(data.rates, (row) => JSON.stringify([row.arm, row.setting, row.d_model])).values()].map((rows) => unique(rows.map((row) => row.lr)).length);
}

/** The rows of arms and seeds that are on. */
function shown(rows, view) {
  return rows.filter((row) => !view.armsOff.has(row.arm) && !(row.seed !== undefined && view.seedsOff.has(row.seed)));
}

function armsOf(view) {
  return view.data.arms.filter((arm) => !view.armsOff.has(arm.name));
}

function armEntries(view, rows) {
  const names = new Set(rows.map((row) => row.arm));
  return armsOf(view).filter((arm) => names.has(arm.name)).map((arm) => ({ name: arm.reference ? `${arm.name} (one lr)` : arm.name, colour: arm.colour, dashes: arm.dashes }));
}

function widthAxis(rows, log) {
  const ticks = ascending(rows.map((row) => row.d_model));
  const room = ticks.length === 1 ? { domain: [ticks[0] / 1.5, ticks[0] * 1.5] } : {};
  return { label: "width d", log: log ? 2 : 0, ticks, ...room };
}

/** Rows of one panel each as one row. */
function besideEachOther(rows) {
  return rows.every((row) => row.panels.length === 1) ? [{ panels: rows.flatMap((row) => row.panels), height: rows[0]?.height }] : rows;
}

/** Beside one another, so that arms do not cover each other: the shift along a logarithmic or linear axis of widths. */
const beside = (width, place, count, log) => (log ? width * 2 ** (0.05 * (place - (count - 1) / 2)) : width);

/** A dot of a run, for hovering and choosing. */
function runDot(view, run, x, y, more = []) {
  const text = () => {
    const of = (name) => view.data.runs[name][run];
    const known = [`${of("arm")}${of("setting") ? ` · ${of("setting")}` : ""}, d = ${of("d_model")}, seed ${of("seed")}`];
    known.push(`lr ${rateText(of("lr"))}${of("nuisance") ? `, ${of("nuisance")}` : ""}`);
    known.push(of("final_loss") === null ? of("status") : `final loss ${lossText(of("final_loss"))}`, ...more);
    known.push(`config ${of("config_hash")} · ${durationText(of("wall_seconds"))} · ${of("cell")}`);
    return known;
  };
  const [taken, left] = view.matches ? [view.matches[run], !view.matches[run]] : [false, false];
  return { x, y, run, picked: taken, faint: left, text };
}

function lossAgainstRate(view) {
  const rows = [];
  const data = [];
  const present = new Set();
  const rates = shown(view.data.rates, view);
  for (const [setting, ofSetting] of [...grouped(rates, (row) => row.setting)].sort(([one], [other]) => natural(one, other))) {
    const [low, high] = lossLimits(ofSetting.map((row) => row.loss));
    const panels = [...grouped(ofSetting, (row) => row.d_model)].sort(([one], [other]) => one - other).map(([width, here]) => {
      const marks = [];
      const balanced = view.data.balanced.find(([name, size]) => name === setting && size === width);
      if (balanced && view.on.x) marks.push({ type: "shade", from: 0, to: balanced[2] }), present.add("shade");
      armsOf(view).forEach((arm, line) => {
        const ofArm = here.filter((row) => row.arm === arm.name);
        if (ofArm.length) marks.push(...lossLine(view, arm, line, ofArm, setting, width, high, data, present));
      });
      return { title: where(setting, width), x: { label: "learning rate", log: view.on.x ? 2 : 0 }, y: { label: LOSS, log: view.on.y ? 10 : 0, domain: [low, high] }, marks };
    });
    rows.push({ panels, shared: true });
  }
  const marks = { star: { name: "optimum", shape: "star", colour: "#9aa3b2" }, hollow: { name: "optimum at the edge", shape: "star", hollow: true }, cross: { name: "diverged", shape: "cross" }, triangle: { name: "above the axis", shape: "triangle" }, shade: { name: "too short for the balance", shape: "shade" } };
  return { rows: besideEachOther(rows), legend: [...armEntries(view, rates), ...Object.keys(marks).filter((name) => present.has(name)).map((name) => marks[name])], data };
}

function lossLine(view, arm, line, rows, setting, width, high, data, present) {
  const finite = rows.filter((row) => row.loss !== null);
  const means = [...grouped(rows, (row) => row.lr)].sort(([one], [other]) => one - other).map(([lr, at]) => {
    const found = interval(at.filter((row) => row.loss !== null).map((row) => row.loss));
    // A rate at which a seed has no loss has no mean: the line breaks there instead of following the survivors.
    return { lr, ...found, mean: at.every((row) => row.loss !== null) ? found.mean : NaN };
  });
  for (const { lr, mean, low, high: top, n } of means) data.push({ arm: arm.name, setting, width, lr, loss: mean, low, high: top, seeds: n });
  if (arm.reference) {
    const mean = interval(finite.map((row) => row.loss)).mean;
    const dots = finite.map((row) => runDot(view, row.run, row.lr, row.loss));
    return [...(mean <= high ? [{ type: "rule", y: mean, colour: arm.colour, dashes: arm.dashes, size: 1.5 }] : []), { type: "dots", dots, colour: arm.colour, size: 2.2 }];
  }
  const { colour, dashes } = arm;
  const marks = [];
  const sampled = rows[0].sampled;
  const inside = finite.filter((row) => row.loss <= high);
  const seeds = inside.map((row) => runDot(view, row.run, row.lr, row.loss));
  if (!sampled) {
    marks.push({ type: "band", points: means.map(({ lr, low, high: top }) => [lr, low, top]), colour });
    marks.push({ type: "line", points: means.map(({ lr, mean }) => [lr, mean]), colour, dashes });
  }
  marks.push({ type: "dots", dots: seeds, colour, size: sampled ? 3 : 2, opacity: sampled ? 0.8 : 0.5 });
  if (!sampled) {
    const dots = means.filter(({ mean }) => mean <= high).map((found) => ({ x: found.lr, y: found.mean, text: () => [`${arm.name}, lr ${rateText(found.lr)}`, spanText(found)] }));
    marks.push({ type: "dots", dots, colour, size: 3.2 });
  }
  for (const [shape, chosen] of [["cross", rows.filter((row) => row.diverged)], ["triangle", finite.filter((row) => row.loss > high)]]) {
    if (!chosen.length) continue;
    present.add(shape);
    marks.push({ type: "dots", shape, colour, size: 3.5, dots: chosen.map((row) => ({ ...runDot(view, row.run, row.lr), top: line })) });
  }
  const optima = shown(view.data.points, view).filter((point) => point.arm === arm.name && point.setting === setting && point.d_model === width && point.optimum_lr !== null);
  if (optima.length) {
    const lr = 2 ** interval(optima.map((point) => Math.log2(point.optimum_lr))).mean;
    const loss = interval(optima.map((point) => point.optimum_loss)).mean;
    const hollow = optima.some((point) => point.at_edge);
    present.add(hollow ? "hollow" : "star");
    const text = () => [`${arm.name}: optimum at lr ${written(lr, 3)}`, `${lossText(loss)}, mean over ${plural(optima.length, "seed")}${hollow ? ", at the edge of the rates" : ""}`];
    marks.push({ type: "dots", shape: "star", colour, hollow, size: 7, dots: [{ x: lr, y: loss, text }] });
  }
  return marks;
}

/** Limits of a loss axis as in analysis/plots.py: all values, or where some lie far off, thrice as far as the median. */
function lossLimits(losses) {
  const values = losses.filter((loss) => loss !== null).sort((one, other) => one - other);
  if (!values.length) return [0, 1];
  const [low, middle, top] = [values[0], quantile(values, 0.5), values.at(-1)];
  const far = middle > low && top - low > 5 * (middle - low);
  const span = Math.max(far ? 3 * (middle - low) : top - low, 0.02);
  return [low - 0.08 * span, low + 1.2 * span];
}

const MEASURES = { best_loss: `best ${LOSS}`, sensitivity: "lr sensitivity (nats per token)" };
// How the dot of a run tells a measure; the best loss is its final one, which the dot tells anyway.
const TOLD = { sensitivity: "sensitivity", difference: "Muon − AdamW" };
const told = (measure, point) => (measure in TOLD ? [`${TOLD[measure]} ${lossText(point[measure])}`] : []);

function bestAndSensitivity(view) {
  const points = shown(view.data.points, view);
  const data = [];
  const rows = [];
  for (const measure of Object.keys(MEASURES)) {
    const known = points.filter((point) => point[measure] !== null);
    if (!known.length) continue;
    const settings = [...grouped(known, (point) => point.setting)].sort(([one], [other]) => natural(one, other));
    const wide = unique(known.map((point) => point.d_model)).length > 1;
    const panels = settings.map(([setting, here]) => (wide ? byWidth : byArm)(view, here, measure, setting, data));
    // An untuned reference far above would press the swept arms into one line: panels of arms have their own axis.
    rows.push({ panels, shared: wide, height: wide ? undefined : 96 + 24 * Math.max(...panels.map(({ y }) => y.names.length)) });
  }
  return { rows: besideEachOther(rows), legend: armEntries(view, points), data };
}

/** Means of a measure against width, a line an arm; `named` are further columns of the data. */
function byWidth(view, points, measure, title, data, { hollow = false, log = view.on.x, named = {} } = {}) {
  const arms = armsOf(view);
  const marks = arms.flatMap((arm, place) => {
    const ofArm = points.filter((point) => point.arm === arm.name);
    const means = [...grouped(ofArm, (point) => point.d_model)].sort(([one], [other]) => one - other).map(([width, here]) => ({ width, x: beside(width, place, arms.length, log), ...interval(here.map((point) => point[measure])) }));
    for (const { width, mean, low, high, n } of means) data.push({ arm: arm.name, setting: title, ...named, width, measure, mean, low, high, seeds: n });
    return [
      { type: "line", points: means.map(({ x, mean }) => [x, mean]), colour: arm.colour, dashes: hollow ? [5, 3] : arm.dashes },
      { type: "bars", points: means.map(({ x, low, high }) => [x, low, high]), colour: arm.colour },
      { type: "dots", colour: arm.colour, size: 1.8, opacity: 0.45, dots: ofArm.filter((point) => point.run !== null).map((point) => runDot(view, point.run, beside(point.d_model, place, arms.length, log), point[measure], told(measure, point))) },
      { type: "dots", colour: arm.colour, size: 3.4, hollow, dots: means.map((found) => ({ x: found.x, y: found.mean, text: () => [`${arm.name}, d = ${found.width}`, spanText(found)] })) },
    ];
  });
  return { title: title || "all runs", x: widthAxis(points, log), y: { label: MEASURES[measure] ?? measure, log: view.on.y ? 10 : 0 }, marks };
}

/** A measure of each arm, at the only width: arms below one another, as their names are long. */
function byArm(view, points, measure, title, data) {
  const arms = armsOf(view).filter((arm) => points.some((point) => point.arm === arm.name));
  const place = (name) => arms.length - arms.findIndex((arm) => arm.name === name);
  const marks = arms.flatMap((arm) => {
    const ofArm = points.filter((point) => point.arm === arm.name);
    const found = interval(ofArm.map((point) => point[measure]));
    data.push({ arm: arm.name, setting: title, width: ofArm[0].d_model, measure, mean: found.mean, low: found.low, high: found.high, seeds: found.n });
    return [
      { type: "hbars", points: [[place(arm.name), found.low, found.high]], colour: arm.colour, size: 1.6 },
      { type: "dots", colour: arm.colour, size: 2, opacity: 0.45, dots: ofArm.filter((point) => point.run !== null).map((point) => runDot(view, point.run, point[measure], place(arm.name), told(measure, point))) },
      { type: "dots", colour: arm.colour, size: 4, dots: [{ x: found.mean, y: place(arm.name), text: () => [arm.name, spanText(found)] }] },
    ];
  });
  const y = { label: "", ticks: arms.map((arm) => place(arm.name)), names: arms.map((arm) => arm.name) };
  return { title: title || "all runs", x: { label: MEASURES[measure], log: view.on.y ? 10 : 0 }, y, marks };
}

function optimumDrift(view) {
  const points = shown(withOptimum(view.data), view);
  const data = [];
  const panels = [...grouped(points, (point) => point.setting)].sort(([one], [other]) => natural(one, other)).map(([setting, here]) => {
    const arms = armsOf(view).filter((arm) => here.some((point) => point.arm === arm.name));
    const marks = arms.flatMap((arm, place) => {
      const ofArm = here.filter((point) => point.arm === arm.name);
      const drift = driftOf(ofArm);
      const { mean, low, high, n, trusted } = drift;
      if (n) data.push({ arm: arm.name, setting, slope: mean, low, high, seeds: n, trusted });
      const widths = ascending(ofArm.map((point) => point.d_model));
      const ends = [widths[0], widths.at(-1)];
      const means = [...grouped(ofArm, (point) => point.d_model)].map(([width, at]) => ({ width, lr: 2 ** interval(at.map((point) => Math.log2(point.optimum_lr))).mean, edge: at.some((point) => point.optimum_at_edge), n: at.length }));
      const x = (width) => beside(width, place, arms.length, view.on.x);
      const text = (found) => () => [`${arm.name}, d = ${found.width}: optimal lr ${written(found.lr, 3)}`, `${plural(found.n, "seed")}${found.edge ? ", at the edge of the rates" : ""}`, slopeText(drift)];
      return [
        ...(Number.isFinite(drift.mean) ? [{ type: "line", points: ends.map((width) => [width, 2 ** (drift.intercept + drift.mean * Math.log2(width))]), colour: arm.colour, dashes: arm.dashes }] : []),
        { type: "dots", colour: arm.colour, size: 1.8, opacity: 0.45, dots: ofArm.map((point) => (point.run === null ? { x: x(point.d_model), y: point.optimum_lr, text: () => [arm.name] } : runDot(view, point.run, x(point.d_model), point.optimum_lr, [`optimal lr ${written(point.optimum_lr, 3)}`]))) },
        ...[false, true].map((edge) => ({ type: "dots", colour: arm.colour, size: 3.6, hollow: edge, dots: means.filter((found) => found.edge === edge).map((found) => ({ x: x(found.width), y: found.lr, text: text(found) })) })),
      ];
    });
    return { title: setting || "all runs", x: widthAxis(here, view.on.x), y: { label: "optimal learning rate", log: view.on.y ? 2 : 0 }, marks };
  });
  return { rows: [{ panels, shared: true }], legend: armEntries(view, points), data };
}

function slopeText(drift) {
  if (!drift.n) return "no slope: no seed has an optimum at every width, of two or more";
  return `slope ${spanText(drift, (value) => value.toFixed(2))}${drift.trusted ? "" : " (doubtful)"}`;
}

/**
 * Slope of log2 lr against log2 width: mean over the seeds that have every width, with interval and intercept. It is
 * trusted as in `sensitivity.optimum_drift`: no optimum of these seeds is at the edge, and no runs are missing.
 */
function driftOf(points) {
  const widths = unique(points.map((point) => point.d_model));
  const whole = [...grouped(points, (point) => point.seed).values()].filter((seed) => seed.length === widths.length);
  if (widths.length < 2 || !whole.length) return { ...interval([]), intercept: NaN, trusted: false };
  const [x, y] = [(point) => Math.log2(point.d_model), (point) => Math.log2(point.optimum_lr)];
  const found = interval(whole.map((seed) => slope(seed.map(x), seed.map(y))));
  const all = whole.flat();
  const trusted = !all.some((point) => point.optimum_at_edge) && points.every((point) => point.complete);
  return { ...found, intercept: interval(all.map(y)).mean - found.mean * interval(all.map(x)).mean, trusted };
}

function adamAgainstMuon(view) {
  const points = shown(swept(view.data), view).filter((point) => point.best_loss !== null && ["AdamW", "Muon"].includes(point.optimizer));
  const data = [];
  const rows = [...grouped(points, (point) => point.variant)].sort(([one], [other]) => natural(one, other)).map(([variant, here]) => {
    const named = variant ? `, ${variant}` : "";
    const both = ["AdamW", "Muon"].map((name) => byWidth(view, here.filter((point) => point.optimizer === name), "best_loss", name, data, { hollow: name === "AdamW", named: { variant } }));
    const left = { ...both[0], title: `Best loss${named}`, x: widthAxis(here, view.on.x), marks: both.flatMap((panel) => panel.marks) };
    const differences = [...grouped(here.filter((point) => point.optimizer === "Muon"), (point) => JSON.stringify([point.arm, point.d_model, point.seed])).values()].flatMap(([muon]) => {
      const adam = here.find((point) => point.optimizer === "AdamW" && point.arm === muon.arm && point.d_model === muon.d_model && point.seed === muon.seed);
      return adam ? [{ ...muon, difference: muon.best_loss - adam.best_loss }] : [];
    });
    const right = byWidth({ ...view, on: { ...view.on, y: false } }, differences, "difference", "", data, { named: { variant } });
    right.marks.unshift({ type: "rule", y: 0 });
    return { panels: [left, { ...right, title: `Muon − AdamW${named}`, y: { label: "difference (nats per token)" } }] };
  });
  return { rows, legend: [...armEntries(view, points), { name: "AdamW", dashes: [5, 3], hollow: true }, { name: "Muon" }], data };
}

function lossAgainstCompute(view) {
  const bill = shown(view.data.bill, view).filter((row) => row.total_flops !== null && (!row.reference || row.tuning_flops > 0));
  const data = [];
  const points = shown(view.data.points, view);
  const panels = [...grouped(bill, (row) => row.setting)].sort(([one], [other]) => natural(one, other)).map(([setting, here]) => {
    const marks = armsOf(view).flatMap((arm) => {
      const line = here.filter((row) => row.arm === arm.name).map((row) => {
        const losses = points.filter((point) => point.arm === row.arm && point.setting === setting && point.d_model === row.d_model && point.best_loss !== null);
        return { ...row, ...interval(losses.map((point) => point.best_loss)) };
      }).filter((row) => Number.isFinite(row.mean)).sort((one, other) => one.total_flops - other.total_flops);
      for (const row of line) data.push({ arm: arm.name, setting, width: row.d_model, search_flops: row.search_flops, tuning_flops: row.tuning_flops, total_flops: row.total_flops, loss: row.mean, low: row.low, high: row.high, seeds: row.n });
      const dots = line.map((row) => ({ x: row.total_flops, y: row.mean, text: () => [`${arm.name}, d = ${row.d_model}`, `${written(row.total_flops, 3)} FLOPs${row.tuning_flops ? `, of it ${written(row.tuning_flops, 3)} tuning` : ""}`, spanText(row)] }));
      return [
        ...line.map((row) => ({ type: "line", points: [[row.search_flops, row.mean], [row.total_flops, row.mean]], colour: arm.colour, size: 0.8 })),
        { type: "line", points: line.map((row) => [row.total_flops, row.mean]), colour: arm.colour, dashes: arm.dashes },
        { type: "bars", points: line.map((row) => [row.total_flops, row.low, row.high]), colour: arm.colour },
        { type: "dots", dots, colour: arm.colour, size: 3.6 },
      ];
    });
    return { title: setting || "all runs", x: { label: "training FLOPs of a seed", log: view.on.x ? 10 : 0 }, y: { label: `best ${LOSS}`, log: view.on.y ? 10 : 0 }, marks };
  });
  return { rows: [{ panels, shared: true }], legend: armEntries(view, bill), data };
}

function downstreamScores(view) {
  const scores = shown(view.data.scores, view);
  const data = scores.map(({ suite, label, d_model, task, value, low, high, seeds }) => ({ suite, line: label, width: d_model, task, value, low, high, seeds }));
  const settings = unique(scores.map((row) => row.setting));
  const share = (value) => (value === null ? null : 100 * value);
  const percent = (value) => share(value).toFixed(1);
  const spread = ({ low, high }) => (low === null || high === null ? ", no interval" : ` [${percent(low)}, ${percent(high)}]`);
  const panels = [...grouped(scores, (row) => JSON.stringify([row.suite, row.d_model]))].map(([key, here]) => {
    const [suite, width] = JSON.parse(key);
    const tasks = unique(here.map((row) => row.task));
    const lines = unique(here.map((row) => row.label));
    const y = (row) => tasks.length - tasks.indexOf(row.task) - 0.7 * ((lines.indexOf(row.label) + 0.5) / lines.length - 0.5);
    const marks = [{ type: "dots", shape: "diamond", size: 2, hollow: true, dots: [...grouped(here, (row) => row.task).values()].filter(([row]) => row.chance !== null).map(([row]) => ({ x: share(row.chance), y: tasks.length - tasks.indexOf(row.task), text: () => [`${row.task}: chance ${percent(row.chance)} %`] })) }];
    for (const arm of armsOf(view)) {
      for (const setting of settings) {
        const line = here.filter((row) => row.arm === arm.name && row.setting === setting && row.value !== null);
        marks.push({ type: "hbars", colour: arm.colour, points: line.map((row) => [y(row), share(row.low), share(row.high)]) });
        marks.push({ type: "dots", colour: arm.colour, size: 3.2, hollow: settings.indexOf(setting) % 2 === 0 && settings.length > 1, dots: line.map((row) => ({ x: share(row.value), y: y(row), text: () => [`${row.label}, ${row.task}`, `${percent(row.value)} %${spread(row)}, ${plural(row.seeds, "seed")}`] })) });
      }
    }
    return { title: `${suite}, d = ${width}`, x: { label: "score (per cent)" }, y: { label: "", ticks: tasks.map((_, place) => tasks.length - place), names: tasks }, marks };
  });
  const rowsOf = Math.max(...panels.map((panel) => panel.y.names.length), 1);
  const lines = Math.max(1, unique(scores.map((row) => row.label)).length);
  const hollow = settings.length > 1 ? settings.slice(0, 2).map((name, place) => ({ name, hollow: place === 0 })) : [];
  return { rows: panels.map((panel) => ({ panels: [panel], height: 90 + rowsOf * Math.max(22, 7 * lines) })), legend: [...armEntries(view, scores), ...hollow, { name: "chance", shape: "diamond", hollow: true }], data };
}

/** Mean with interval at each step that all of these curves reach. */
function meanCurve(curves) {
  const steps = curves.reduce((shortest, curve) => (curve.steps.length < shortest.length ? curve.steps : shortest), curves[0].steps);
  return steps.map((step, place) => ({ step, ...interval(curves.filter((curve) => curve.steps[place] === step && curve.values[place] !== null).map((curve) => curve.values[place])) }));
}

/** Each point as the mean over a fortieth of the curve around it. */
function smoothed({ steps, values }) {
  const reach = Math.ceil(values.length / 80);
  const [sums, counts] = [[0], [0]]; // of the values before a place
  values.forEach((value, place) => {
    sums.push(sums[place] + (value ?? 0));
    counts.push(counts[place] + (value !== null));
  });
  const mean = (from, to) => (sums[to] - sums[from]) / (counts[to] - counts[from]);
  const around = (place) => mean(Math.max(0, place - reach), Math.min(values.length, place + reach + 1));
  return { steps, values: values.map((value, place) => (value === null ? null : around(place))) };
}

function curveMarks(means, arm, name, dashes) {
  return [
    { type: "band", points: means.map(({ step, low, high }) => [step, low, high]), colour: arm.colour },
    { type: "line", points: means.map(({ step, mean }) => [step, mean]), colour: arm.colour, dashes, size: 1.5 },
    { type: "dots", colour: arm.colour, size: 1, opacity: 0, dots: means.map((found) => ({ x: found.step, y: found.mean, text: () => [`${name}, step ${found.step.toLocaleString("en-US")}`, spanText(found, (value) => written(value, 4))] })) },
  ];
}

function trainingCurves(view) {
  const points = shown(view.data.points, view).filter((point) => point.run !== null);
  const data = [];
  const rows = [...grouped(points, (point) => point.setting)].sort(([one], [other]) => natural(one, other)).map(([setting, ofSetting]) => {
    const panels = [...grouped(ofSetting, (point) => point.d_model)].sort(([one], [other]) => one - other).map(([width, here]) => {
      const ends = [];
      const marks = armsOf(view).flatMap((arm) => {
        const ofArm = here.filter((point) => point.arm === arm.name);
        if (!ofArm.length) return [];
        const curves = ofArm.map((point) => view.curve(point.run));
        const means = meanCurve(view.on.smooth ? curves.map(smoothed) : curves).filter(({ step }) => !view.on.x || step > 0);
        ends.push(...means.slice(Math.floor(means.length / 10)).map(({ mean }) => mean).filter(Number.isFinite));
        for (const { step, mean, low, high, n } of means) data.push({ arm: arm.name, setting, width, step, loss: mean, low, high, seeds: n });
        return curveMarks(means, arm, arm.name, arm.dashes);
      });
      // The start is steep and the same for all: the axis is for what follows.
      const [low, high] = [Math.min(...ends), quantile(ends, 0.97)];
      const domain = ends.length ? [low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-6] : undefined;
      return { title: where(setting, width), x: { label: "step", log: view.on.x ? 10 : 0 }, y: { label: "training loss (nats per token)", log: view.on.y ? 10 : 0, domain }, marks };
    });
    return { panels };
  });
  return { rows: besideEachOther(rows), legend: armEntries(view, points), data };
}

function diagnosticsAlongSteps(view) {
  const runs = view.data.runs;
  const first = 2 * view.data.runCount;
  const [group, quantity] = view.choice.split(": ");
  const chosen = view.data.diagnostics.map(([run, ...of], place) => ({ run, of, place: first + place, arm: runs.arm[run], seed: runs.seed[run] })).filter(({ of }) => of[0] === group && of[1] === quantity);
  const readings = shown(chosen, view);
  const data = [];
  const lineOf = ({ run }) => [runs.setting[run], `d = ${runs.d_model[run]}`, `lr ${rateText(runs.lr[run])}`, runs.nuisance[run]].filter(Boolean).join(", ");
  const lines = unique(chosen.map(lineOf));
  const looks = [[], [5, 2], [2, 2], [6, 2, 1, 2], [1, 3]];
  const panels = [...grouped(readings, ({ of }) => of[2])].map(([role, here]) => {
    const marks = armsOf(view).flatMap((arm) => [...grouped(here.filter((reading) => reading.arm === arm.name), lineOf)].flatMap(([line, of]) => {
      const means = meanCurve(of.map(({ place }) => view.curve(place))).filter(({ step, mean }) => (!view.on.x || step > 0) && (!view.on.y || mean > 0));
      for (const { step, mean, low, high, n } of means) data.push({ role, quantity, arm: arm.name, line, step, mean, low, high, seeds: n });
      return curveMarks(means, arm, `${arm.name}, ${line}`, looks[lines.indexOf(line) % looks.length]);
    }));
    return { title: role, x: { label: "step", log: view.on.x ? 10 : 0 }, y: { label: quantity.replaceAll("_", " "), log: view.on.y ? 10 : 0 }, marks };
  });
  const named = lines.length > 1 ? lines.slice(0, 5).map((name, place) => ({ name, dashes: looks[place], colour: "#808080" })) : [];
  return { rows: [{ panels, height: 200 }], legend: [...armEntries(view, readings), ...named], data };
}

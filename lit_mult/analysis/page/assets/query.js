// The run picker: `vectors lr<0.01 seed=0|1 -diverged` takes the runs that meet all terms.
//
// A term is text that some column contains, or FIELD with =, !=, <, <=, >, >= or ~ (contains) and a value, or several
// with | between them; - before a term takes what does not meet it. "..." keeps spaces; 2^-6 is a number.

const SHORT = { loss: "final_loss", width: "d_model", d: "d_model", time: "wall_seconds", wall: "wall_seconds", name: "cell", run: "cell", commit: "git_commit", hash: "config_hash", speed: "tokens_per_second", parameters: "parameters_total", bpb: "final_bits_per_byte" };
const SEARCHED = ["cell", "label", "status", "role", "nuisance", "config_hash"];

/**
 * @param {string} text
 * @param {Object<string, any[]>} runs columns
 * @returns {{test: (run: number) => boolean, problem: string}} the problem is "" for a query that makes sense
 */
function query(text, runs) {
  const terms = text.match(/(?:[^\s"]+|"[^"]*")+/g) ?? [];
  const tests = [];
  for (const written of terms) {
    const negated = written.length > 1 && written[0] === "-" && !/^-[\d.]/.test(written);
    const term = (negated ? written.slice(1) : written).replaceAll('"', "");
    const parts = /^([\w.]+)(!=|<=|>=|=|<|>|~)(.*)$/.exec(term);
    const test = parts ? fieldTest(parts, runs) : textTest(term.toLowerCase(), runs);
    if (typeof test === "string") return { test: () => true, problem: test };
    tests.push(negated ? (run) => !test(run) : test);
  }
  return { test: (run) => tests.every((test) => test(run)), problem: "" };
}

function fieldTest([, written, sign, wanted], runs) {
  const name = SHORT[written] ?? (written in runs ? written : Object.keys(runs).find((one) => one.endsWith(`.${written}`)));
  if (!name) return `no field ${written}; there are ${[...Object.keys(SHORT), ...Object.keys(runs)].join(", ")}`;
  if (!wanted) return `${written}${sign} needs a value`;
  const values = runs[name];
  const choices = wanted.split("|").map((one) => ({ text: one.toLowerCase(), number: numeral(one) }));
  const same = (value, { text, number }) => (typeof value === "number" && number !== null ? Math.abs(value - number) <= 1e-6 * Math.abs(number) : String(value).toLowerCase() === text);
  const compare = { "<": (one, other) => one < other, "<=": (one, other) => one <= other, ">": (one, other) => one > other, ">=": (one, other) => one >= other }[sign];
  if (compare) {
    if (choices.some(({ number }) => number === null)) return `${written}${sign} needs a number, not ${wanted}`;
    return (run) => values[run] !== null && choices.some(({ number }) => compare(values[run], number));
  }
  if (sign === "~") return (run) => choices.some(({ text }) => String(values[run]).toLowerCase().includes(text));
  const equal = (run) => choices.some((choice) => same(values[run], choice));
  return sign === "=" ? equal : (run) => !equal(run);
}

function textTest(wanted, runs) {
  // The text of a run is put together once, not for each letter that is typed.
  const texts = (runs[SEARCHED_TEXT] ??= runs.cell.map((_, run) => SEARCHED.map((name) => runs[name]?.[run] ?? "").join(" ").toLowerCase()));
  return (run) => texts[run].includes(wanted);
}

const SEARCHED_TEXT = Symbol("text of each run");

function numeral(text) {
  const power = /^(-?[\d.]+)\^(-?[\d.]+)$/.exec(text);
  const value = power ? Number(power[1]) ** Number(power[2]) : Number(text);
  return text !== "" && Number.isFinite(value) ? value : null;
}

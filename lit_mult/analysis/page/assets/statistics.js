// The statistics of analysis/seeds.py, over the seeds that are on.

/** Quantiles of Student's t at 0.975 for 1, 2, ... degrees of freedom, from the report. */
let quantiles = [];

/** @returns {{mean: number, low: number, high: number, n: number}} with a 95 % interval; NaN for fewer than two values */
function interval(values) {
  const n = values.length;
  const mean = n ? values.reduce((sum, value) => sum + value, 0) / n : NaN;
  if (n < 2 || !Number.isFinite(mean) || n - 2 >= quantiles.length) return { mean, low: NaN, high: NaN, n };
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const reach = quantiles[n - 2] * Math.sqrt(squares / (n - 1) / n);
  return { mean, low: mean - reach, high: mean + reach, n };
}

/** Least-squares slope of y against x. */
function slope(x, y) {
  const middle = x.reduce((sum, value) => sum + value, 0) / x.length;
  const along = x.map((value) => value - middle);
  const squares = along.reduce((sum, value) => sum + value * value, 0);
  return along.reduce((sum, value, place) => sum + value * y[place], 0) / squares;
}

function quantile(values, level) {
  const sorted = values.filter(Number.isFinite).sort((one, other) => one - other);
  if (!sorted.length) return NaN;
  const place = level * (sorted.length - 1);
  const below = sorted[Math.floor(place)];
  return below + (place % 1) * (sorted[Math.ceil(place)] - below);
}

/** @returns {Map<any, any[]>} value of key(row) -> rows, in their order */
function grouped(rows, key) {
  const groups = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return groups;
}

const unique = (values) => [...new Set(values)];
const ascending = (values) => unique(values).sort((one, other) => one - other);

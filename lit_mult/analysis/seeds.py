"""Statistics over seeds: paired differences, slopes, and means with intervals by Student's t.

Scales are averaged as natural logarithms, in a column `log`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lit_mult.errors import UserError

Floats = NDArray[np.float64]


def t_quantile(level: float, freedom: float) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import stdtrit  # a tenth of a second of import, and much less than scipy.stats

    return float(stdtrit(freedom, level))


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval by Student's t: NaN for fewer than two or non-finite values."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2 or not np.isfinite(x).all():
        return mean, math.nan, math.nan
    reach = t_quantile(0.975, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - reach, mean + reach


def p_value(values: ArrayLike) -> float:
    """Two-sided p value of Student's t test that independent values have mean 0; NaN where there is no interval."""
    from scipy.special import stdtr

    x = np.asarray(values, dtype=float)
    if len(x) < 2 or not np.isfinite(x).all():
        return math.nan
    mean, stderr = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x))
    if stderr == 0:
        return float(mean == 0)
    return 2 * float(stdtr(len(x) - 1, -abs(mean) / stderr))


def holm(p_values: ArrayLike) -> Floats:
    """p values of tests made together, adjusted by Holm's step-down rule (1979, Scand. J. Stat. 6(2)); NaN stays.

    Calling those of 0.05 and less differences is wrong about any of them at most 5 % of the time.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def means_over_seeds(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """A row for each combination of the columns `by`: mean of `value` over its rows (one a seed), low, high, seeds."""
    groups = table.groupby(list(by), sort=False)[value]
    made = [(*key, *mean_interval(group), len(group)) for key, group in groups]
    return pd.DataFrame(made, columns=[*by, value, "low", "high", "seeds"])


def means_along_steps(table: pd.DataFrame, line: Sequence[str], value: str) -> pd.DataFrame:
    """`means_over_seeds` at each step, of lines that the columns `line` name, as far as all seeds of a line came."""
    means = means_over_seeds(table, [*line, "step"], value)
    return means[means["seeds"] == means.groupby(list(line))["seeds"].transform("max")]


def geometric_means(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by`, value, low, high and seeds: geometric mean over seeds of the scale, 95 % interval of its log."""
    means = means_over_seeds(table, by, "log").rename(columns={"log": "value"})
    means[["value", "low", "high"]] = np.exp(means[["value", "low", "high"]])
    return means


def mean_logs(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by` and log, a row for each combination: mean of log, NaN where one is (a diverged run)."""
    return table.groupby(list(by), sort=False)["log"].agg(lambda logs: logs.mean(skipna=False)).reset_index()


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of y against x, which has two different values at the least; NaN where a y is."""
    along = np.asarray(x, dtype=float)
    along = along - along.mean()
    return float(along @ np.asarray(y, dtype=float) / (along @ along))


def slopes(table: pd.DataFrame, by: Sequence[str], x: str) -> pd.DataFrame:
    """Columns `by` and slope, a row for each combination: least-squares slope of log against column x.

    A combination with a single x has no slope and no row.
    """
    fitted = table[table.groupby(list(by))[x].transform("nunique") > 1].groupby(list(by), sort=False)
    return pd.DataFrame([(*key, slope(group[x], group["log"])) for key, group in fitted], columns=[*by, "slope"])


def of_like_seeds(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """Rows of the seeds that have the same values of column x: the largest such set, of equals that of most seeds."""
    sets = {seed: frozenset(values) for seed, values in table.groupby("seed")[x]}
    counts = Counter(sets.values())
    common = max(counts, key=lambda values: (len(values), counts[values]), default=frozenset())
    return table[table["seed"].isin([seed for seed, values in sets.items() if values == common])]


def paired(
    table: pd.DataFrame, of: str, against: str, by: Sequence[str], value: str, *, between: str = "arm"
) -> pd.DataFrame:
    """`value` in the rows of `of` minus that in the rows of `against`, of column `between`, at equal `by`.

    A row for each combination of the columns `by`, the seed among them, that both have; the NaN of a run that diverged
    stays.

    Raises:
        UserError: rows are not one for each combination, as the study varies something else, too.
    """
    first, second = (table[table[between] == name] for name in (of, against))
    if first.duplicated(list(by)).any() or second.duplicated(list(by)).any():
        raise UserError(f"{of} and {against}: several runs at equal {', '.join(by)}, so that nothing pairs them")
    both = first.merge(second, on=list(by), suffixes=("", "_against"))
    return both[list(by)].assign(**{value: both[value] - both[f"{value}_against"]})


def difference(table: pd.DataFrame, of: str, against: str, value: str, *, between: str = "arm") -> pd.Series:
    """`paired` where nothing but the seed varies: seed -> difference."""
    return paired(table, of, against, ["seed"], value, between=between).set_index("seed")[value]


def at_best(losses: pd.DataFrame, among: pd.DataFrame | None = None) -> pd.Series:
    """Loss of each seed at the value, one for all seeds, that has the lowest mean loss over them.

    Choosing for each seed by itself would favour the flatter curve. Choosing on the other seeds than the judged one
    would have no bias, but these losses depend on each other, so that t intervals cover too little:
    `benchmarks/interval_coverage.py`.

    Args:
        losses: a row a seed and a column a value, such as a learning rate.
        among: the losses to choose by, where they are not the same; a value with a diverged run is not chosen.

    Returns:
        Seed -> loss; NaN where there is no value to choose.
    """
    means = (losses if among is None else among).mean(skipna=False).dropna()
    best = means.idxmin() if len(means) else None
    return losses[best] if best in losses.columns else pd.Series(math.nan, losses.index)

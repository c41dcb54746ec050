"""How scales depend on layer, width or arm: their natural logarithms, as scales multiply.

Tables here have a column `log`, the logarithm of a scale; differences and slopes are taken within a seed, so that
their spread over seeds gives the interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lit_mult.analysis.verdict import means_over_seeds


def averaged(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by` and log, a row for each combination: mean of log, NaN where one is (a diverged run)."""
    return table.groupby(list(by), sort=False)["log"].agg(lambda logs: logs.mean(skipna=False)).reset_index()


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of y against x, which has two different values at the least."""
    along = np.asarray(x, dtype=float)
    along = along - along.mean()
    return float(along @ np.asarray(y, dtype=float) / (along @ along))


def slopes(table: pd.DataFrame, by: Sequence[str], x: str) -> pd.DataFrame:
    """Columns `by` and slope, a row for each combination: least-squares slope of log against column x.

    NaN where a log is (a diverged run); a combination with a single x has no slope and no row.
    """
    fitted = table[table.groupby(list(by))[x].transform("nunique") > 1]
    made = [(*key, slope(group[x], group["log"])) for key, group in fitted.groupby(list(by), sort=False)]
    return pd.DataFrame(made, columns=[*by, "slope"])


def of_like_seeds(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """Rows of the seeds that have the same values of column x: the largest such set, of equals that of most seeds."""
    sets = {seed: frozenset(values) for seed, values in table.groupby("seed")[x]}
    counts = Counter(sets.values())
    common = max(counts, key=lambda values: (len(values), counts[values]), default=frozenset())
    return table[table["seed"].isin([seed for seed, values in sets.items() if values == common])]


def geometric_means(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by`, value, low, high and seeds: geometric mean over seeds of the scale, 95 % interval of its log."""
    means = means_over_seeds(table, by, "log").rename(columns={"log": "value"})
    means[["value", "low", "high"]] = np.exp(means[["value", "low", "high"]])
    return means

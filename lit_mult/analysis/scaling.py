"""How scales depend on layer, width or arm: their natural logarithms, as scales multiply.

Tables here have a column `log`, the logarithm of a scale; differences and slopes are taken within a seed, so that
their spread over seeds gives the interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lit_mult.analysis.bootstrap import slope_interval
from lit_mult.analysis.verdict import means_over_seeds


def averaged(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by` and log, a row for each combination: mean of log, NaN where one is (a diverged run)."""
    return table.groupby(list(by), sort=False)["log"].agg(lambda logs: logs.mean(skipna=False)).reset_index()


def slopes(table: pd.DataFrame, by: Sequence[str], x: str) -> pd.DataFrame:
    """Columns `by` and slope, a row for each combination: least-squares slope of log against column x.

    NaN where a log is (a diverged run); a combination with a single x has no slope and no row.
    """
    fitted = table[table.groupby(list(by))[x].transform("nunique") > 1]
    made = [
        (*key, slope_interval(group[x], group["log"], np.zeros(len(group)))[0])
        for key, group in fitted.groupby(list(by), sort=False)
    ]
    return pd.DataFrame(made, columns=[*by, "slope"])


def geometric_means(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Columns `by`, value, low, high and seeds: geometric mean over seeds of the scale, 95 % interval of its log."""
    means = means_over_seeds(table, by, "log").rename(columns={"log": "value"})
    means[["value", "low", "high"]] = np.exp(means[["value", "low", "high"]])
    return means

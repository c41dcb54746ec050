"""Curves of a measure against the scale S = sqrt(lr / weight_decay) of some matrices, and statistics of them.

With lr * weight_decay = c, S = lr / sqrt(c): S over that at a factor of 1 is the factor of the learning rate. A *curve*
is a measure of an arm, a row a seed and a column a scale; a statistic of a curve is a value a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from lit_mult.analysis.experiments.evidence import Evidence
from lit_mult.errors import UserError

LOSS = "final_loss"


def scale(factor: float | str) -> float:
    """S of a run, from the factor of its learning rate: a number, or JSON of roles with equal numbers.

    Raises:
        UserError: the factors of the roles differ, so that their matrices have no S in common.
    """
    factors = {float(value) for value in json.loads(factor).values()} if isinstance(factor, str) else {float(factor)}
    if len(factors) != 1:
        raise UserError(f"factors of the learning rate {factor}: must be equal, as their matrices share one scale")
    return factors.pop()


def points(evidence: Evidence, factor: str, measured: pd.DataFrame) -> pd.DataFrame:
    """A row a run: cell, optimizer, arm, scale, seed, final_loss, and the columns of `measured`, whose index is cell.

    All measures of a run that diverged are NaN: where it ended says nothing about its end.
    """
    runs = evidence.runs.assign(scale=evidence.runs[factor].map(scale))
    table = runs[["cell", "optimizer", "arm", "scale", "seed", LOSS]].merge(
        measured, how="left", left_on="cell", right_index=True
    )
    table[measured.columns] = table[measured.columns].where(table[LOSS].notna())
    return table.sort_values("scale", kind="stable", ignore_index=True)


def curve(table: pd.DataFrame, measure: str, **where: str) -> pd.DataFrame:
    """Values by seed and scale; a seed that lacks a run is left out, a run that diverged is NaN."""
    scales = sorted(table["scale"].unique())
    for column, value in where.items():
        table = table[table[column] == value]
    complete = table.groupby("seed")["scale"].transform("size") == len(scales)
    return table[complete].pivot(index="seed", columns="scale", values=measure).reindex(columns=scales).astype(float)


def best_other(losses: pd.DataFrame, at: float) -> float:
    """Scale of the lowest mean over seeds, but `at` and those with a diverged run; NaN where there is none."""
    means = losses.drop(columns=at).mean(skipna=False).dropna()
    return float(means.index.to_numpy(float)[means.argmin()]) if len(means) else math.nan


def rise(losses: pd.DataFrame, at: float) -> pd.Series:
    """Loss at a scale minus that at the best of the others, nats per token: below 0 where `at` is the best of all."""
    best = best_other(losses, at)
    return losses[at] - (math.nan if math.isnan(best) else losses[best])


def share(of: pd.Series, whole: pd.Series) -> pd.Series:
    """of / whole at the seeds that both have; NaN where the whole is not above 0, as nothing has a share in that."""
    of, whole = of.align(whole, join="inner")
    return (of / whole).where(whole > 0)


def slope(values: pd.DataFrame) -> pd.Series:
    """Least-squares slope of log value against log scale."""
    x = np.log(values.columns.to_numpy(float))
    x = x - x.mean()
    fitted: pd.Series = np.log(values) @ x / (x @ x)
    return fitted


def level(ratios: pd.DataFrame) -> pd.Series:
    """Geometric mean over the scales."""
    return pd.Series(np.exp(np.log(ratios.to_numpy(float)).mean(axis=1)), index=ratios.index)


def slopes(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """`slope` of every curve: optimizer, arm, measure, from_scale (smallest scale of the fit), seed, slope."""
    return by_seed(table, measures, slope, "slope", from_scale=table["scale"].min())


def by_seed(
    table: pd.DataFrame,
    measures: Sequence[str],
    statistic: Callable[[pd.DataFrame], pd.Series],
    name: str,
    **columns: float,
) -> pd.DataFrame:
    """A statistic of every curve of some measures: optimizer, arm, measure, the given columns, seed and its name."""
    found = []
    for place, _ in curves(table, measures):
        values = statistic(curve(table, place["measure"], optimizer=place["optimizer"], arm=place["arm"]))
        found += [{**place, **columns, "seed": seed, name: value} for seed, value in values.items()]
    return pd.DataFrame(found, columns=["optimizer", "arm", "measure", *columns, "seed", name])


def curves(table: pd.DataFrame, measures: Sequence[str]) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Optimizer, arm and measure of each curve, and its runs; an arm without scalars has no curves of scalars."""
    for (optimizer, arm), runs in table.groupby(["optimizer", "arm"]):
        for measure in measures:
            if runs[measure].notna().any():
                yield {"optimizer": str(optimizer), "arm": str(arm), "measure": measure}, runs

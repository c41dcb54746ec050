"""Curves of a measure against the scale S = sqrt(lr / weight_decay) of some matrices, and statistics of them.

With lr * weight_decay = c, S = lr / sqrt(c): S over that at a factor of 1 is the factor of the learning rate. A *curve*
is a measure of an arm, a row a seed and a column a scale; a statistic of a curve is a value a seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from lit_mult.analysis import scaling
from lit_mult.analysis.experiments.evidence import Evidence
from lit_mult.analysis.verdict import BELOW_0, Verdict, best_elsewhere, judge
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


def rise(losses: pd.DataFrame, at: float) -> pd.Series:
    """Loss at a scale minus that at the best of the others, nats per token: below 0 where `at` is the best of all.

    The best is chosen on the other seeds, so that a flat curve rises by 0 on average; NaN for a single seed. Of no seed
    where there is a single scale.
    """
    others = losses.drop(columns=at)
    return losses[at] - best_elsewhere(others) if len(others.columns) else pd.Series(dtype=float)


def judge_share(claim: str, statistic: str, of: pd.Series, whole: pd.Series, share: float) -> Verdict:
    """The verdict on a claim that one rise is less than a share of another, of - share * whole < 0, seed by seed.

    Where the other is no rise, the runs do not test it.
    """
    of, whole = of.align(whole, join="inner")
    return judge(claim, statistic, of - share * whole, BELOW_0, tested=not whole.mean() <= 0)


def slope(values: pd.DataFrame) -> pd.Series:
    """Least-squares slope of log value against log scale; of no seed where there is a single scale."""
    if values.shape[1] < 2:
        return pd.Series(dtype=float)
    along = np.log(values.columns.to_numpy(float))
    return pd.Series({seed: scaling.slope(along, np.log(row)) for seed, row in values.iterrows()}, dtype=float)


def typical_factor(ratios: pd.DataFrame) -> pd.Series:
    """Typical factor between a ratio and 1 over the scales, exp(mean |ln ratio|): above and below do not cancel."""
    return pd.Series(np.exp(np.abs(np.log(ratios.to_numpy(float))).mean(axis=1)), index=ratios.index)


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

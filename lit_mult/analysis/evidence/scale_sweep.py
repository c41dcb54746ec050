"""What studies that vary the scale S = sqrt(lr / weight_decay) of some matrices share: statistics, tables, panels.

With lr * weight_decay = c, S = lr / sqrt(c): S over that at a factor of 1 is the factor of the learning rate. A *curve*
is a measure of an arm, a row a seed and a column a scale; a statistic of a curve is a value a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Axes, Styles, against_width, beside, draw_means, mark_at_top
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name, rows
from lit_mult.analysis.seeds import at_best, geometric_means, means_over_seeds, slope
from lit_mult.analysis.tables import interval, number, signed, spanned
from lit_mult.analysis.verdict import BELOW_0, Verdict, judge
from lit_mult.errors import UserError

LOSS = "final_loss"
_HOW_TO_READ = """\
- S is the scale sqrt(lr / weight decay) of the matrices over that at a factor of 1 of their learning rate; their
  lr x weight decay is the same in every run.
- A *rise* is the loss at an end of the scales minus that at the best of the other scales, which is the one of the
  lowest mean over the seeds, one scale for all of them.
- A *slope* is that of log value against log S by least squares, 0 for what does not depend on S and 1 for what is
  proportional to it. A *noise factor* is the typical factor between a norm and that of the Brownian reference,
  exp(mean |ln(norm / noise)|) over scales (and matrices): 1 for noise, more for what lies above it or below it.
- Means over seeds are geometric but for losses, rises, slopes and noise factors.
"""


def findings(table: pd.DataFrame, fits: pd.DataFrame, ratios: Sequence[str]) -> Findings:
    """What every such study has to say, from its points, its `slopes` and columns of ratios to noise."""
    ends = (float(table["scale"].min()), float(table["scale"].max()))
    rises = pd.concat([by_seed(table, [LOSS], partial(rise, at=at), "rise", at=at) for at in ends], ignore_index=True)
    factors = by_seed(table, ratios, typical_factor, "factor")
    extremes = list(_extremes(rises))
    return Findings(
        tables={"points": table, "rises": rises, "slopes": fits, "noise_factors": factors},
        display_tables={
            "rises": _display(rises, "rise"),
            "slopes": _display(fits, "slope"),
            "noise_factors": _display(factors, "factor"),
            "means": _display_means(table),
        },
        statements={"Loss at the extremes": extremes} if extremes else {},
        warnings=list(_warnings(table)),
        how_to_read=_HOW_TO_READ,
        unit="Losses and rises in nats per token; slopes and noise factors have no unit",
    )


def against_scale(ax: Axes, scales: pd.Series) -> None:
    """Make the x axis log2 with a tick at each scale."""
    against_width(ax, scales)
    ax.xaxis.set_major_formatter("{x:g}")


def draw(ax: Axes, table: pd.DataFrame, measure: str, styles: Styles, look: Mapping[str, Any] | None = None) -> None:
    """`means` against S with 95 % intervals, a line an arm; crosses at the top where losses diverged."""
    for nth, (arm, line) in enumerate(table.groupby("arm", sort=False)):
        points, style = means(line, measure), styles[str(arm)]
        draw_means(ax, beside(points["scale"], str(arm), styles), points, measure, {**style, **(look or {})})
        diverged = line.loc[line[LOSS].isna() & (measure == LOSS), "scale"].to_numpy(float)
        mark_at_top(ax, diverged, 0.97 - 0.06 * nth, style["color"])


def means(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Means over seeds at every scale with their interval; of what is no loss, geometric: scales multiply."""
    if measure == LOSS:
        return means_over_seeds(table, ["scale"], measure)
    return geometric_means(table.assign(log=np.log(table[measure])), ["scale"]).rename(columns={"value": measure})


def _extremes(rises: pd.DataFrame) -> Iterator[str]:
    """At which ends the loss exceeds its best by more than the interval of the rise, a sentence an arm."""
    ends = means_over_seeds(rises, ["optimizer", "arm", "at"], "rise")
    ends["answer"] = [
        "may or may not exceed" if math.isnan(low) else "exceeds" if low > 0 else "does not exceed"
        for low in ends["low"]
    ]
    for (optimizer, arm), line in ends.groupby(["optimizer", "arm"]):
        sentences = []
        for answer, found in line.groupby("answer", sort=False):
            places = [f"S = {row.at:g} ({spanned(row.rise, row.low, row.high)} nats per token)" for row in rows(found)]
            sentences.append(f"{answer} its best by more than the interval at {' and '.join(places)}")
        yield f"{arm}, {optimizer_name(str(optimizer))}: the loss {'; it '.join(sentences)}."


def _display_means(table: pd.DataFrame) -> pd.DataFrame:
    """`means` for readers: the numbers of the figure."""
    cells = []
    for keys, runs in curves(table, [str(name) for name in table.loc[:, LOSS:]]):
        found = means(runs, keys["measure"]).set_index("scale")[keys["measure"]]
        cells.append(_names(**keys) | {f"S = {at:g}": number(value) for at, value in found.items()})
    return pd.DataFrame(cells).fillna("n/a")


def _names(optimizer: str, arm: str, measure: str) -> dict[str, str]:
    return {"optimizer": optimizer_name(optimizer), "arm": arm, "measure": measure.replace("_", " ")}


def _display(table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    by, written = list(table.columns[:-2]), number if statistic == "factor" else signed  # by all but seed and statistic
    cells = []
    for row in rows(means_over_seeds(table, by, statistic)):
        value = getattr(row, statistic)
        cells.append(
            _names(row.optimizer, row.arm, row.measure)
            | {name.replace("_", " "): f"{getattr(row, name):g}" for name in by[3:]}
            | {"seeds": str(row.seeds), statistic: written(value)}
            | {"95 % interval": interval(row.low, row.high, 0 if math.isnan(value) else row.seeds)}
        )
    return pd.DataFrame(cells)


def _warnings(table: pd.DataFrame) -> Iterator[str]:
    for (optimizer, arm), group in table.groupby(["optimizer", "arm"]):
        runs = group.groupby("seed").size()
        if lacking := [str(seed) for seed in runs.index[runs < table["scale"].nunique()]]:
            which = f"{arm}, {optimizer_name(str(optimizer))}, seed {', '.join(lacking)}"
            yield f"not a run at every scale, so left out of rises, slopes and noise factors: {which}"


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

    The best is one scale for all seeds, that of the lowest mean (`seeds.at_best`). Of no seed where there is a single
    scale.
    """
    others = losses.drop(columns=at)
    return losses[at] - at_best(others) if len(others.columns) else pd.Series(dtype=float)


def judge_share(claim: str, statistic: str, of: pd.Series, whole: pd.Series, share: float) -> Verdict:
    """The verdict on a claim that one rise is less than a share of another, of - share * whole < 0, seed by seed.

    Where the other is no rise, the runs do not test it.
    """
    of, whole = of.align(whole, join="inner")
    return judge(claim, statistic, of - share * whole, BELOW_0, tested=not whole.mean(skipna=False) <= 0)


def log_slope(values: pd.DataFrame) -> pd.Series:
    """Least-squares slope of log value against log scale; of no seed where there is a single scale."""
    if values.shape[1] < 2:
        return pd.Series(dtype=float)
    along = np.log(values.columns.to_numpy(float))
    return pd.Series({seed: slope(along, np.log(row)) for seed, row in values.iterrows()}, dtype=float)


def typical_factor(ratios: pd.DataFrame) -> pd.Series:
    """Typical factor between a ratio and 1 over the scales, exp(mean |ln ratio|): above and below do not cancel."""
    return pd.Series(np.exp(np.abs(np.log(ratios.to_numpy(float))).mean(axis=1)), index=ratios.index)


def slopes(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """`log_slope` of every curve: optimizer, arm, measure, from_scale (smallest scale of the fit), seed, slope."""
    return by_seed(table, measures, log_slope, "slope", from_scale=table["scale"].min())


def by_seed(
    table: pd.DataFrame,
    measures: Sequence[str],
    statistic: Callable[[pd.DataFrame], pd.Series],
    name: str,
    **columns: float,
) -> pd.DataFrame:
    """A statistic of every curve of some measures: optimizer, arm, measure, the given columns, seed and its name."""
    found = []
    for keys, _ in curves(table, measures):
        values = statistic(curve(table, **keys))
        found += [{**keys, **columns, "seed": seed, name: value} for seed, value in values.items()]
    return pd.DataFrame(found, columns=["optimizer", "arm", "measure", *columns, "seed", name])


def curves(table: pd.DataFrame, measures: Sequence[str]) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Optimizer, arm and measure of each curve, and its runs; an arm without scalars has no curves of scalars."""
    for (optimizer, arm), runs in table.groupby(["optimizer", "arm"]):
        for measure in measures:
            if runs[measure].notna().any():
                yield {"optimizer": str(optimizer), "arm": str(arm), "measure": measure}, runs

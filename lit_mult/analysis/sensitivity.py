"""Dependence of the loss on the learning rate, and differences between arms: pure functions of arrays, then of tables.

A *group* is one arm at one setting (the scientific factors but the width), width and seed; its runs differ in the
learning rate. Losses are in nats per token throughout, intervals are 95 % percentile bootstraps over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lit_mult.analysis.bootstrap import Floats, bootstrap_interval, slope_interval
from lit_mult.analysis.frame import optimizer_name

_LINE = ["arm", "setting", "label", "optimizer", "variant", "reference"]
_GROUP = [*_LINE, "d_model", "seed"]
_CURVE = ["lr", "loss", "initial_loss", "added", "sampled", "runs", "diverged", "pruned"]
_STEP_TOLERANCE = 0.02  # steps of log lr may differ by this share: lrs are often written with two or three digits
_DIFFERENCES = ["between", "of", "against", "within", "d_model", "measure", "seeds", "pairs", "difference", "low"]
_DIFFERENCES += ["high", "doubtful"]
_DRIFT = ["seeds", "widths", "slope", "slope_low", "slope_high", "intercept", "at_edge", "incomplete", "trusted"]
ALL_WIDTHS = "all"


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a curve."""

    lr: float
    loss: float
    """Loss at the optimum, nats per token (of the parabola, if one was fitted)."""
    at_edge: bool
    """The best point is the lowest or highest lr, so the optimum may lie outside: a warning."""


def lr_sensitivity(lrs: ArrayLike, losses: ArrayLike, initial_loss: float) -> float:
    """Learning-rate sensitivity, nats per token (arXiv:2309.14322 sec. 2.2).

    The mean over the learning rates of min(loss, initial_loss) - best, where best is the minimum over the range. A
    diverged run (loss NaN or infinite) counts as initial_loss. Where no run ended below initial_loss this is 0, the
    best of all values, for a model that never trains: `points` notes it and differences with it are doubtful.

    Raises:
        ValueError: the learning rates are no log-uniform grid of two or more, or the lengths differ.
    """
    x, y = _sorted_curve(lrs, losses)
    _check_log_uniform(x)
    capped = np.where(np.isnan(y), initial_loss, np.minimum(y, initial_loss))
    return float(np.mean(capped - capped.min()))


def interpolated_optimum(lrs: ArrayLike, losses: ArrayLike, *, fit: bool = True) -> Optimum:
    """Vertex of the parabola in log2 lr through the best point and its two neighbours.

    The best point itself is returned when it lies at the edge of the range (`at_edge`), when a neighbour has no loss
    (NaN or infinite, as it diverged or was pruned: no parabola to fit), when the three losses are equal, and with `fit`
    False (for points that differ in more than the lr). All NaN when no point has a loss.
    """
    x, y = _sorted_curve(lrs, losses)
    if np.isnan(y).all():
        return Optimum(float("nan"), float("nan"), at_edge=False)
    best = int(np.nanargmin(y))
    at_edge = best in (0, len(y) - 1)
    if fit and not at_edge and not np.isnan(y[best - 1 : best + 2]).any():
        left, right = np.diff(np.log2(x[best - 1 : best + 2]))
        falling, rising = np.diff(y[best - 1 : best + 2]) / (left, right)
        slope, curvature = (falling * right + rising * left) / (left + right), (rising - falling) / (left + right)
        if curvature > 0:
            offset = -slope / (2 * curvature)
            return Optimum(float(x[best] * 2**offset), float(y[best] + slope * offset / 2), at_edge=False)
    return Optimum(float(x[best]), float(y[best]), at_edge)


def loss_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each group and lr: loss (NaN where no run completed), initial_loss, `added` (a lr outside the planned
    grid), `sampled` (not of a grid at all), and numbers of runs: runs, diverged, pruned.

    Nuisance factors other than the lr are tuned: the loss is the lowest over them.
    """
    runs = runs.assign(**{status: runs["status"] == status for status in ("diverged", "pruned")})
    return (
        runs.assign(sampled=runs["sampler"] != "grid")
        .groupby([*_GROUP, "lr"], sort=False, as_index=False)
        .agg(
            loss=("final_loss", "min"),
            initial_loss=("initial_loss", "first"),
            added=("added", "all"),
            sampled=("sampled", "any"),
            runs=("final_loss", "size"),
            diverged=("diverged", "sum"),
            pruned=("pruned", "sum"),
        )
    )


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a group of the runs from `load_records`: best loss, optimum, sensitivity, and what stands against them.

    Best loss, optimum and `at_edge` are those of all runs that completed; the sensitivity, `lrs`, `lr_low` and
    `lr_high` those of the planned learning rates alone, so that ranges are equal where some groups had rates added.
    A group that lacks planned runs (against all learning rates and nuisance settings of its arm; in a sampled search,
    against the group of its arm that has most) is not `complete`; it has no sensitivity, nor has one with a pruned run,
    whose final loss nobody knows, nor a sampled search, whose learning rates are no fixed range. `note` says why a
    sensitivity is NaN. A reference arm has one lr, hence a loss and no sensitivity. `runs`, `diverged`, `pruned` and
    `added` are numbers of runs.
    """
    planned = runs[~runs["added"]]
    expected = planned.drop_duplicates(["arm", "lr", "nuisance"]).groupby("arm").size().to_dict()
    if runs["reference"].any():  # one lr for each setting, which may differ between settings
        expected |= dict.fromkeys(runs.loc[runs["reference"], "arm"].unique(), 1)
    if (sampled := planned[planned["sampler"] != "grid"]).size:  # every group has learning rates of its own: count them
        expected |= sampled.groupby(_GROUP, sort=False).size().groupby("arm").max().to_dict()
    rows = []
    for key, curve in loss_curves(runs).groupby(_GROUP, sort=False):
        rows.append(dict(zip(_GROUP, key, strict=True)) | _point(curve, expected.get(key[0], 0)))
    return pd.DataFrame(rows)


def summary(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each line and width: means over seeds with their intervals, and counts of what stands against them.

    The optimum is the geometric mean over seeds; `sensitivity_seeds` counts the seeds that have a sensitivity.
    """
    rows = []
    for key, group in points.groupby([*_LINE, "d_model"], sort=False):
        sensitivity = group["sensitivity"].dropna()
        rows.append(
            dict(zip([*_LINE, "d_model"], key, strict=True))
            | {"seeds": group["seed"].nunique()}
            | _mean("best_loss", group["best_loss"].dropna())
            | {"sensitivity_seeds": len(sensitivity)}
            | _mean("sensitivity", sensitivity)
            | {"optimum_lr": float(2 ** np.log2(group["optimum_lr"]).mean())}
            | {"at_edge": int(group["at_edge"].sum()), "incomplete": int((~group["complete"]).sum())}
            | {name: int(group[name].sum()) for name in ("runs", "diverged", "pruned", "added")}
        )
    return pd.DataFrame(rows)


def optimum_drift(points: pd.DataFrame) -> pd.DataFrame:
    """Least-squares slope of log2 (optimum lr) against log2 (width) for each line, with its interval over seeds.

    Slope 0: the optimum transfers across widths; -1: it falls as 1/d. Needs two widths, and two learning rates at each.
    `at_edge` and `incomplete` count groups whose optimum is not to be trusted; where either is above 0, neither is the
    slope (`trusted` False).
    """
    rows = []
    usable = points[~points["reference"] & (points["lrs"] > 1) & points["optimum_lr"].notna()]
    for key, group in usable.groupby(_LINE, sort=False):
        if group["d_model"].nunique() < 2:
            continue
        x, y = np.log2(group["d_model"].to_numpy(float)), np.log2(group["optimum_lr"].to_numpy(float))
        slope, low, high = slope_interval(x, y, group["seed"])
        counts = (group["seed"].nunique(), group["d_model"].nunique())
        doubts = (int(group["at_edge"].sum()), int((~group["complete"]).sum()))
        rows.append((*key, *counts, slope, low, high, float(y.mean() - slope * x.mean()), *doubts, not any(doubts)))
    return pd.DataFrame(rows, columns=[*_LINE, *_DRIFT])


def paired_differences(points: pd.DataFrame) -> pd.DataFrame:
    """Differences of best loss and of sensitivity between arms, and between optimizers, at equal seed and all else.

    Each row is `of` minus `against` (below 0: `of` is better) `within` the setting (for optimizers: the arm), at one
    width or over "all" of them, with its interval over seeds. `pairs` counts the differences that were averaged,
    `doubtful` those of them that rest on an incomplete group, on an optimum at the edge of the learning rates, on a
    group that never ended below its initial loss, or, for the sensitivity, on unequal ranges of learning rates.
    """
    by_arm = points.assign(item=points["arm"], within=points["setting"])
    by_optimizer = points.assign(item=points["optimizer"].map(optimizer_name), within=lines(points))
    rows = [("arm", *row) for row in _paired(by_arm, points["arm"].unique())]
    rows += [("optimizer", *row) for row in _paired(by_optimizer, sorted(by_optimizer["item"].unique()))]
    return pd.DataFrame(rows, columns=_DIFFERENCES)


def lines(points: pd.DataFrame) -> pd.Series:
    """The arm, and the setting without the optimizer."""
    return points["arm"].where(points["variant"] == "", points["arm"] + " · " + points["variant"])


def doubtful(points: pd.DataFrame) -> pd.Series:
    """Whether each group's best loss is doubtful: runs are missing, the optimum is at the edge, or nothing trained."""
    return ~points["complete"] | points["at_edge"] | ~(points["best_loss"] < points["initial_loss"])


def _paired(points: pd.DataFrame, items: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    points = points.assign(doubt=doubtful(points))
    by_item = dict(iter(points.groupby("item")))
    for against, of in combinations(items, 2):
        both = by_item[of].merge(by_item[against], on=["within", "d_model", "seed"], suffixes=("", "_against"))
        doubt = both["doubt"] | both["doubt_against"]
        ranges_differ = (both["lr_low"] != both["lr_low_against"]) | (both["lr_high"] != both["lr_high_against"])
        for measure, doubts in (("best_loss", doubt), ("sensitivity", doubt | ranges_differ)):
            pairs = both.assign(difference=both[measure] - both[f"{measure}_against"], doubtful=doubts)
            for within, group in pairs[pairs["difference"].notna()].groupby("within", sort=False):
                widths: list[tuple[Any, pd.DataFrame]] = list(group.groupby("d_model"))
                for width, part in [*widths, (ALL_WIDTHS, group)] if len(widths) > 1 else widths:
                    difference, seeds = part["difference"], part["seed"]
                    interval = bootstrap_interval(difference, seeds)
                    statistics = (seeds.nunique(), len(part), difference.mean(), *interval, int(part["doubtful"].sum()))
                    yield of, against, within, width, measure, *statistics


def _point(curve: pd.DataFrame, expected: int) -> dict[str, Any]:
    # Arrays, not frames: a study of ten thousand runs has thousands of groups, and a frame takes its time.
    columns = {name: curve[name].to_numpy() for name in _CURVE}
    planned = {name: column[~columns["added"]] for name, column in columns.items()}
    sampled = bool(columns["sampled"].any())
    # In a sampled search, neighbours in lr differ in the other nuisance factors too: no curve to fit a parabola to.
    optimum = interpolated_optimum(columns["lr"], columns["loss"], fit=not sampled)
    sensitivity, note = _sensitivity(planned, expected, sampled)
    return {
        "runs": int(columns["runs"].sum()),
        "complete": int(planned["runs"].sum()) >= expected,
        "diverged": int(columns["diverged"].sum()),
        "pruned": int(columns["pruned"].sum()),
        "added": int(columns["runs"][columns["added"]].sum()),
        "lrs": len(planned["lr"]),
        "lr_low": float(np.fmin.reduce(planned["lr"], initial=np.nan)),
        "lr_high": float(np.fmax.reduce(planned["lr"], initial=np.nan)),
        "initial_loss": float(columns["initial_loss"][0]),
        "best_loss": float(np.fmin.reduce(columns["loss"])),
        "optimum_lr": optimum.lr,
        "optimum_loss": optimum.loss,
        "at_edge": optimum.at_edge and len(curve) > 1,
        "sensitivity": sensitivity,
        "note": note,
    }


def _sensitivity(curve: Mapping[str, NDArray[Any]], expected: int, sampled: bool) -> tuple[float, str]:
    """Sensitivity over the planned part of a curve (NaN without one), and a caveat or ""."""
    runs, pruned = int(curve["runs"].sum()), int(curve["pruned"].sum())
    if runs < expected:
        return float("nan"), f"{runs} of {expected} runs"
    if pruned:
        return float("nan"), f"{pruned} of {runs} runs pruned"
    if len(curve["lr"]) < 2:
        return float("nan"), ""
    if sampled:
        return float("nan"), "the learning rates were sampled, not laid on a grid"
    initial_loss, losses = float(curve["initial_loss"][0]), curve["loss"]
    try:
        sensitivity = lr_sensitivity(curve["lr"], losses, initial_loss)
    except ValueError as error:
        return float("nan"), str(error)
    trained = np.nanmin(losses, initial=np.inf) < initial_loss
    return sensitivity, "" if trained else "no run ended below the initial loss"


def _mean(name: str, values: pd.Series) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def _sorted_curve(lrs: ArrayLike, losses: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"{x.shape} learning rates do not go with {y.shape} losses")
    order = np.argsort(x)
    return x[order], np.where(np.isfinite(y), y, np.nan)[order]


def _check_log_uniform(lrs: Floats) -> None:
    if len(lrs) < 2 or not lrs[0] > 0:
        raise ValueError("sensitivity needs two learning rates or more, above 0")
    steps = np.diff(np.log2(lrs))
    if not steps.min() > 0 or np.abs(steps / steps.mean() - 1).max() > _STEP_TOLERANCE:
        raise ValueError(f"the learning rates {', '.join(f'{lr:g}' for lr in lrs)} are no log-uniform grid")

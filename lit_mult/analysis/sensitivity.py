"""Dependence of the loss on the learning rate, and differences between arms: pure functions of arrays, then of tables.

A *group* is one arm at one setting (the scientific factors but the width), width and seed; its runs differ in the
learning rate. Losses are in nats per token throughout. The unit is the seed: an interval is the 95 % one of Student's
t on a value for each seed. A diverged run counts as its initial loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lit_mult.analysis.frame import judging, optimizer_name
from lit_mult.analysis.seeds import Floats, mean_interval, slope

_LINE = ["arm", "setting", "label", "optimizer", "variant", "reference"]
_CURVES = [*_LINE, "d_model"]
_GROUP = [*_CURVES, "seed"]
_CURVE = ["lr", "loss", "initial_loss", "added", "refines", "judged", "sampled", "runs", "diverged", "pruned"]
_STEP_TOLERANCE = 0.02  # steps of log lr may differ by this share: lrs are often written with two or three digits
_DIFFERENCES = ["between", "of", "against", "within", "d_model", "measure", "seeds", "pairs", "difference", "low"]
_DIFFERENCES += ["high", "doubtful"]
MEASURES = {
    "best_loss": "best loss",
    "sensitivity": "lr sensitivity",
    "mean_loss": "mean loss over the rates",
    "sensitivity_but_lowest": "lr sensitivity without the lowest rate",
    "sensitivity_but_highest": "lr sensitivity without the highest rate",
}
"""What arms are compared in; of the last two only differences over all widths are shown."""
WITHOUT_AN_END = ("sensitivity_but_lowest", "sensitivity_but_highest")
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
    """One row for each group and lr: loss (NaN where the run diverged or was pruned), initial_loss, `added` (a lr
    outside the planned grid), `refines` (a seed for more precision), `judged` (a seed that judges), `sampled` (not of a
    grid), and numbers of runs: runs, diverged, pruned.

    Nuisance factors other than the lr are tuned: at each lr the loss is that at their values of lowest mean over the
    seeds, the same for all seeds; in a sampled search, whose seeds have values of their own, the lowest of the seed.
    """
    runs = runs.assign(**{status: runs["status"] == status for status in ("diverged", "pruned")})
    runs = runs.assign(sampled=runs["sampler"] != "grid", capped=capped(runs["final_loss"], runs["initial_loss"]))
    grid = runs[~runs["sampled"]]
    chosen = _lowest_mean(grid, [*_CURVES, "lr"], "nuisance")
    of_chosen = grid["nuisance"].to_numpy() == grid[[*_CURVES, "lr"]].merge(chosen, how="left")["nuisance"].to_numpy()
    runs["tuned"] = runs["final_loss"].where(runs["sampled"] | pd.Series(of_chosen, grid.index))
    return runs.groupby([*_GROUP, "lr"], sort=False, as_index=False).agg(
        loss=("tuned", "min"),
        initial_loss=("initial_loss", "first"),
        added=("added", "all"),
        refines=("refines", "all"),
        judged=("judged", "all"),
        sampled=("sampled", "any"),
        runs=("final_loss", "size"),
        diverged=("diverged", "sum"),
        pruned=("pruned", "sum"),
    )


def best_rates(curves: pd.DataFrame) -> pd.DataFrame:
    """The best learning rate of each line and width from `loss_curves`: that of the lowest mean loss over the seeds.

    It is one rate for all seeds, among those that most of them have run. Columns: of the line, d_model, lr.
    """
    return _lowest_mean(curves.assign(capped=capped(curves["loss"], curves["initial_loss"])), _CURVES, "lr")


def capped(losses: pd.Series, initial: pd.Series) -> pd.Series:
    """Losses, at most the initial ones, which stand for those of runs that have none."""
    return losses.fillna(np.inf).clip(upper=initial.fillna(np.inf))


def _lowest_mean(table: pd.DataFrame, by: list[str], choose: str) -> pd.DataFrame:
    """Columns `by` and `choose`: its value of lowest mean `capped` over the seeds, of those with the most seeds."""
    means = table.groupby([*by, choose], sort=False, as_index=False).agg(
        mean=("capped", "mean"), seeds=("seed", "nunique")
    )
    means["few"] = -means["seeds"]
    return means.sort_values(["few", "mean", choose], kind="stable").drop_duplicates(by)[[*by, choose]]


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a group of the runs from `load_records`: best loss, optimum, sensitivity, and what stands against them.

    `best_loss` is the loss at `best_lr`, one rate for all seeds of a line and width (`best_rates`; in a sampled search
    the lowest of the seed), `at_edge` says that it is the lowest or highest of their rates. `optimum_lr` and
    `optimum_loss` are those of the seed's own curve, `optimum_at_edge` likewise. Sensitivity, `mean_loss`, `lrs`,
    `lr_low` and `lr_high` are those of the planned learning rates alone, so that ranges are equal where some groups had
    rates added. A seed added for precision, or to judge, has a best loss
    alone; where seeds judge, others have none, and one that diverged its initial loss. `trained`: whether it ended
    below that.
    A group that lacks planned runs (against all learning rates and nuisance settings of its arm; in a sampled search,
    against the group of its arm and seed that has most) is not `complete`; it has no sensitivity, nor has one with a
    pruned run, whose final loss nobody knows, nor a sampled search, whose learning rates are no fixed range. `note`
    says why a sensitivity is NaN. A reference arm has one lr, hence a loss and no sensitivity. `runs`, `diverged`,
    `pruned` and `added` are numbers of runs.
    """
    planned = runs[~runs["added"]]
    planned = planned[~planned["refines"] & ~planned["judged"]]
    expected = planned.drop_duplicates(["arm", "lr", "nuisance"]).groupby("arm").size().to_dict()
    if runs["reference"].any():  # one lr for each setting, which may differ between settings
        expected |= dict.fromkeys(runs.loc[runs["reference"], "arm"].unique(), 1)
    of_sampled = _expected_of_sampled(planned[planned["sampler"] != "grid"])
    rows, curves = [], loss_curves(runs)
    for key, curve in curves.groupby(_GROUP, sort=False):
        wanted = of_sampled.get(key, expected.get(key[0], 0))
        rows.append(dict(zip(_GROUP, key, strict=True)) | _point(curve, wanted))
    found = pd.DataFrame(rows)
    shared = _at_best_rate(curves[~curves["sampled"]])
    found = found.merge(shared, on=_GROUP, how="left", suffixes=("_of_seed", ""))
    for name in ("best_loss", "best_lr", "at_edge"):
        of_seed = found.pop(f"{name}_of_seed")
        found[name] = found[name].where(~found["sampled"], of_seed)
    found["trained"] = found["best_loss"] < found["initial_loss"]
    judges = found.groupby(_CURVES)["judged"].transform("any")
    diverged = found["judged"] & found["best_loss"].isna()
    found["best_loss"] = found["best_loss"].where(found["judged"] | ~judges).mask(diverged, found["initial_loss"])
    return found.astype({"at_edge": bool})


def _expected_of_sampled(runs: pd.DataFrame) -> dict[Any, int]:
    """Group -> runs that it should have: every group has learning rates of its own, so that they can only be counted.

    A group should have as many as the group of its arm and seed that has most, where a trial that was pruned on another
    seed counts as run: its further seeds do not run.
    """
    if runs.empty:
        return {}
    counts = runs.assign(pruned=runs["status"] == "pruned").groupby(_GROUP, sort=False)["pruned"].agg(["size", "sum"])
    counts = counts.set_axis(["runs", "pruned"], axis="columns")
    elsewhere = counts.groupby(_CURVES)["pruned"].transform("sum") - counts["pruned"]
    counts["with_pruned"] = counts["runs"] + elsewhere
    most = counts.groupby(["arm", "seed"]).transform("max")
    is_whole = (counts["runs"] == most["runs"]) | (counts["with_pruned"] == most["with_pruned"])
    return counts["runs"].where(is_whole, most["runs"]).to_dict()


def _at_best_rate(curves: pd.DataFrame) -> pd.DataFrame:
    """Columns of the group, best_lr, best_loss and at_edge, for every group of a grid."""
    best = curves[_GROUP].drop_duplicates().merge(best_rates(curves), on=_CURVES)
    best = best.merge(curves[[*_GROUP, "lr", "loss"]], on=[*_GROUP, "lr"], how="left")
    rates = curves.groupby(_CURVES, sort=False)["lr"]
    ends = pd.DataFrame({"lowest": rates.min(), "highest": rates.max()}).reset_index()
    best = best.merge(ends, on=_CURVES).rename(columns={"lr": "best_lr", "loss": "best_loss"})
    at_end = (best["best_lr"] == best["lowest"]) | (best["best_lr"] == best["highest"])
    best["at_edge"] = at_end & (best["lowest"] < best["highest"])
    return best.drop(columns=["lowest", "highest"])


def summary(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each line and width: means over seeds with their intervals, and counts of what stands against them.

    The optimum is the geometric mean over seeds; `sensitivity_seeds` counts the seeds that have a sensitivity.
    """
    rows = []
    for key, group in points.groupby(_CURVES, sort=False):
        sensitivity = group["sensitivity"].dropna()
        rows.append(
            dict(zip(_CURVES, key, strict=True))
            | {"seeds": judging(group)["seed"].nunique()}
            | _mean("best_loss", group["best_loss"].dropna())
            | {"sensitivity_seeds": len(sensitivity)}
            | _mean("sensitivity", sensitivity)
            | _mean("mean_loss", group["mean_loss"].dropna())
            | {"best_lr": float(2 ** np.log2(group["best_lr"]).mean())}
            | {"optimum_lr": float(2 ** np.log2(group["optimum_lr"]).mean())}
            | {"at_edge": int(group["at_edge"].sum()), "incomplete": int((~group["complete"]).sum())}
            | {name: int(group[name].sum()) for name in ("runs", "diverged", "pruned", "added")}
        )
    return pd.DataFrame(rows)


def with_optimum(points: pd.DataFrame) -> pd.DataFrame:
    """The points that have an optimal learning rate: the best of several, and not of a reference arm."""
    return points[~points["reference"] & (points["lrs"] > 1) & points["optimum_lr"].notna()]


def optimum_drift(points: pd.DataFrame) -> pd.DataFrame:
    """Least-squares slope of log2 (optimum lr) against log2 (width) for each line: mean over seeds with its interval.

    Slope 0: the optimum transfers across widths; -1: it falls as 1/d. Needs two widths, and two learning rates at each.
    A seed counts if it has an optimum at every width. `at_edge` and `incomplete` count groups whose optimum is not to
    be trusted; where either is above 0, neither is the slope (`trusted` False).
    """
    rows = []
    usable = with_optimum(points)
    for key, group in usable.groupby(_LINE, sort=False):
        widths = group["d_model"].nunique()
        whole = group[group.groupby("seed")["d_model"].transform("nunique") == widths]
        if widths < 2 or whole.empty:
            continue
        x, y = np.log2(whole["d_model"].to_numpy(float)), np.log2(whole["optimum_lr"].to_numpy(float))
        of_seeds = whole.groupby("seed").indices.values()
        mean, low, high = mean_interval([slope(x[of_seed], y[of_seed]) for of_seed in of_seeds])
        doubts = (int(whole["optimum_at_edge"].sum()), int((~group["complete"]).sum()))
        trusted = not any(doubts)
        intercept = float(y.mean() - mean * x.mean())
        rows.append((*key, whole["seed"].nunique(), widths, mean, low, high, intercept, *doubts, trusted))
    return pd.DataFrame(rows, columns=[*_LINE, *_DRIFT])


def paired_differences(points: pd.DataFrame) -> pd.DataFrame:
    """Differences in `MEASURES` between arms, and between optimizers, at equal seed and all else.

    Each row is `of` minus `against` (below 0: `of` is better) `within` the setting (for optimizers: the arm), at one
    width or over "all" of them (for each seed that has all, the mean over widths), with its interval over seeds.
    `pairs` counts the differences that were averaged, `doubtful` those of them that rest on an incomplete group, on a
    reference arm, whose one rate was never tuned, on a best rate at the edge, on a group that never ended below its
    initial loss, or, where all rates count, on unequal ranges of them.
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
    """Whether each group's best loss is doubtful: runs are missing, the rate was not tuned or is at the edge, or
    nothing trained."""
    return ~points["complete"] | points["reference"] | points["at_edge"] | ~points["trained"]


def paired(of: pd.DataFrame, against: pd.DataFrame, on: list[str], measure: str) -> pd.DataFrame:
    """Rows of two tables of points that have equal `on`, with their `difference`, and whether it is `doubtful`."""
    both = of.assign(doubt=doubtful(of)).merge(
        against.assign(doubt=doubtful(against)), on=on, suffixes=("", "_against")
    )
    doubt = both["doubt"] | both["doubt_against"]
    if measure != "best_loss":
        doubt |= (both["lr_low"] != both["lr_low_against"]) | (both["lr_high"] != both["lr_high_against"])
    both = both.assign(difference=both[measure] - both[f"{measure}_against"], doubtful=doubt)
    return both[both["difference"].notna()]


def _paired(points: pd.DataFrame, items: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    by_item = dict(iter(points.groupby("item")))
    for against, of in combinations(items, 2):
        for measure in MEASURES:
            pairs = paired(by_item[of], by_item[against], ["within", "d_model", "seed"], measure)
            for within, group in pairs.groupby("within", sort=False):
                widths: list[tuple[Any, pd.DataFrame]] = list(group.groupby("d_model"))
                whole = group[group.groupby("seed")["d_model"].transform("nunique") == len(widths)]
                if measure in WITHOUT_AN_END:
                    shown = [(ALL_WIDTHS if len(widths) > 1 else widths[0][0], whole)]
                else:
                    shown = [*widths, (ALL_WIDTHS, whole)] if len(widths) > 1 else widths
                for width, part in shown:
                    by_seed = part.groupby("seed")["difference"].mean()
                    statistics = (*mean_interval(by_seed), int(part["doubtful"].sum()))
                    yield of, against, within, width, measure, len(by_seed), len(part), *statistics


def _point(curve: pd.DataFrame, expected: int) -> dict[str, Any]:
    # Arrays, not frames: a study of ten thousand runs has thousands of groups, and a frame takes its time.
    columns = {name: curve[name].to_numpy() for name in _CURVE}
    planned = {name: column[~columns["added"]] for name, column in columns.items()}
    sampled = bool(columns["sampled"].any())
    # In a sampled search, neighbours in lr differ in the other nuisance factors too: no curve to fit a parabola to.
    optimum = interpolated_optimum(columns["lr"], columns["loss"], fit=not sampled)
    refines = bool((columns["refines"] | columns["judged"]).all())
    over_rates, note = _over_rates(planned, expected, sampled=sampled, refines=refines)
    return {
        "sampled": sampled,
        "judged": bool(columns["judged"].all()),
        "runs": int(columns["runs"].sum()),
        "complete": refines or int(planned["runs"].sum()) >= expected,
        "diverged": int(columns["diverged"].sum()),
        "pruned": int(columns["pruned"].sum()),
        "added": int(columns["runs"][columns["added"]].sum()),
        "lrs": len(planned["lr"]),
        "lr_low": float(np.fmin.reduce(planned["lr"], initial=np.nan)),
        "lr_high": float(np.fmax.reduce(planned["lr"], initial=np.nan)),
        "initial_loss": float(columns["initial_loss"][0]),
        "best_loss": float(np.fmin.reduce(columns["loss"])),
        "best_lr": optimum.lr,
        "at_edge": (at_edge := optimum.at_edge and len(curve) > 1),
        "optimum_lr": np.nan if refines else optimum.lr,
        "optimum_loss": np.nan if refines else optimum.loss,
        "optimum_at_edge": at_edge and not refines,
        **over_rates,
        "note": note,
    }


_OVER_RATES = ("sensitivity", "mean_loss", *WITHOUT_AN_END)


def _over_rates(
    curve: Mapping[str, NDArray[Any]], expected: int, *, sampled: bool, refines: bool
) -> tuple[dict[str, float], str]:
    """The measures over the planned part of a curve (NaN without one), and a caveat or ""."""
    nothing = dict.fromkeys(_OVER_RATES, float("nan"))
    runs, pruned = int(curve["runs"].sum()), int(curve["pruned"].sum())
    if refines:
        return nothing, ""
    if runs < expected:
        return nothing, f"{runs} of {expected} runs"
    if pruned:
        return nothing, f"{pruned} of {runs} runs pruned"
    if len(curve["lr"]) < 2:
        return nothing, ""
    if sampled:
        return nothing, "the learning rates were sampled, not laid on a grid"
    initial_loss = float(curve["initial_loss"][0])
    lrs, losses = _sorted_curve(curve["lr"], curve["loss"])
    try:
        found = {"sensitivity": lr_sensitivity(lrs, losses, initial_loss)}
    except ValueError as error:
        return nothing, str(error)
    found["mean_loss"] = float(np.mean(np.where(np.isnan(losses), initial_loss, np.minimum(losses, initial_loss))))
    if len(lrs) > 2:
        found |= {
            name: lr_sensitivity(lrs[rest], losses[rest], initial_loss)
            for name, rest in zip(WITHOUT_AN_END, (slice(1, None), slice(None, -1)), strict=True)
        }
    trained = np.nanmin(losses, initial=np.inf) < initial_loss
    return nothing | found, "" if trained else "no run ended below the initial loss"


def _mean(name: str, values: pd.Series) -> dict[str, float]:
    mean, low, high = mean_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


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

"""How much sooner one side reaches the loss at which another ends: the speed-up factor that papers report.

With L the final loss of the side that ends higher, the factor is N / n if the asked-about side reaches L for good after
n of its N steps, and n / N if it is the other one that does: 1.25 needs 20 % fewer steps, 0.8 needs 25 % more. Steps
between two measurements are interpolated in log steps. Where a study varies `train.steps`, the final losses of its
budgets are what is compared: each run has its whole schedule. Otherwise it is the validation curves of the longest
runs, which understate differences: before its learning rate decays, a run has a higher loss than one that ends there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.frame import best_rates, load_curves
from lit_mult.analysis.questions import matching, side_name, texts
from lit_mult.analysis.seeds import mean_interval
from lit_mult.schema import Question

BUDGET = "train.steps"
FEWEST = 8
"""Points of a validation curve after its start, from which it is compared."""
HOW_TO_READ = """\
- *Speed-up* is N / n where a side needs n of the other's N steps to reach its final loss, each at its best rate; below
  1 it needs more. On *budgets* every run had a whole schedule; on validation *curves* it is understated, as losses fall
  with the learning rate at the end.
"""
_COLUMNS = ["of", "against", "within", "measured_on", "seeds", "speedup", "low", "high"]


def speedups(runs: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """A row a pair of sides that questions on the best loss name, and value of the factors that they leave open.

    Args:
        runs: from `frame.load_records`, whose records are read again where curves are compared.
        questions: the sides; all but those on the best loss are ignored.

    Returns:
        Columns of, against, within, measured_on ("budgets" or "curves"), seeds, speedup (geometric mean over seeds, at
        each side's best rate) and its 95 % interval (low, high). No rows where runs have too few measurements, or
        differ in length.
    """
    found = []
    for key, part in by_seed(runs, questions).groupby(_COLUMNS[:4], sort=False):
        mean, low, high = np.exp(mean_interval(part["log"]))
        found.append((*key, len(part), mean, low, high))
    return pd.DataFrame(found, columns=_COLUMNS)


def by_seed(runs: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """The same before the mean: a row a seed, with columns of, against, within, measured_on, seed and log."""
    best = best_rates(runs)
    factors = sorted({"arm"}.union(*map(json.loads, runs["factors"].unique())))
    varies = BUDGET in factors and best[BUDGET].nunique() > 1
    factors = [name for name in factors if name != BUDGET] if varies else factors
    curves = _budgets(best, factors) if varies else _curves(best)
    found = []
    for question in questions:
        if question.measure != "best_loss" or BUDGET in question.of:
            continue
        free = [name for name in factors if name not in question.of]
        of, against = (matching(curves, side) for side in (question.of, question.against))
        pairs = of.merge(against, on=[*free, "seed"], suffixes=("", "_against"))
        ends = [{curve[-1][0] for curve in both} for both in zip(pairs["curve"], pairs["curve_against"], strict=True)]
        pairs = pairs.loc[np.array([len(steps) == 1 for steps in ends], dtype=bool)]
        open_factors = [name for name in free if pairs[name].nunique() > 1]
        both = zip(pairs["curve"], pairs["curve_against"], strict=True)
        sides = {"of": side_name(question.of), "against": side_name(question.against)}
        measured = {"within": texts(pairs, open_factors), "measured_on": "budgets" if varies else "curves"}
        found.append(pairs[["seed"]].assign(**sides, **measured, log=[np.log(factor(*curves)) for curves in both]))
    return pd.concat(found) if found else pd.DataFrame(columns=[*_COLUMNS[:4], "seed", "log"])


def factor(of: Sequence[tuple[float, float]], against: Sequence[tuple[float, float]]) -> float:
    """The speed-up of one curve of (step, loss) over another; both end at the same step."""
    if of[-1][1] <= against[-1][1]:
        return of[-1][0] / reached(of, against[-1][1])
    return reached(against, of[-1][1]) / against[-1][0]


def reached(curve: Sequence[tuple[float, float]], target: float) -> float:
    """Step from which losses stay at or below `target`, as the last does; the first step if all do."""
    steps, losses = np.array(curve, dtype=float).T
    above = np.flatnonzero(~(losses <= target))
    if not len(above):
        return float(steps[0])
    before = above[-1]
    (x, next_x), (y, next_y) = np.log(steps[before : before + 2]), losses[before : before + 2]
    share = (y - target) / (y - next_y) if np.isfinite(y) else 1.0
    return float(np.exp(x + share * (next_x - x)))


def _budgets(best: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """A row a line and seed of two budgets or more, with its final losses over them as `curve`."""
    lines = best.sort_values(BUDGET).groupby([*factors, "seed"], sort=False)
    curves = [(*key, list(zip(line[BUDGET], line["final_loss"], strict=True))) for key, line in lines if len(line) > 1]
    return pd.DataFrame(curves, columns=[*factors, "seed", "curve"])


def _curves(best: pd.DataFrame) -> pd.DataFrame:
    """The runs whose validation curve has enough points, with that as `curve`."""
    curves = load_curves(best)
    curves = curves[(curves["split"] == "val") & (curves["step"] > 0)]
    by_path = {path: list(zip(curve["step"], curve["loss"], strict=True)) for path, curve in curves.groupby("path")}
    best = best[best["path"].map(lambda path: len(by_path.get(path, ())) >= FEWEST).astype(bool)]  # of no rows, too
    return best.assign(curve=best["path"].map(by_path))


def statement(row: Any) -> str:
    """A row of `speedups` in words."""
    span = "" if np.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]"
    where = f" ({row.within})" if row.within else ""
    how = "budgets with a schedule each" if row.measured_on == "budgets" else "validation curves"
    seeds = f"{row.seeds} seed{'s' * (row.seeds != 1)}"
    return f"{row.of} reaches the loss of {row.against}{where} {row.speedup:.2f}{span} times as fast ({how}, {seeds})."

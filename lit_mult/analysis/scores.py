"""Downstream scores: means over seeds, paired differences with intervals over seeds and items, and their power.

Two models answer the same items, and every arm has the same seeds: differences are taken item by item and seed by seed.
Means over tasks are plain means of scores between 0 and 1, as in arXiv:2601.04890 table 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.crossed import Crossed, crossed
from lit_mult.analysis.frame import best_rates, optimizer_name
from lit_mult.analysis.seeds import Floats
from lit_mult.errors import UserError
from lit_mult.layout import find_evaluations
from lit_mult.schema import EvaluationRecord

KNOWLEDGE, REASONING, AVERAGE = "knowledge", "reasoning", "average"
AVERAGES = (KNOWLEDGE, REASONING, AVERAGE)
"""Plain means: over the tasks of a side, and over all."""
CONTRAST = "reasoning - knowledge"
"""How much more reasoning gains than knowledge: a difference between two means of differences."""
_LINE = ["arm", "setting", "label", "optimizer", "variant", "multipliers", "reference", "d_model"]
SEEDS_PLANNED = (2, 3, 5, 10)

# arXiv:2601.04890 table 2, per cent: 0.5B parameters (a hybrid of attention and Mamba2), 240 GT.
# HellaSwag, ARC-C, MMLU, MMLU-PRO, BBH, GSM8K, MATH lvl5
PAPER = {
    "Adam": (48.91, 38.70, 44.18, 18.26, 9.70, 48.35, 7.52),
    "Adam + LRM": (49.89, 38.73, 45.33, 19.92, 12.03, 49.10, 9.07),
    "Muon": (50.31, 39.04, 47.98, 18.96, 10.13, 48.02, 8.69),
    "Muon + LRM": (50.56, 39.39, 47.96, 19.32, 13.52, 50.63, 9.49),
}


def load_scores(folder: Path | str, runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each task, checkpoint and run that was evaluated, in the order of `runs` and of the suite's tasks.

    Columns: those that name a run in `load_records`; `best`, whether its learning rate is its arm's best
    (`frame.best_rates`); `suite` (with the options that were given), `step`, `tokens`, `last` (of the run's
    checkpoints), `truncated`; `task`, `side`, `metric`, `value`, `stderr`, `chance`, `items` (array), `items_hash`; and
    `share`, whether the score is one of right answers, between 0 and 1. Of two evaluations of the same thing the newer
    one counts. Empty where nothing was evaluated.

    Raises:
        UserError: an evaluation is damaged, or its run has no record.
    """
    folder = Path(folder)
    named = {(row.config_hash, row.cell if row.study else ""): row for row in runs.itertuples()}
    best = set(best_rates(runs).index)
    newest = dict[tuple[Any, ...], tuple[str, list[dict[str, Any]]]]()
    for path in find_evaluations(folder):
        record = EvaluationRecord.read(path)
        run: Any = named.get((record.config_hash, record.cell.cell if record.cell else ""))
        if run is None:
            raise UserError(f"{path}: is of a run that has no record here; move it away")
        of_run = {name: getattr(run, name) for name in [*_LINE, "seed", "lr"]}
        of_run |= {"run": run.Index, "best": run.Index in best, "suite": record.label}
        of_run |= {name: getattr(record, name) for name in ("step", "tokens", "last", "truncated")}
        rows = [of_run | score.model_dump() | {"items": np.array(score.items)} for score in record.scores]
        key = (record.label, run.Index, record.step)
        newest[key] = max(newest.get(key, ("", [])), (record.started_at, rows), key=lambda one: one[0])
    columns = ["run", "best", "suite", *_LINE, "seed", "lr", "step", "tokens", "last", "truncated", "task", "side"]
    columns += ["metric", "value", "stderr", "chance", "items", "items_hash", "higher_is_better"]
    table = pd.DataFrame([row for _, rows in newest.values() for row in rows], columns=columns)
    between = table["value"].astype(float).between(0, 1) & table["higher_is_better"].astype(bool)
    table["share"] = between.groupby([table["suite"], table["task"]]).transform("all")
    return table.sort_values(["suite", "run", "step"], kind="stable", ignore_index=True)


def means(scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each suite, line, width, step and task or mean over tasks: mean over seeds with its interval.

    `value`, `low`, `high` and `stderr` (over seeds and items, see `crossed`), `seeds`, `items`, `chance`, `share`.
    """
    rows = []
    for key, group in scores.groupby(["suite", *_LINE, "step"], sort=False):
        named = dict(zip(["suite", *_LINE, "step"], key, strict=True))
        named |= {"tokens": int(group["tokens"].iloc[0]), "last": bool(group["last"].iloc[0])}
        for name, side, part, weights in _with_averages(group):
            of_tasks = part.drop_duplicates("task")
            rows.append(named | {"task": name, "side": side} | _estimate("value", _crossed(part, "value", weights)))
            rows[-1] |= {"chance": float(of_tasks["chance"].to_numpy(float) @ weights)}
            rows[-1] |= {"share": bool(of_tasks["share"].all())}
    return pd.DataFrame(rows)


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each suite, comparison, width and task or mean over tasks, at the last checkpoint of each run.

    Compared are arms under one setting, optimizers within one arm, and both at once: a later arm under AdamW with an
    earlier one under Muon, which asks whether multipliers gain what Muon does (arXiv:2601.04890 table 2). `difference`
    is the mean over the seeds that both sides have and over items, `low` and `high` its 95 % interval; `seeds_variance`
    and `items_variance` are what it is made of (see `crossed`), and `seeds_2`, ... the smallest difference that as many
    seeds would show four times in five.
    """
    last = scores[scores["last"] & ~scores["reference"]]
    variant = np.where(last["variant"] == "", "", " · " + last["variant"])
    by_arm = last.assign(item=last["arm"], within=last["setting"])
    by_optimizer = last.assign(item=last["optimizer"].map(optimizer_name), within=last["arm"] + variant)
    both = last.assign(item=last["arm"] + " · " + last["optimizer"].map(optimizer_name), within=last["variant"])
    arms, optimizers = list(last["arm"].unique()), sorted(by_optimizer["item"].unique())
    pairs = [("arm", by_arm, *pair) for pair in combinations(arms, 2)]
    pairs += [("optimizer", by_optimizer, *pair) for pair in combinations(optimizers, 2)]
    if {"AdamW", "Muon"} <= set(optimizers):
        pairs += [("both", both, f"{one} · Muon", f"{other} · AdamW") for one, other in combinations(arms, 2)]
    rows = []
    for between, table, against, of in pairs:
        on = ["suite", "within", "d_model", "seed", "task", "items_hash", "share"]
        paired = table[table["item"] == of].merge(table[table["item"] == against], on=on, suffixes=("", "_against"))
        for (suite, within, width), group in paired.groupby(["suite", "within", "d_model"], sort=False):
            named = {"between": between, "of": of, "against": against}
            named |= {"suite": suite, "within": within, "d_model": width}
            rows += [named | row for row in _differences(group)]
    return pd.DataFrame(rows, columns=_DIFFERENCES)


_DIFFERENCES = ["between", "of", "against", "suite", "within", "d_model", "task", "side", "share", "difference", "low"]
_DIFFERENCES += ["high", "stderr", "seeds", "items", "seeds_variance", "items_variance"]
_DIFFERENCES += [f"seeds_{n}" for n in SEEDS_PLANNED]


def power(compared: pd.DataFrame) -> pd.DataFrame:
    """The smallest detectable difference (80 % power, 5 % level), by suite, task and number of seeds.

    The root mean square over the comparisons in `differences`, each of which estimates the variance between seeds
    poorly from two or three seeds. Comparisons with one seed are excluded.
    """
    known = compared[compared["seeds_variance"].notna() & compared["share"]]
    names = [f"seeds_{n}" for n in SEEDS_PLANNED]
    rows = []
    for (suite, task), group in known.groupby(["suite", "task"], sort=False):
        typical = np.sqrt((group[names] ** 2).mean())
        rows.append({"suite": suite, "task": task, "comparisons": len(group), **typical.to_dict()})
    return pd.DataFrame(rows, columns=["suite", "task", "comparisons", *names])


def _differences(group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    sides = zip(group["items"], group["items_against"], strict=True)
    items = [one - other if one.shape == other.shape else np.array([]) for one, other in sides]
    group = group.assign(difference=group["value"] - group["value_against"], items=pd.Series(items, group.index))
    for name, side, part, weights in _with_averages(group, contrast=True):
        found = _crossed(part, "difference", weights)
        yield (
            {"task": name, "side": side, "share": bool(part["share"].all())}
            | _estimate("difference", found)
            | {"seeds_variance": found.seeds_variance, "items_variance": found.items_variance}
            | {f"seeds_{n}": found.detectable(n) if found.seeds > 1 else math.nan for n in SEEDS_PLANNED}
        )


def _estimate(name: str, found: Crossed) -> dict[str, Any]:
    low, high = found.interval
    of_both = {"stderr": found.stderr, "seeds": found.seeds, "items": found.items}
    return {name: found.value, "low": low, "high": high, **of_both}


def _with_averages(
    group: pd.DataFrame, *, contrast: bool = False
) -> Iterator[tuple[str, str | None, pd.DataFrame, Floats]]:
    """(name, side, rows, weights of the tasks) of each task, then of the means over tasks.

    Means are over shares of right answers alone, and over the seeds that have all of them.
    """
    for task, part in group.groupby("task", sort=False):
        yield str(task), part["side"].iloc[0], part, np.ones(1)
    shares = group[group["share"]]
    sides, tasks = (shares.drop_duplicates("task")[name].to_numpy() for name in ("side", "task"))
    complete = shares[shares.groupby("seed")["task"].transform("nunique") == len(sides)]
    if len(sides) < 2 or complete.empty:
        return
    weighed = {AVERAGE: np.ones(len(sides))}
    if {KNOWLEDGE, REASONING} <= set(sides):
        weighed = {side: (sides == side).astype(float) for side in (KNOWLEDGE, REASONING)} | weighed
    weighed = {name: weights / weights.sum() for name, weights in weighed.items()}
    if contrast and len(weighed) > 1:
        weighed[CONTRAST] = weighed[REASONING] - weighed[KNOWLEDGE]
    for name, weights in weighed.items():
        of_mean = complete["task"].isin(tasks[weights != 0])
        yield name, name if name in (KNOWLEDGE, REASONING) else None, complete[of_mean], weights[weights != 0]


def _crossed(part: pd.DataFrame, value: str, weights: Floats) -> Crossed:
    return crossed([_table(task, value) for _, task in part.groupby("task", sort=False)], weights)


def _table(task: pd.DataFrame, value: str) -> Floats:
    """Scores of one task as (seeds, items); a single column, the score itself, if there are no scores per item."""
    task = task.sort_values("seed")
    sizes = {items.size for items in task["items"]}
    if len(sizes) > 1 or sizes == {0} or task["items_hash"].nunique() > 1:
        return task[[value]].to_numpy(float)
    return np.stack(list(task["items"])).astype(float)

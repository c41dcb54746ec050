"""Downstream scores: means over seeds, paired differences with intervals over seeds and items, and their power.

Two models answer the same items, and every arm has the same seeds: differences are taken item by item and seed by seed.
An interval has to allow for other items of the kind and for other seeds at once, so both are drawn anew (the pigeonhole
bootstrap, Owen 2007, Ann. Appl. Stat. 1(2), which errs on the wide side). Scores are between 0 and 1, means over tasks
are plain means, as in arXiv:2601.04890 table 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.bootstrap import Floats, crossed_bootstrap
from lit_mult.analysis.frame import optimizer_name
from lit_mult.errors import UserError
from lit_mult.record import EvaluationRecord, find_evaluations

KNOWLEDGE, REASONING, AVERAGE = "knowledge", "reasoning", "average"
AVERAGES = (KNOWLEDGE, REASONING, AVERAGE)
"""Plain means: over the tasks of a side, and over all."""
CONTRAST = "reasoning - knowledge"
"""How much more reasoning gains than knowledge: a difference between two means of differences."""
DETECTED = 2.8
"""Standard errors of the smallest difference that shows in four cases of five at the 5 % level (1.96 + 0.84)."""
_LINE = ["arm", "setting", "label", "optimizer", "variant", "multipliers", "reference", "d_model"]
SEEDS_PLANNED = (1, 3, 5, 10)

# arXiv:2601.04890 table 2, per cent: 0.5B parameters (a hybrid of attention and Mamba2), 240 GT.
PAPER_TASKS = ("HellaSwag", "ARC-C", "MMLU", "MMLU-PRO", "BBH", "GSM8K", "MATH lvl5")
PAPER = {
    "Adam": (48.91, 38.70, 44.18, 18.26, 9.70, 48.35, 7.52),
    "Adam + LRM": (49.89, 38.73, 45.33, 19.92, 12.03, 49.10, 9.07),
    "Muon": (50.31, 39.04, 47.98, 18.96, 10.13, 48.02, 8.69),
    "Muon + LRM": (50.56, 39.39, 47.96, 19.32, 13.52, 50.63, 9.49),
}


def load_scores(folder: Path | str, runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each task, checkpoint and run that was evaluated, in the order of `runs` and of the suite's tasks.

    Columns: those that name a run in `load_records`; `suite` (with its options, where they are not the suite's own),
    `step`, `tokens`, `last` (of the run's checkpoints), `task`, `side`, `metric`, `value`, `stderr`, `chance`, `items`
    (array), `items_hash` and `truncated`. Empty where nothing was evaluated.

    Raises:
        UserError: an evaluation is damaged, or its run has no record.
    """
    folder = Path(folder)
    named = {(row.config_hash, row.cell if row.study else ""): row for row in runs.itertuples()}
    found = []
    for path in find_evaluations(folder):
        record = EvaluationRecord.read(path)
        run: Any = named.get((record.config_hash, record.cell.cell if record.cell else ""))
        if run is None:
            raise UserError(f"{path}: is of a run that has no record here; move it away")
        options = [f"{record.num_fewshot} shots"] if record.num_fewshot is not None else []
        options += [f"first {record.limit} items"] if record.limit is not None else []
        of_run = {name: getattr(run, name) for name in [*_LINE, "seed", "lr", "nuisance", "final_loss"]}
        of_run |= {"place": run.Index, "suite": ", ".join([record.suite, *options])}
        of_run |= {name: getattr(record, name) for name in ("step", "tokens", "last", "truncated")}
        found += [of_run | score.model_dump() | {"items": np.array(score.items)} for score in record.scores]
    columns = ["place", "suite", *_LINE, "seed", "lr", "nuisance", "final_loss", "step", "tokens", "last", "truncated"]
    columns += ["task", "side", "metric", "value", "stderr", "chance", "items", "items_hash"]
    table = pd.DataFrame(found, columns=columns)
    return table.sort_values(["suite", "place", "step"], kind="stable", ignore_index=True)


def at_best_rates(scores: pd.DataFrame) -> pd.DataFrame:
    """Of each line and width only the runs at the learning rate (and other nuisance values) of lowest mean final loss.

    The mean is over the seeds that were evaluated. The loss decides: nothing is chosen on the benchmark.
    """
    point, rate = ["suite", "arm", "setting", "d_model"], ["lr", "nuisance"]
    losses = scores[scores["last"]].groupby([*point, *rate], as_index=False)["final_loss"].mean()
    best = losses.loc[losses.groupby(point)["final_loss"].idxmin(), [*point, *rate]]
    return scores.merge(best, on=[*point, *rate])


def means(scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each suite, line, width, step and task or mean over tasks: mean over seeds with its interval.

    `value`, `low`, `high` and `stderr` (over seeds and items), `seeds`, `items` (how many), `chance`.
    """
    rows = []
    for key, group in scores.groupby(["suite", *_LINE, "step"], sort=False):
        named = dict(zip(["suite", *_LINE, "step"], key, strict=True))
        named |= {"tokens": int(group["tokens"].iloc[0]), "last": bool(group["last"].iloc[0])}
        for name, side, part, weights in _with_averages(group):
            tables = [_table(task, "value") for _, task in part.groupby("task", sort=False)]
            chances = part.drop_duplicates("task")["chance"].to_numpy(float)
            rows.append(named | {"task": name, "side": side} | _estimate("value", tables, weights))
            rows[-1]["chance"] = float(chances @ weights)
    return pd.DataFrame(rows)


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each suite, comparison, width and task or mean over tasks, at the last checkpoint of each run.

    Compared are arms under one setting, and optimizers within one arm. `difference` is the mean over seeds that both
    sides have and over items, `low` and `high` its 95 % interval over both; `seeds_variance` is the variance of
    the difference between seeds and `items_variance` the part of the variance of the mean that is due to the choice of
    items: what `power` is made of.
    """
    last = scores[scores["last"] & ~scores["reference"]]
    by_arm = last.assign(item=last["arm"], within=last["setting"])
    line = last["arm"].where(last["variant"] == "", last["arm"] + " · " + last["variant"])
    by_optimizer = last.assign(item=last["optimizer"].map(optimizer_name), within=line)
    rows = []
    for between, table, names in (
        ("arm", by_arm, list(last["arm"].unique())),
        ("optimizer", by_optimizer, sorted(by_optimizer["item"].unique())),
    ):
        pairs = [(names[j], names[i]) for i in range(len(names)) for j in range(i + 1, len(names))]
        for of, against in pairs:
            both = table[table["item"] == of].merge(
                table[table["item"] == against],
                on=["suite", "within", "d_model", "seed", "task", "side", "items_hash"],
                suffixes=("", "_against"),
            )
            for key, group in both.groupby(["suite", "within", "d_model"], sort=False):
                named = {"between": between, "of": of, "against": against}
                named |= dict(zip(("suite", "within", "d_model"), key, strict=True))
                rows += [named | row for row in _differences(group)]
    return pd.DataFrame(rows, columns=_DIFFERENCES)


_DIFFERENCES = ["between", "of", "against", "suite", "within", "d_model", "task", "side", "difference", "low", "high"]
_DIFFERENCES += ["stderr", "seeds", "items", "seeds_variance", "items_variance"]


def power(compared: pd.DataFrame) -> pd.DataFrame:
    """The smallest difference that would show (4 times in 5, at the 5 % level), by suite, task and number of seeds.

    From the variances between seeds and between items in `differences`, averaged over the comparisons: the squared
    standard error of a difference over S seeds is seeds_variance / S + items_variance. With two or three seeds the
    variance between them is itself known poorly; comparisons with one seed have none and are left out.
    """
    known = compared[compared["seeds_variance"].notna()]
    rows = []
    for (suite, task), group in known.groupby(["suite", "task"], sort=False):
        seeds, items = group["seeds_variance"].mean(), group["items_variance"].mean()
        detectable = {f"seeds_{n}": DETECTED * float(np.sqrt(seeds / n + items)) for n in SEEDS_PLANNED}
        rows.append({"suite": suite, "task": task, "comparisons": len(group), **detectable})
    return pd.DataFrame(rows, columns=["suite", "task", "comparisons", *(f"seeds_{n}" for n in SEEDS_PLANNED)])


def _differences(group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    sides = zip(group["items"], group["items_against"], strict=True)
    items = [one - other if one.shape == other.shape else np.array([]) for one, other in sides]
    group = group.assign(difference=group["value"] - group["value_against"], items=pd.Series(items, group.index))
    for name, side, part, weights in _with_averages(group, contrast=True):
        tables = [_table(task, "difference") for _, task in part.groupby("task", sort=False)]
        by_seed = weights @ np.array([table.mean(axis=1) for table in tables])
        yield (
            {"task": name, "side": side}
            | _estimate("difference", tables, weights)
            | {"seeds_variance": float(by_seed.var(ddof=1)) if len(by_seed) > 1 else float("nan")}
            | {"items_variance": float(weights**2 @ np.array([_items_variance(table) for table in tables]))}
        )


def _estimate(name: str, tables: Sequence[Floats], weights: Floats) -> dict[str, Any]:
    low, high, stderr = crossed_bootstrap(tables, list(weights))
    value = float(weights @ np.array([table.mean() for table in tables]))
    sizes = {"seeds": tables[0].shape[0], "items": sum(table.shape[1] for table in tables)}
    return {name: value, "low": low, "high": high, "stderr": stderr} | sizes


def _items_variance(table: Floats) -> float:
    """Variance of the mean of a (seeds, items) table that is due to the items: an analysis of variance of two ways."""
    seeds, items = table.shape
    if items < 2:
        return 0.0
    of_items = table.mean(axis=0)
    if seeds == 1:
        return float(of_items.var(ddof=1) / items)
    residual = table - of_items - table.mean(axis=1, keepdims=True) + table.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (items - 1))
    return float(max(0.0, of_items.var(ddof=1) - noise / seeds) / items)


def _with_averages(
    group: pd.DataFrame, *, contrast: bool = False
) -> Iterator[tuple[str, str | None, pd.DataFrame, Floats]]:
    """(name, side, rows, weights of the tasks) of each task, then of the means over tasks.

    Only seeds that have all of a mean's tasks count in it.
    """
    for task, part in group.groupby("task", sort=False):
        yield str(task), part["side"].iloc[0], part, np.ones(1)
    sides, tasks = (group.drop_duplicates("task")[name].to_numpy() for name in ("side", "task"))
    if len(sides) < 2:
        return
    complete = group[group.groupby("seed")["task"].transform("nunique") == len(sides)]
    if complete.empty:
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


def _table(task: pd.DataFrame, value: str) -> Floats:
    """Scores of one task as (seeds, items); one column, the score itself, where there are none item by item."""
    task = task.sort_values("seed")
    sizes = {items.size for items in task["items"]}
    if len(sizes) > 1 or sizes == {0} or task["items_hash"].nunique() > 1:
        return task[[value]].to_numpy(float)
    return np.stack(list(task["items"])).astype(float)

"""What a result cost, tuning included: pure functions from runs, points and the study's plan to a table and sentences.

FLOPs of a run are 6 x parameters x training tokens (6ND of Kaplan et al. 2020, arXiv:2001.08361): a multiplication and
an addition for each parameter and token, once forward and twice backward. All trainable parameters count, the
embedding's too; attention between tokens, validation and the optimizer are left out. Seconds are wall time of training
and validation, so they depend on the machine and on what else it did; FLOPs and tokens do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from lit_mult.analysis.frame import judging, optimizer_name, rows
from lit_mult.analysis.seeds import mean_interval
from lit_mult.analysis.sensitivity import paired, summary
from lit_mult.analysis.tables import interval, number, scientific, signed
from lit_mult.schema import NEUTRAL, PRESET, StudyPlan, Tuning

UNITS = ("flops", "tokens", "seconds")


def bill(runs: pd.DataFrame, points: pd.DataFrame, study: StudyPlan | None) -> pd.DataFrame:
    """One row for each line and width of `load_records` and `points`: the best loss, and the cost of finding it.

    Best loss in nats per token, mean over seeds with its interval. In each of the `UNITS` (flops, tokens, seconds),
    means over seeds: `run_`, the one best run; `search_`, all runs of a seed, those that diverged, were pruned or were
    added too (where seeds judge, a run of theirs and all those of the seeds that chose); `tuning_`, the study that
    tuned the preset for this optimizer, whole for every line and width that uses it; `total_`, search and tuning.
    Tuning is 0 with the neutral preset and with the tier that uses nothing of any, and NaN with a preset whose tuning
    is not on record.
    """
    spent = runs.assign(flops=6.0 * runs["parameters_total"] * runs["tokens"], seconds=runs["wall_seconds"])
    spent["preset"] = _presets(runs, study)
    units, bills = list(UNITS), []
    for (label, width), group in spent.groupby(["label", "d_model"], sort=False):
        counted = judging(group)
        chose = group.drop(counted.index)
        finished = counted[counted["final_loss"].notna()]
        run = finished.loc[finished.groupby("seed")["final_loss"].idxmin(), units].mean()
        search = counted.groupby("seed")[units].sum().mean() + chose[units].sum()
        used = group[["preset", "optimizer"]].drop_duplicates()
        tuning = pd.DataFrame([_tuning(row.preset, row.optimizer, study) for row in rows(used)], columns=units)
        parts = {"run": run, "search": search, "tuning": tuning.sum(skipna=False)}
        parts["total"] = parts["search"] + parts["tuning"]
        costs = {f"{part}_{unit}": float(cost[unit]) for part, cost in parts.items() for unit in units}
        bills.append({"label": label, "d_model": width} | costs)
    return summary(points).loc[:, :"best_loss_high"].merge(pd.DataFrame(bills), on=["label", "d_model"])


def statements(bill: pd.DataFrame, points: pd.DataFrame, study: StudyPlan | None) -> Iterator[str]:
    """Sentences on the cost of the arms and the gain of tuning; none if all arms use the neutral preset."""
    if (bill["tuning_flops"] == 0).all():
        return
    if study:
        yield from _tunings(points, study)
    for (setting, width), group in bill[bill["best_loss"].notna()].groupby(["setting", "d_model"]):
        if len(group) > 1:
            reached = ", ".join(f"{row.arm} {number(row.best_loss)} {_price(row)}" for row in rows(group))
            yield f"Best loss, {_where(setting, width)}: {reached}."
    if study:
        yield from gains(points, study)


def gains(points: pd.DataFrame, study: StudyPlan) -> Iterator[str]:
    """A sentence for each tuned preset and optimizer: whether it beats the same arm without, at the tuning's width.

    Compared are the arm that uses the preset and each that differs from it in nothing but an untuned preset, in best
    loss at equal seed. Seeds that the tuning used are left out: the preset was chosen on them.
    """
    for arm, fields in study.arms.items():
        for optimizer, tuning in study.tuning.get(fields[PRESET], {}).items():
            for plain, others in study.arms.items():
                tuned_too = optimizer in study.tuning.get(others[PRESET], {})
                if {**others, PRESET: None} == {**fields, PRESET: None} and not tuned_too:
                    name = "default" if others[PRESET] == NEUTRAL else str(others[PRESET])
                    yield from _gain(points[points["optimizer"] == optimizer], arm, plain, name, tuning)


def _gain(points: pd.DataFrame, arm: str, plain: str, preset: str, tuning: Tuning) -> Iterator[str]:
    tuned, untuned = (points[points["arm"] == name] for name in (arm, plain))
    pairs = paired(tuned, untuned, ["setting", "d_model", "seed"], "best_loss")
    for setting, at_setting in pairs.groupby("setting"):
        where = f"Tuned against {preset} preset, {_where(setting, tuning.d_model)}, {arm} - {plain}"
        at_width = at_setting[at_setting["d_model"] == tuning.d_model]
        held_out = at_width[~at_width["seed"].isin(tuning.selected_on)]
        if at_width.empty:
            yield f"{where}: no runs at this width, the one of the tuning, so nothing is compared."
            continue
        if held_out.empty:
            yield f"{where}: no held-out seed (the tuning used {_seeds(tuning.selected_on)}), so nothing is compared."
            continue
        seeds = sorted(held_out["seed"])
        difference, low, high = mean_interval(held_out["difference"])
        verdict = f"the tuned preset does not beat the {preset} preset by more than the seed noise"
        if high < 0:
            beats = f"beats the {preset} preset by {-difference:.4f}, more than the seed noise"
            verdict = f"**the tuned preset {beats}**"
        if doubts := int(held_out["doubtful"].sum()):
            verdict += f"; doubtful, as {doubts} of {len(held_out)} pairs are"
        span = f"{signed(difference)}, {interval(low, high, len(seeds))}"
        yield f"{where}: {span} (held-out {_seeds(seeds)}; the tuning used {_seeds(tuning.selected_on)}): {verdict}."


def _tunings(points: pd.DataFrame, study: StudyPlan) -> Iterator[str]:
    """Sources of the tuned presets, for the optimizers of the runs."""
    for preset, by_optimizer in study.tuning.items():
        for optimizer, tuning in by_optimizer.items():
            if (points["optimizer"] == optimizer).any():
                yield (
                    f"Preset {preset}, {optimizer_name(optimizer)}: best of {tuning.trials} trials of study "
                    f"{tuning.study} at d = {tuning.d_model}, {_seeds(tuning.selected_on)}, which took "
                    f"{scientific(tuning.flops)} FLOPs, {scientific(tuning.tokens)} tokens and {tuning.seconds:,.0f} s."
                )


def _presets(runs: pd.DataFrame, study: StudyPlan | None) -> pd.Series:
    """Name of the preset that each run uses."""
    # A study inlines its presets into the configs of its runs, which then name the neutral one; its plan has the names.
    of_arm = {arm: fields[PRESET] for arm, fields in study.arms.items()} if study else {}
    named = pd.Series([of_arm.get(row.arm, row.preset) for row in rows(runs[["arm", "preset"]])], runs.index)
    named = runs[PRESET].fillna(named) if PRESET in runs else named  # a factor of the study
    return named.where(runs["tier"] != "NONE", NEUTRAL)


def _tuning(preset: str, optimizer: str, study: StudyPlan | None) -> tuple[float, ...]:
    """Cost of tuning a preset for an optimizer, in `UNITS`; NaN if not recorded."""
    if preset == NEUTRAL:
        return (0.0,) * len(UNITS)
    tuning = study.tuning.get(preset, {}).get(optimizer) if study else None
    return tuple(float(getattr(tuning, unit, math.nan)) for unit in UNITS)


def _price(row: Any) -> str:
    if math.isnan(row.tuning_flops):
        return f"with {scientific(row.search_flops)} FLOPs and a tuning that is not on record"
    of_it = f" (of it {scientific(row.tuning_flops)} tuning)" if row.tuning_flops else ""
    return f"with {scientific(row.total_flops)} FLOPs{of_it}"


def _where(setting: Any, width: Any) -> str:
    return f"{setting}, d = {width}" if setting else f"d = {width}"


def _seeds(seeds: Iterable[int]) -> str:
    listed = list(map(str, seeds))
    return f"seed{'s' if len(listed) > 1 else ''} {', '.join(listed)}"

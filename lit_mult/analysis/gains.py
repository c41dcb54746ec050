"""What learnable multipliers do to the loss: said in every report of an experiment, whatever its claims are about."""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd

from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name, rows
from lit_mult.analysis.seeds import mean_interval
from lit_mult.analysis.tables import interval, signed
from lit_mult.method.regime import BALANCED
from lit_mult.registry.kinds import KINDS

_HEADING = "Exploratory: loss with learnable multipliers minus without"
_SETTING = ["variant", "nuisance", "d_model", "lr"]
_POINT = ["optimizer", *_SETTING, "seed"]
_LOSS, _LOW, _HIGH = "final_loss", "decay_times_hidden_low", "decay_times_hidden_high"
_COLUMNS = ["of", "against", "optimizer", "settings", "left_out", "seeds", "difference", "low", "high"]
_COLUMNS += ["decay_times_low", "decay_times_high"]
_HOW_TO_READ = """\
- Loss differences between arms with and without learnable multipliers are at equal learning rate and seed, not each at
  its best rate; a seed's is the mean over all other settings. No claim was made on them before, and they are not
  corrected for their number.
"""


def gains(runs: pd.DataFrame) -> Findings:
    """Final loss of each arm with learnable multipliers minus that of each arm without, at equal lr and seed.

    Args:
        runs: `frame.load_records`.
    """
    table = differences(runs)
    if table.empty:
        return Findings()
    return Findings(
        tables={"loss_with_multipliers": table},
        statements={_HEADING: [_statement(row) for row in rows(table)]},
        how_to_read=_HOW_TO_READ,
    )


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a pair of arms and optimizer: mean over seeds of the difference of final losses, interval, decay times.

    A seed counts where it has all settings (learning rates, widths, further factors) that any seed has of both arms; a
    setting at which a run of either arm diverged or was pruned is left out in all seeds, and counted in `left_out`.
    """
    learnable = {kind for kind, entry in KINDS.items() if entry.is_learnable}
    has = runs["multipliers"].isin(learnable).groupby(runs["arm"], sort=False).agg(["any", "all"])
    found = []
    # An arm of which only some runs have multipliers is on neither side.
    for of, against in product(has.index[has["all"]], has.index[~has["any"]]):
        both = runs[runs["arm"] == of].merge(runs[runs["arm"] == against], on=_POINT, suffixes=("", "_against"))
        for optimizer, pairs in both.groupby("optimizer", sort=False):
            found.append({"of": of, "against": against, "optimizer": optimizer} | _difference(pairs))
    return pd.DataFrame(found, columns=_COLUMNS)


def _difference(pairs: pd.DataFrame) -> dict[str, Any]:
    """Statistics of the pairs of runs of two arms and an optimizer."""
    gap = pairs.assign(gap=pairs[_LOSS] - pairs[f"{_LOSS}_against"])
    by_seed = gap.pivot(index="seed", columns=_SETTING, values="gap")
    present = gap.assign(present=True).pivot(index="seed", columns=_SETTING, values="present").eq(True)
    whole = by_seed[present.all(axis="columns")]
    kept = whole.dropna(axis="columns")
    values = kept.mean(axis="columns") if len(kept.columns) else pd.Series(dtype=float)
    mean, low, high = mean_interval(values)
    times = pairs[[_LOW, _HIGH, f"{_LOW}_against", f"{_HIGH}_against"]]
    return {
        "settings": len(kept.columns),
        "left_out": len(whole.columns) - len(kept.columns),
        "seeds": len(values),
        "difference": mean,
        "low": low,
        "high": high,
        "decay_times_low": float(times.to_numpy(float).min()),
        "decay_times_high": float(times.to_numpy(float).max()),
    }


def _statement(row: Any) -> str:
    """A row of `differences` in words."""
    said = f"{row.of} - {row.against}, {optimizer_name(row.optimizer)}, at equal lr: "
    if not row.seeds:
        return f"{said}no seed has all settings of both arms without a run that diverged or was pruned."
    counted = f"{row.seeds} seed{'s' * (row.seeds != 1)}"
    span = f" {interval(row.low, row.high, row.seeds)}" if row.seeds > 1 else ""
    if row.settings > 1:
        counted += f", mean over {row.settings} settings"
    if row.left_out:
        counted += f", {row.left_out} left out where a run diverged or was pruned"
    return (
        f"{said}final loss {signed(row.difference)}{span} nats per token ({counted}), {_answer(row)}; {_regime(row)}."
    )


def _answer(row: Any) -> str:
    if row.low > 0:
        return "**higher** with multipliers"
    return "**lower** with multipliers" if row.high < 0 else "no difference shown"


def _regime(row: Any) -> str:
    """How many decay times the runs had, and what that allows."""
    if row.decay_times_low != row.decay_times_low:
        return "decay times of hidden matrices unknown"
    ends = dict.fromkeys(f"{end:.2g}" for end in (row.decay_times_low, row.decay_times_high))
    said = f"hidden matrices at {' to '.join(ends)} decay times"
    if row.decay_times_low >= BALANCED:
        return f"{said}, in the balance of noise and decay"
    part = "some " if row.decay_times_high >= BALANCED else ""
    return f"{said}, {part}below the {BALANCED:g} from which multipliers can matter"

"""The part of a report that says whether noise and decay fixed the norms of matrices, and how noisy the runs were.

Multipliers free a matrix from the norm at which noise and decay balance (arXiv:2601.04890 eq. 1). In runs that stop
before the balance there is no such norm yet, and what multipliers gain there has other causes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis import tables
from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import best_rates, rows
from lit_mult.config import ScheduleConfig
from lit_mult.errors import UserError
from lit_mult.method.regime import BALANCED
from lit_mult.method.schedule import main_stage
from lit_mult.schema import RunRecord

_POINT = ["label", "d_model"]
_LOW, _HIGH = "decay_times_hidden_low", "decay_times_hidden_high"
_AT_BEST = [_LOW, _HIGH, "decay_times_head", "decay_times_embedding", "equilibrium_hidden_low"]
_AT_BEST += ["equilibrium_hidden_high"]
_NOISE = ["noise_scale", "noise_scale_tokens", "batch_size", "batch_tokens"]
_READ = ("weight_signal", "weight_noise")
_HOW_TO_READ = f"""\
- *Decay times* are lr * weight_decay * steps, of the steps between warmup and final decay: how many times a run is as
  long as the *equilibrium time*, the 1 / (lr * weight_decay) steps in which noise and decay balance the norm of a
  matrix (arXiv:2601.04890 eq. 1). Multipliers free matrices from that norm. Below {BALANCED:g} more than 2 % of the
  squared norm of the start is left: what multipliers gain there has other causes. *Hidden* matrices are those of the
  blocks, with the range over their roles.
"""
_HOW_TO_READ_NOISE = """\
- The *noise scale* is tr(Sigma) / |G|^2 of the gradients of all matrices (B_simple of arXiv:1812.06162), in sequences
  and tokens: the median over the steps between warmup and final decay, of the runs at the best rate. In batches well
  below it a gradient is mostly noise.
"""


def regime(folder: Path, runs: pd.DataFrame) -> Findings:
    """Decay times of every line and width, and the gradient-noise scale where a run recorded it.

    Args:
        folder: of the study or the run, for its diagnostics.
        runs: `frame.load_records`.
    """
    best = best_rates(runs)
    noise, problem = _noise_scales(folder, best)
    table = _table(runs, best)
    nowhere = (math.nan,) * len(_NOISE)
    table[_NOISE] = [noise.get((row.label, row.d_model), nowhere) for row in rows(table)]
    return Findings(
        tables={"regime": table},
        display_tables={"regime": pd.DataFrame([_shown(row, noisy=bool(noise)) for row in rows(table)])},
        warnings=[*_warnings(runs, table), *problem],
        how_to_read=_HOW_TO_READ + _HOW_TO_READ_NOISE * bool(noise),
        unit="decay times are lr * weight_decay * steps",
    )


def _table(runs: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """A row for each line and width: at the best rate lr, decay times and equilibrium times, NaN where there is none;
    over all rates the range of decay times of hidden matrices, number of runs, and of those below `BALANCED`."""
    at_best = best.groupby(_POINT)[["lr", *_AT_BEST]].first()  # equal in all seeds
    over_rates = (
        runs.assign(below=runs[_LOW] < BALANCED)
        .groupby(_POINT, sort=False)
        .agg(all_rates_low=(_LOW, "min"), all_rates_high=(_HIGH, "max"), runs=("below", "size"), below=("below", "sum"))
    )
    return over_rates.join(at_best)[["lr", *_AT_BEST, *over_rates]].reset_index()


def _noise_scales(folder: Path, best: pd.DataFrame) -> tuple[dict[tuple[str, int], tuple[float, ...]], list[str]]:
    """(line, width) -> values of `_NOISE`, where runs recorded the noise; and why there are none although they did.

    The noise scale is infinite where most steps show no signal.
    """
    recorded = best[[("noise" in groups.split(", ")) for groups in best["diagnostics"]]]
    if recorded.empty:
        return {}, []
    try:
        readings = load_diagnostics(folder, group="noise", cells=set(recorded["cell"]))
    except UserError as error:
        # Without the path of the folder, on which the report must not depend.
        return {}, [f"no gradient-noise scale: {str(error).removeprefix(str(folder)).lstrip('/: ')}"]
    by_step = readings.groupby(["quantity", "cell", "step"])["value"].sum()
    signal, noise = (
        by_step[by_step.index.get_level_values("quantity") == name].droplevel("quantity") for name in _READ
    )
    # An estimated signal may be negative: then none is seen, and the median ranks the step above all that show one.
    scales = (noise / signal).where(signal > 0, math.inf)
    found = dict[tuple[str, int], tuple[float, ...]]()
    for _, group in recorded.groupby(_POINT, sort=False):
        first = next(rows(group))
        configs = {row.cell: RunRecord.read(Path(row.path)).config for row in rows(group)}
        values = [value for cell, config in configs.items() for value in _on_main_stage(scales, cell, config)]
        if values:
            scale, batch = float(np.median(values)), configs[first.cell]["train"]["batch_size"]
            seq_len = configs[first.cell]["data"]["seq_len"]
            found[first.label, first.d_model] = (scale, scale * seq_len, batch, batch * seq_len)
    return found, []


def _on_main_stage(scales: pd.Series, cell: str, config: Mapping[str, Any]) -> Iterator[float]:
    """The noise scales of a cell between warmup and final decay."""
    stage = main_stage(config["train"]["steps"], ScheduleConfig.model_validate(config["schedule"]))
    if cell in scales.index.get_level_values("cell"):
        yield from (float(value) for step, value in scales[cell].items() if step in stage)


def _shown(row: Any, noisy: bool) -> dict[str, str]:
    """A row of the table for readers."""
    cells = {
        "line": str(row.label),
        "width": str(row.d_model),
        "best lr": tables.power_of_two(row.lr),
        "decay times, hidden": _range(row.decay_times_hidden_low, row.decay_times_hidden_high),
        "head": _range(row.decay_times_head),
        "embedding": _range(row.decay_times_embedding),
        "equilibrium time (steps)": _range(row.equilibrium_hidden_low, row.equilibrium_hidden_high, ",.0f"),
        "hidden, all rates": _range(row.all_rates_low, row.all_rates_high),
        f"runs below {BALANCED:g}": f"{row.below} of {row.runs}",
    }
    if noisy:
        cells["noise scale"] = _size(row.noise_scale, row.noise_scale_tokens)
        cells["batch"] = _size(row.batch_size, row.batch_tokens)
    return cells


def _size(sequences: float, tokens: float) -> str:
    return "n/a" if math.isnan(sequences) else f"{sequences:,.0f} ({tokens:,.0f} tokens)"


def _range(low: float, high: float | None = None, style: str = ".2g") -> str:
    ends = [format(end, style) for end in (low, low if high is None else high)]
    return "n/a" if math.isnan(low) else " to ".join(dict.fromkeys(ends))


def _warnings(runs: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    below = table[table[_LOW] < BALANCED]
    if len(below):
        widths = below.groupby("label", sort=False)["d_model"].agg(lambda widths: ", ".join(map(str, widths)))
        where = "; ".join(f"{label}, d = {listed}" for label, listed in widths.items())
        if len(below) == len(table) > 1:
            where = "every line and width"
        times = _range(below[_LOW].min(), below[_LOW].max())
        yield (
            "at the best rate hidden matrices do not reach the balance of noise and decay (lr * weight_decay * steps = "
            f"{times}, below {BALANCED:g}), so there is no fixed norm yet for multipliers to free: {where}"
        )
    if count := int(table["below"].sum()):
        least = f"{BALANCED:g} decay times"
        yield f"{count} of {len(runs)} runs have hidden matrices below {least}, where norms still depend on the start"

"""Drift along the symmetries of redundant multipliers, with and without decay of them (arXiv:2601.04890 fig. 4).

Multipliers a and b that act as a·b leave the model as it is under (sa, b/s), so nothing but decay holds log(|a|/|b|)
in place; nor does anything hold the size of the residual stream before a norm.

Query and key can drift: rotary embeddings mix the rows of a head before they meet, so both sides get gradients of
their own. Rows of W_V and columns of W_out, and those of W_up and W_down, act as products entry by entry (without
grouped queries): in exact arithmetic both sides get equal gradients, AdamW moves them alike from their equal start, and
log(|a|/|b|) stays 0. Rounding alone moves it, so it is compared between precisions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.drawing import Figure, add_legend, arm_styles, draw_band, in_octaves, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.seeds import difference, means_along_steps, means_over_seeds
from lit_mult.analysis.tables import means_table, scientific
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge

_PRECISION = "trainer.precision"
_FULL, _ROUNDED = "32-true", "bf16-mixed"
_QUERY_KEY, _RESIDUAL = "log_query/key", "residual_rms"
_HELD = ("log_value/out", "log_up/down")
_SMALL = (-np.inf, 0.1)
"""Natural log: the two sides of a pair differ by 10 % at most."""
_CAPTION = """\
Drift along symmetries against the optimizer step, as in fig. 4 of the paper: log|M_q|/|M_k| of each block (natural log,
faint to full colour from the first block to the last) and the RMS of the residual stream behind the last block. Lines
are means over seeds (of the RMS, geometric), bands their 95 % intervals by Student's t; a line ends where a run
diverged."""
_HOW_TO_READ = """\
- *Size* of a coordinate is the mean over blocks of |log(|a|/|b|)|, of the residual stream the log of its RMS; all
  logarithms are natural.
"""


def findings(evidence: Evidence) -> Findings:
    """Do query and key, and the residual stream, drift without decay of the multipliers, and hold still with it?"""
    evidence.expect(["no-decay", "decay"], [_PRECISION])
    readings = evidence.readings[evidence.readings["group"] == "symmetry"]  # residual_rms is read by outputs, too
    sizes = _sizes(readings)
    run = [_PRECISION, "arm", "quantity"]
    found = Findings(
        tables={"sizes": sizes},
        display_tables={
            f"size_at_the_{when}": means_table(means_over_seeds(sizes, run, when), [*run, when], scientific)
            for when in ("middle", "end")
        },
        figures={"drift": _figure(readings, arm_labels(evidence.runs))},
        captions={"drift": _CAPTION},
        statements={"Divergence": list(_divergence(evidence.runs))},
        how_to_read=_HOW_TO_READ,
        unit="Sizes are natural logarithms",
    )
    return evidence.with_verdicts(found, _verdicts(sizes))


def _sizes(readings: pd.DataFrame) -> pd.DataFrame:
    """Size of each coordinate in each run at the start, the middle and the end of the steps; NaN where none is."""
    pairs = readings[readings["quantity"].isin([_QUERY_KEY, *_HELD])]
    last = _last_residual(readings)
    sizes = pd.concat([pairs.assign(value=pairs["value"].abs()), last.assign(value=np.log(last["value"]))])
    run = [_PRECISION, "arm", "seed", "quantity"]
    by_step = sizes.groupby([*run, "step"])["value"].mean(skipna=False).unstack("step")
    steps = by_step.columns.to_numpy()
    end, middle = steps.max(), steps[np.abs(steps - steps.max() / 2).argmin()]
    return pd.DataFrame({"start": by_step[steps.min()], "middle": by_step[middle], "end": by_step[end]}).reset_index()


def _last_residual(readings: pd.DataFrame) -> pd.DataFrame:
    residual = readings[readings["quantity"] == _RESIDUAL]
    last: pd.DataFrame = residual[residual["layer"] == residual["layer"].max()]
    return last


def _verdicts(sizes: pd.DataFrame) -> Iterator[Verdict]:
    for precision, here in sizes.groupby(_PRECISION):
        pair, residual = (here[here["quantity"] == quantity] for quantity in (_QUERY_KEY, _RESIDUAL))
        size, end = "mean over blocks of |log(|M_q|/|M_k|)|", f"at the end, {precision}"
        claim = "Without decay of the multipliers log|M_q|/|M_k| drifts, as in fig. 4"
        yield judge(claim, f"{size} {end}, no-decay - decay", difference(pair, "no-decay", "decay", "end"), ABOVE_0)
        free, bound = (pair[pair["arm"] == arm] for arm in ("no-decay", "decay"))
        statistic = f"{size}, {precision}, no-decay, at the end - at the middle of training"
        yield judge("Without decay the drift goes on", statistic, free["end"] - free["middle"], ABOVE_0)
        claim = "With decay log|M_q|/|M_k| stays small, as in fig. 4"
        yield judge(claim, f"{size} {end}, decay", bound["end"], _SMALL)
        # Not no-decay - decay: decay may shrink the stream where without it nothing grows.
        free = residual[residual["arm"] == "no-decay"]
        claim = "Without decay the residual stream before the last norm grows, as in fig. 4"
        statistic = f"log RMS behind the last block, {precision}, no-decay, at the end - at the start of training"
        yield judge(claim, statistic, free["end"] - free["start"], ABOVE_0)
        claim = "Decay of the multipliers holds the residual stream below what it is without"
        statistic = f"log RMS behind the last block {end}, no-decay - decay"
        yield judge(claim, statistic, difference(residual, "no-decay", "decay", "end"), ABOVE_0)
    held = sizes[(sizes["arm"] == "no-decay") & sizes["quantity"].isin(_HELD)]
    held = held.assign(end=np.log(held["end"]))
    for name in _HELD:
        rounded = difference(held[held["quantity"] == name], _ROUNDED, _FULL, "end", between=_PRECISION)
        claim = f"Rounding moves {name.removeprefix('log_')} along its symmetry, in bfloat16 more than in float32"
        over = f"the mean over blocks of |{name}| at the end, {_ROUNDED} over {_FULL}, no-decay"
        yield judge(claim, f"log of the ratio of {over}", rounded, ABOVE_0)


def _divergence(runs: pd.DataFrame) -> Iterator[str]:
    for (precision, arm), here in runs.groupby([_PRECISION, "arm"]):
        yield f"{precision}, {arm}: {(here['status'] == 'diverged').sum()} of {len(here)} runs diverged"


@styled
def _figure(readings: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """A column a precision; above log|M_q|/|M_k| of each block, below the residual stream behind the last block."""
    pairs, residual = readings[readings["quantity"] == _QUERY_KEY], _last_residual(readings)
    residual = residual.assign(value=np.log(residual["value"]))
    arms = readings[["arm"]].assign(reference=False)
    styles, precisions, layers = arm_styles(arms), sorted(readings[_PRECISION].unique()), pairs["layer"].nunique()
    lines = {arm: style | {"marker": "", "ls": "-"} for arm, style in styles.items()}
    figure, axes = panel_grid(2, len(precisions), 1.9, sharex=True, sharey="row", xlabel="optimizer step")
    for precision, (top, bottom) in zip(precisions, axes.T, strict=True):
        for ax, values in ((top, pairs), (bottom, residual)):
            here = means_along_steps(values[values[_PRECISION] == precision], ["arm", "layer"], "value")
            if ax is bottom:
                here[["value", "low", "high"]] = np.exp(here[["value", "low", "high"]])
            for (arm, layer), line in here.groupby(["arm", "layer"]):
                depth = (int(str(layer)) + 1) / layers if ax is top else 1
                draw_band(ax, line["step"], line, "value", lines[str(arm)] | {"alpha": 0.25 + 0.75 * depth})
        top.set_title(precision)
    in_octaves(axes[1, 0])
    axes[0, 0].set_ylabel(r"$\log\,|M_q|/|M_k|$")
    axes[1, 0].set_ylabel("residual RMS\nbehind the last block")
    add_legend(figure, arms, lines, labels=labels)
    return figure

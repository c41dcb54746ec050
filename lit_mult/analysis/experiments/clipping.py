"""Clipping with the gradients of the multipliers in the norm and without them (arXiv:2601.04890 sec. 4.3, fig. 6).

The updates of AdamW and of Muon do not depend on a constant factor on the gradients. Clipping acts through changes of
its factor from step to step alone: a batch that is scaled down counts less in the moments than its neighbours do. Any
harm of a norm that is too large early on has to come from how the factor then changes. What is in the norm can matter
only where the factors differ, with the multipliers' gradients and without, so the losses are judged where they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.drawing import Figure, draw_band, in_octaves, line_styles, mark_legend, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import load_curves, optimizer_name
from lit_mult.analysis.seeds import difference, means_along_steps, means_over_seeds, paired
from lit_mult.analysis.tables import means_table
from lit_mult.analysis.verdict import ABOVE_0, BELOW_0, Verdict, judge
from lit_mult.errors import UserError
from lit_mult.schema import RunRecord

_WITH, _WITHOUT = "gradient_norm_with_multipliers", "gradient_norm_without_multipliers"
_FAR_ABOVE = (2.0, np.inf)
"""Gradients at least halved by clipping on the (geometric) average step."""
_MOST = (np.sqrt(2), np.inf)
"""Above 1 is the ratio by arithmetic; from sqrt(2) on, multipliers hold the larger part of the squared norm."""
_DIFFER = 0.1
"""Mean |ln| of the ratio of two clip factors, which then differ by a tenth: this project's least difference to act."""
_EARLY = 0.1  # share of the steps, the warmup
_OVER_FIRST = "geometric mean over the first tenth of the steps"
_ARMS = ("included", "excluded", "none")
_PAIR = ["optimizer", "seed"]
_MEASURES = ["with", "without", "ratio"]
_SHARE, _RATIO = "share of steps clipped", "|ln factor ratio|"
_LEVEL: dict[str, Any] = {"color": "black", "ls": ":", "lw": 1.0}
_CAPTION = """\
Left: norm of the gradient before clipping, with the multipliers, and the level to which the norm is clipped. Middle:
that norm over the norm without the multipliers. Both are geometric means over seeds. Right: validation loss minus that
of the arm without multipliers at equal seed and step, from the end of the warmup on, with 95 % intervals over seeds by
Student's t. As in fig. 6 of the paper."""
_HOW_TO_READ = """\
- The *clip factor* is that by which clipping multiplies the gradients, min(1, level / norm). A step is *clipped* where
  it is below 1. Where the factors with the multipliers in the norm and without hardly differ, the losses say nothing of
  clipping: they are judged where the mean over recorded steps and seeds of |ln (ratio of the two factors)| in the arm
  `included` is above {differ:g}.
- *Early* is the first tenth of the steps; norms over it are geometric means.
"""


def findings(evidence: Evidence) -> Findings:
    """Is the gain of the multipliers lost when their gradients are in the norm that is clipped?

    Raises:
        UserError: the study varies something else, or its runs are not clipped to one norm.
    """
    evidence.expect(_ARMS, ["optimizer"])
    level = _level(evidence)
    runs, readings = (
        frame.assign(optimizer=frame["optimizer"].map(optimizer_name)) for frame in (evidence.runs, evidence.readings)
    )
    norms = _norms(readings)
    early, curves, clipped = _early(norms), _relative_losses(runs), _clipped(norms, level)
    losses, gains = runs[["arm", *_PAIR, "final_loss"]], _minus_none(runs, _PAIR, "final_loss")
    early_long = early.melt(["arm", *_PAIR], var_name="norm", value_name="geometric mean")
    clipped_long = clipped.melt(["arm", *_PAIR], var_name="quantity", value_name="mean")
    found = Findings(
        tables={"losses": losses, "early_norms": early, "clipped": clipped, "relative_losses": curves},
        display_tables={
            "losses": _table(runs, "final_loss"),
            "losses_minus_those_of_none": _table(gains, "final_loss"),
            "clipping": _table(clipped_long, "mean", "quantity"),
            "early_gradient_norms": _table(early_long, "geometric mean", "norm"),
        },
        figures={"clipping": _figure(norms, curves, level, arm_labels(evidence.runs))},
        captions={"clipping": _CAPTION},
        how_to_read=_HOW_TO_READ.format(differ=_DIFFER),
        unit="Losses in nats per token; norms are 2-norms over all parameters",
    )
    return evidence.with_verdicts(found, _verdicts(runs, early, clipped, level))


def _level(evidence: Evidence) -> float:
    """The norm to which all runs are clipped, from their configs."""
    levels = {RunRecord.read(Path(path)).config["optim"]["clip"] for path in evidence.runs["path"]}
    if len(levels) != 1 or None in levels:
        raise UserError(
            f"{evidence.folder}: optim.clip: must be one number for all runs, not {', '.join(sorted(map(str, levels)))}"
        )
    return float(levels.pop())


def _norms(readings: pd.DataFrame) -> pd.DataFrame:
    """Columns arm, optimizer, seed, step, and the norms with the multipliers and without, and their ratio."""
    norms = readings[readings["quantity"].isin([_WITH, _WITHOUT])]
    wide = norms.pivot(index=["arm", *_PAIR, "step"], columns="quantity", values="value").reset_index()
    wide = wide.rename(columns={_WITH: "with", _WITHOUT: "without"}).rename_axis(columns=None)
    return wide.assign(ratio=wide["with"] / wide["without"])


def _early(norms: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over the first tenth of each run's steps: norms with and without multipliers, their ratio."""
    first = norms[norms["step"] <= _EARLY * norms["step"].max()].set_index(["arm", *_PAIR])[_MEASURES]
    logs = np.log(first).groupby(level=[0, 1, 2]).agg(lambda logs: logs.mean(skipna=False))
    return pd.DataFrame(np.exp(logs)).reset_index()


def _clipped(norms: pd.DataFrame, level: float) -> pd.DataFrame:
    """Of each run: share of the steps that are clipped by the norm that its arm takes, and mean |ln factor ratio|."""
    factors = (level / norms[["with", "without"]]).clip(upper=1)
    taken = factors["with"].where(norms["arm"] == "included", factors["without"])
    values = norms[["arm", *_PAIR]].copy()
    values[_SHARE] = (taken < 1).astype(float)
    values[_RATIO] = np.abs(np.log(factors["with"] / factors["without"]))
    return values.groupby(["arm", *_PAIR], as_index=False)[[_SHARE, _RATIO]].mean()


def _relative_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation loss along training minus that of the arm without multipliers, at equal optimizer, seed and step."""
    curves = load_curves(runs).merge(runs[["path", "arm", "optimizer"]], on="path")
    curves = curves[curves["split"] == "val"]
    return _minus_none(curves, [*_PAIR, "step"], "loss")


def _minus_none(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    arms = table["arm"].unique()
    made = pd.concat([paired(table, arm, "none", by, value).assign(arm=arm) for arm in arms])
    return made.query("arm != 'none'")


def _verdicts(runs: pd.DataFrame, early: pd.DataFrame, clipped: pd.DataFrame, level: float) -> Iterator[Verdict]:
    for name, here in runs.groupby("optimizer"):
        differing = clipped.loc[(clipped["optimizer"] == name) & (clipped["arm"] == "included"), _RATIO]
        tested = not differing.mean(skipna=False) <= _DIFFER  # NaN without such runs
        claim = f"Clipping does better with the multipliers out of the norm under {name}, as in fig. 6"
        harm = difference(here, "included", "excluded", "final_loss")
        yield judge(claim, "final loss, included - excluded, nats per token", harm, ABOVE_0, tested=tested)
        claim = f"Multipliers improve on none under {name} when they are out of the norm"
        gain = difference(here, "excluded", "none", "final_loss")
        yield judge(claim, "final loss, excluded - none, nats per token", gain, BELOW_0)
        # Not the ratio of the two gains: over few seeds the mean of a ratio is anything where the divisor nears 0.
        included, gain = difference(here, "included", "none", "final_loss").align(gain, join="inner")
        claim = f"With the multipliers in the norm their gain under {name} is gone, or less than half of it is left"
        statistic = "final loss, (included - none) - (excluded - none) / 2, nats per token"
        yield judge(claim, statistic, included - gain / 2, ABOVE_0, tested=tested)
        first = early[(early["optimizer"] == name) & (early["arm"] == "included")]
        claim = f"Early in training under {name} the norm with the multipliers in it is far above the {level:g} it is "
        claim += "clipped to, as in fig. 6"
        statistic = f"norm with multipliers over {level:g}, included, {_OVER_FIRST}"
        yield judge(claim, statistic, first["with"] / level, _FAR_ABOVE)
        claim = f"Early in training under {name} that norm is mostly the multipliers'"
        statistic = f"norm with multipliers over norm without, included, {_OVER_FIRST}"
        yield judge(claim, statistic, first["ratio"], _MOST)


def _table(frame: pd.DataFrame, value: str, *more: str) -> pd.DataFrame:
    by = ["optimizer", "arm", *more]
    return means_table(means_over_seeds(frame, by, value).sort_values("optimizer", kind="stable"), [*by, value])


@styled
def _figure(norms: pd.DataFrame, curves: pd.DataFrame, level: float, labels: dict[str, str]) -> Figure:
    """A row an optimizer: gradient norms, their ratio, and losses relative to no multipliers along training."""
    present = set(norms["arm"])
    styles = {arm: style | {"marker": ""} for arm, style in line_styles(_ARMS).items() if arm in present}
    optimizers, last = list(norms["optimizer"].unique()), norms["step"].max()
    figure, axes = panel_grid(len(optimizers), 3, 1.9, sharex=True, xlabel="optimizer step")
    logs = norms.assign(**{measure: np.log(norms[measure]) for measure in _MEASURES})
    for optimizer, (left, middle, right) in zip(optimizers, axes, strict=True):
        here = logs[logs["optimizer"] == optimizer]
        for ax, measure in ((left, "with"), (middle, "ratio")):
            means = means_along_steps(here, ["arm"], measure)
            for arm, style in styles.items():
                line = means[means["arm"] == arm]
                ax.plot(line["step"], np.exp(line[measure]), **style)
            in_octaves(ax)
        left.axhline(level, **_LEVEL)
        after = curves[(curves["optimizer"] == optimizer) & (curves["step"] > _EARLY * last)]
        for name, line in means_along_steps(after, ["arm"], "loss").groupby("arm"):
            draw_band(right, line["step"], line, "loss", styles[str(name)])
        right.axhline(0, color="0.3", lw=0.8)
        left.set_ylabel(f"{optimizer}\ngradient norm")
        middle.set_ylabel("norm / norm without\nmultipliers")
        right.set_ylabel("loss - loss of none\n(nats per token)")
    mark_legend(figure, [*((labels[arm], look) for arm, look in styles.items()), ("clipped to", _LEVEL)])
    return figure

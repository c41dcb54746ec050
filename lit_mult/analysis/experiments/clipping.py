"""Clipping with the gradients of the multipliers in the norm and without them (arXiv:2601.04890 sec. 4.3, fig. 6).

The updates of AdamW and of Muon do not depend on a constant factor on the gradients. Clipping acts through changes of
its factor from step to step alone: a batch that is scaled down counts less in the moments than its neighbours do. Any
harm of a norm that is too large early on has to come from how the factor then changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lit_mult.analysis.experiments.evidence import Evidence, with_verdicts
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import load_curves, optimizer_name
from lit_mult.analysis.style import add_legend, arm_styles, draw_band, in_octaves, panel_grid, styled
from lit_mult.analysis.tables import means_table
from lit_mult.analysis.verdict import ABOVE_0, BELOW_0, Verdict, judge, means_along_steps, means_over_seeds, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WITH, _WITHOUT = "gradient_norm_with_multipliers", "gradient_norm_without_multipliers"
_CLIP = 1.0
"""Norm to which the paper clips, and the study."""
_FAR_ABOVE = (2 * _CLIP, np.inf)
"""Gradients at least halved by clipping on the (geometric) average step."""
_MOST = (np.sqrt(2), np.inf)
"""Above 1 is the ratio by arithmetic; from sqrt(2) on, multipliers hold the larger part of the squared norm."""
_EARLY = 0.1  # share of the steps, the warmup
_SHOWN = 0.2  # share of the steps whose norms are drawn
_PAIR = ["optimizer", "seed"]
_DASHES = {_WITH: "-", _WITHOUT: ":"}
_CAPTION = """\
Left: norm of the gradient before clipping in the first fifth of training, with multipliers and without (geometric means
over seeds), and the norm to which it is clipped. Right: validation loss minus that of the arm without multipliers at
equal seed and step, from the end of the warmup on, with 95 % intervals over seeds by Student's t. As in fig. 6 of the
paper."""


def findings(evidence: Evidence) -> Findings:
    """Is the gain of the multipliers lost when their gradients are in the norm that is clipped?"""
    runs, norms = (
        frame.assign(optimizer=frame["optimizer"].map(optimizer_name)) for frame in (evidence.runs, evidence.readings)
    )
    norms = norms[norms["quantity"].isin([_WITH, _WITHOUT])]
    early, curves = _early(norms), _relative_losses(runs)
    gains = _minus_none(runs, _PAIR, "final_loss")
    long = early.melt(["arm", *_PAIR], var_name="norm", value_name="geometric mean")
    found = Findings(
        csvs={"losses": runs[["arm", *_PAIR, "final_loss"]], "early_norms": early, "relative_losses": curves},
        shown={
            "losses": _table(runs, "final_loss"),
            "losses_minus_those_of_none": _table(gains, "final_loss"),
            "early_gradient_norms": _table(long, "geometric mean", "norm"),
        },
        figures={"clipping": _figure(norms, curves)},
        captions={"clipping": _CAPTION},
        warnings=evidence.warnings,
        reading="- *Early* is the first tenth of the steps; norms over it are geometric means.\n",
        unit="Losses in nats per token; norms are 2-norms over all parameters",
    )
    return with_verdicts(found, list(_verdicts(runs, early)))


def _early(norms: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over the first tenth of each run's steps: norms with and without multipliers, their ratio."""
    first = norms[norms["step"] <= _EARLY * norms["step"].max()]
    logs = first.assign(value=np.log(first["value"])).groupby(["arm", *_PAIR, "quantity"])["value"].mean(skipna=False)
    means = np.exp(logs).unstack("quantity").reset_index()
    early = pd.DataFrame(means.rename(columns={_WITH: "with", _WITHOUT: "without"}))
    return early.assign(ratio=early["with"] / early["without"])


def _relative_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation loss along training minus that of the arm without multipliers, at equal optimizer, seed and step."""
    curves = load_curves(runs).merge(runs[["path", "arm", "optimizer"]], on="path")
    curves = curves[curves["split"] == "val"]
    return _minus_none(curves, [*_PAIR, "step"], "loss")


def _minus_none(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    arms = table["arm"].unique()
    made = pd.concat([paired(table, arm, "none", by, value).assign(arm=arm) for arm in arms])
    return made.query("arm != 'none'")


def _verdicts(runs: pd.DataFrame, early: pd.DataFrame) -> Iterator[Verdict]:
    for name, here in runs.groupby("optimizer"):
        yield judge(
            f"Clipping does better with the multipliers out of the norm under {name}, as in fig. 6",
            "final loss, included - excluded, nats per token",
            paired(here, "included", "excluded", ["seed"], "final_loss")["final_loss"],
            ABOVE_0,
        )
        gain = paired(here, "excluded", "none", ["seed"], "final_loss").set_index("seed")["final_loss"]
        yield judge(
            f"Multipliers improve on none under {name} when they are out of the norm",
            "final loss, excluded - none, nats per token",
            gain,
            BELOW_0,
        )
        # Not the ratio of the two gains: over few seeds the mean of a ratio is anything where the divisor nears 0.
        included = paired(here, "included", "none", ["seed"], "final_loss").set_index("seed")["final_loss"]
        yield judge(
            f"With the multipliers in the norm their gain under {name} is gone, or less than half of it is left",
            "final loss, (included - none) - (excluded - none) / 2, nats per token",
            (included - gain / 2).loc[included.index.intersection(gain.index)],
            ABOVE_0,
        )
        clipped = early[(early["optimizer"] == name) & (early["arm"] == "included")]
        yield judge(
            f"Early in training under {name} the norm with the multipliers in it is far above the {_CLIP:g} it is "
            "clipped to, as in fig. 6",
            "norm with multipliers, included, geometric mean over the first tenth of the steps",
            clipped["with"],
            _FAR_ABOVE,
        )
        yield judge(
            f"Early in training under {name} that norm is mostly the multipliers'",
            "norm with multipliers over norm without, included, geometric mean over the first tenth of the steps",
            clipped["ratio"],
            _MOST,
        )


def _table(frame: pd.DataFrame, value: str, *more: str) -> pd.DataFrame:
    by = ["optimizer", "arm", *more]
    return means_table(means_over_seeds(frame, by, value).sort_values("optimizer", kind="stable"), [*by, value])


@styled
def _figure(norms: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A row an optimizer: gradient norms early in training, and losses relative to no multipliers along it."""
    arms = norms[["arm"]].assign(reference=norms["arm"] == "none")
    styles, optimizers, last = arm_styles(arms), list(norms["optimizer"].unique()), norms["step"].max()
    lines = {arm: style | {"ls": "-", "marker": ""} for arm, style in styles.items()}
    figure, axes = panel_grid(len(optimizers), 2, 1.9, sharex="col")
    logs = norms[norms["step"] <= _SHOWN * last].assign(value=lambda shown: np.log(shown["value"]))
    for optimizer, (left, right) in zip(optimizers, axes, strict=True):
        here = means_along_steps(logs[logs["optimizer"] == optimizer], ["arm", "quantity"], "value")
        for (arm, quantity), line in here.groupby(["arm", "quantity"]):
            left.plot(line["step"], np.exp(line["value"]), **lines[str(arm)] | {"ls": _DASHES[str(quantity)]})
        left.axhline(_CLIP, color="black", lw=0.8)
        in_octaves(left)
        left.set_ylabel(f"{optimizer}\ngradient norm")
        after = curves[(curves["optimizer"] == optimizer) & (curves["step"] > _EARLY * last)]
        for arm, line in means_along_steps(after, ["arm"], "loss").groupby("arm"):
            draw_band(right, line["step"], line, "loss", lines[str(arm)])
        right.axhline(0, color="0.3", lw=0.8)
        right.set_ylabel("loss - loss of none\n(nats per token)")
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    marks: list[tuple[str, dict[str, Any]]] = [
        ("norm with multipliers", {"color": "0.3", "ls": _DASHES[_WITH]}),
        ("norm without", {"color": "0.3", "ls": _DASHES[_WITHOUT]}),
        ("clipped to", {"color": "black", "ls": "-", "lw": 0.8}),
    ]
    add_legend(figure, arms.assign(reference=False), lines, marks)
    return figure

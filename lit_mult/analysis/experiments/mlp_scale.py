"""Loss against the scale of the MLP matrices, with and without scalars: arXiv:2601.04890 fig. 1 bottom right, 8, 9.

RMSNorm weights of the blocks are frozen, so that without scalars the matrices' norms, which S fixes, are the only scale
of an MLP block; three of them multiply, and outputs go as S^3. Scalars can make up for it, with a product of S^-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.drawing import DIVERGED, Figure, add_legend, arm_styles, log_y, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.evidence import scale_sweep as sweep
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge
from lit_mult.diagnostics.noise_band import TOLERANCE

FACTOR = "parametrization.lr"
_SCALARS = {"gate_proj": "gate_scalar", "up_proj": "up_scalar", "down_proj": "down_scalar"}
_READ = {"mlp_output_rms": "output_rms", "weight_rms": "mlp_rms", "weight_noise_rms": "noise_rms"}
_SCALAR_LOOKS: dict[str, dict[str, Any]] = {
    "gate_scalar": {"marker": "^", "ls": "-"},
    "up_scalar": {"marker": "v", "ls": "-."},
    "down_scalar": {"marker": "D", "ls": ":", "mfc": "none"},
}
_NOISE: dict[str, Any] = {"color": "0.88", "ls": "-", "lw": 6}
_FULL: dict[str, Any] = {"color": "0.5", "ls": ":", "lw": 1.0, "zorder": 1}
_PANELS = {
    sweep.LOSS: "validation loss\n(nats per token)",
    "output_rms": "RMS of MLP outputs",
    "mlp_over_noise": "‖W‖ over noise",
    "scalars": "|scalars|",
}
_CAPTION = (
    "Final validation loss, RMS of the output of MLP blocks, norm of the MLP matrices over the Brownian level (shaded: "
    "within 10 % of it), and the three scalars against the scale S of the MLP matrices, with and without scalars "
    "(arXiv:2601.04890 fig. 1 bottom right, 8 and 9). A row an optimizer. Outputs, norms and scalars are geometric "
    "means over layers; points are means over seeds (geometric on log axes), bars 95 % intervals; arms stand side by "
    "side. Dotted: proportional to 1/S, scalars that make up for S in full. Scalars of up and down coincide: outputs "
    "depend on their product alone, and both start at 1."
)
# Chosen before any run of the study. Digest of the figures: "flat" is a quarter of the rise without scalars, which is
# generous, as runs are short and scalars have to travel by 64 in their product; outputs "constant" is 0.25 of an
# exponent, as `exponents.TOLERANCE`, where 3 is expected without scalars; ‖W‖ ~ S, a tenth of the exponent. To
# "compensate" has no number in the digest: this project asks for a product of S^-3, to a tenth. Matrices and ABM
# "coincide": 10 %, the tolerance of `training.trapped`; of a typical factor since the first runs, as a mean cancels.
_FLAT, _CONSTANT, _GROWS = 0.25, (-0.25, 0.25), (0.25, math.inf)
_COMPENSATE, _PROPORTIONAL, _COINCIDE = (-3.3, -2.7), (0.9, 1.1), (-math.inf, 1 + TOLERANCE)


def findings(evidence: Evidence) -> Findings:
    """Whether the loss depends on the scale of the MLP matrices with and without scalars, under each optimizer."""
    evidence.expect(("none", "scalars"), {FACTOR, "optimizer"})
    points = sweep.points(evidence, FACTOR, _measured(evidence))
    fits = sweep.slopes(points, ["output_rms", "mlp_rms", *_SCALARS.values(), "scalars_product"])
    found = sweep.findings(points, fits, ["mlp_noise_factor"])
    found.figures = {"mlp_scale": _figure(points, arm_labels(evidence.runs))}
    found.captions = {"mlp_scale": _CAPTION}
    optimizers = sorted(points["optimizer"].unique())
    verdicts = [verdict for optimizer in optimizers for verdict in _verdicts(points, optimizer) if verdict.seeds]
    return evidence.with_verdicts(found, verdicts)


def _measured(evidence: Evidence) -> pd.DataFrame:
    """Geometric means over the layers, and over the three matrices but for scalars, of magnitudes at the end.

    mlp_noise_factor is the typical factor between the norm of a single matrix and noise.
    """
    end = evidence.at_end(*_READ, "scalar_value")
    end = end[end["role"].isin(("mlp", *_SCALARS))]
    measure = end["quantity"].map(_READ).fillna(end["role"].map(_SCALARS))
    logs = np.log(end["value"].abs()).groupby([end["cell"], end["name"], measure]).mean().unstack()  # one of each
    logs = logs.reindex(columns=[*_READ.values(), *_SCALARS.values()])
    logs["noise_factor"] = (logs["mlp_rms"] - logs["noise_rms"]).abs()
    read: pd.DataFrame = np.exp(logs.groupby("cell").mean())
    return read.drop(columns="noise_factor").assign(
        scalars_product=read[list(_SCALARS.values())].prod(axis=1, skipna=False),
        mlp_over_noise=read["mlp_rms"] / read["noise_rms"],
        mlp_noise_factor=read["noise_factor"],
    )


def _verdicts(points: pd.DataFrame, optimizer: str) -> Iterator[Verdict]:
    where, at = {"optimizer": optimizer}, points["scale"].max()
    under = f"under {optimizer_name(optimizer)}"
    figures = f"{under}, as in fig. 1 (bottom right), 8 and 9"
    rise, rise_with = (sweep.rise(sweep.curve(points, sweep.LOSS, arm=arm, **where), at) for arm in ("none", "scalars"))
    claim = f"Without scalars the loss rises at the largest scale of the MLP matrices {figures}"
    yield judge(claim, f"Loss at S = {at:g} minus that at the best other S, nats per token", rise, ABOVE_0)
    claim = f"With scalars the loss is flat at that scale (rises by less than a quarter of the rise without) {figures}"
    statistic = f"Rise of the loss at S = {at:g} minus a quarter of that without scalars, nats per token"
    yield sweep.judge_share(claim, statistic, rise_with, rise, _FLAT)

    def judge_slope(claim: str, what: str, measure: str, arm: str, within: tuple[float, float]) -> Verdict:
        slope = sweep.log_slope(sweep.curve(points, measure, arm=arm, **where))
        return judge(claim, f"Slope of log {what} against log S", slope, within)

    claim = f"Without scalars the outputs of MLP blocks grow with the scale of their matrices {under}: norms multiply"
    yield judge_slope(claim, "RMS (3 if all three do)", "output_rms", "none", _GROWS)
    claim = f"With scalars the outputs of MLP blocks do not depend on the scale of their matrices {figures}"
    yield judge_slope(claim, "RMS", "output_rms", "scalars", _CONSTANT)
    claim = f"The scalars compensate the scale of the MLP matrices {figures}"
    yield judge_slope(claim, "|product of the scalars| (-3 in full)", "scalars_product", "scalars", _COMPENSATE)
    for arm, what in (("none", "without scalars"), ("scalars", "with scalars")):
        claim = f"The norm of MLP matrices {what} follows their scale {under}, as in eq. 1"
        yield judge_slope(claim, "‖W‖", "mlp_rms", arm, _PROPORTIONAL)
        factor = sweep.typical_factor(sweep.curve(points, "mlp_noise_factor", arm=arm, **where))
        claim = f"The norm of MLP matrices {what} is that of noise {under}, as sec. 3 has it of matrices"
        yield judge(claim, "Typical factor between ‖W‖ and noise over matrices and S", factor, _COINCIDE)


@styled
def _figure(points: pd.DataFrame, labels: dict[str, str]) -> Figure:
    table = points.assign(reference=False).sort_values("arm", kind="stable")
    optimizers, styles = sorted(table["optimizer"].unique()), arm_styles(table)
    figure, axes = panel_grid(len(optimizers), len(_PANELS), 2.0, sharex=True, sharey="col", xlabel="scale $S$ of MLPs")
    for optimizer, (loss, outputs, norms, scalars) in zip(optimizers, axes, strict=True):
        here = table[table["optimizer"] == optimizer]
        for ax, measure in ((loss, sweep.LOSS), (outputs, "output_rms"), (norms, "mlp_over_noise")):
            sweep.draw(ax, here, measure, styles)
        norms.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color=_NOISE["color"], lw=0, zorder=0)
        for measure, look in _SCALAR_LOOKS.items():
            sweep.draw(scalars, here, measure, styles, look)
        scales = np.sort(here["scale"].unique())
        middle = np.exp(np.log(np.cbrt(here["scalars_product"]) * here["scale"]).mean())
        scalars.plot(scales, middle / scales, **_FULL)
        loss.set_ylabel(optimizer_name(optimizer))
    for ax, title in zip(axes[0], _PANELS.values(), strict=True):
        ax.set_title(title)
    for ax in axes[:, 1:].flat:
        log_y(ax)
    for ax in axes[-1]:
        sweep.against_scale(ax, table["scale"])  # for all of its column
    marks = [(name.replace("_", " "), {"color": "0.3", **look}) for name, look in _SCALAR_LOOKS.items()]
    marks += [("within 10 % of noise", _NOISE), ("proportional to 1/S", _FULL)]
    marks += [DIVERGED] if table[sweep.LOSS].isna().any() else []
    add_legend(figure, table, styles, marks, labels=labels)
    return figure

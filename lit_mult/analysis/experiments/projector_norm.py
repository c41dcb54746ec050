"""Loss against the scale of the LM head ("projector"): arXiv:2601.04890 fig. 1 top.

Under a frozen final norm (FPN) the head's norm is the scale of the logits, so that the loss rises where S fixes it too
low or too high; a scalar (SPN) or vector (VPN) norm weight can make up for it.

Two norms are compared with noise, as the head of a small vocabulary over bytes has rows of tokens that the text never
has: their gradient has one sign, so they are no random walk, and they raise the RMS of the whole matrix. The row of
median norm is a token of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from lit_mult.analysis import drawing
from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.drawing import DIVERGED, Figure, add_legend, arm_styles, log_y, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.evidence import scale_sweep as sweep
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge
from lit_mult.diagnostics.noise_band import TOLERANCE

FACTOR = "parametrization.lr.lm_head"
_NORMS = {"FPN": "frozen", "SPN": "scalar", "VPN": "vector"}
_READ = ["logits_rms", "final_norm_output_rms", "weight_rms", "weight_noise_rms", "row_norm_mean", "row_norm_q50"]
_HEADS = {"head": "whole head", "median_row": "row of median norm"}
_BROWNIAN: dict[str, Any] = {"color": "0.3", "ls": "--", "lw": 1.0, "zorder": 1}
_MEDIAN_ROW = {"mfc": "white", "lw": 0.8, "alpha": 0.8}
_CAPTION = (
    "Final validation loss, RMS of the logits and of the final norm's output, and norm of the LM head against the "
    "head's scale S (arXiv:2601.04890 fig. 1 top), under a frozen, scalar and vector final norm (FPN, SPN, VPN). Means "
    "over seeds (geometric on log axes), bars 95 % intervals; arms stand side by side. Last panel: RMS of the whole "
    "head (filled), its row of median norm (hollow) and the Brownian level (dashed)."
)
# Chosen before any run of the study. Digest of fig. 1: "flat" is a rise that a reader of the figure would not see
# beside FPN's, a tenth; a slope of 0.1 over the paper's range of scales, 8^4, is a factor of 2.3; ABM and matrices
# "coincide": 10 %, the tolerance of `training.trapped`; of a typical factor since the first runs, as a mean cancels.
_FLAT, _STABLE, _PROPORTIONAL, _COINCIDE = 0.1, (-0.1, 0.1), (0.9, 1.1), (-math.inf, 1 + TOLERANCE)


def findings(evidence: Evidence) -> Findings:
    """Whether the loss depends on the scale of the head under each norm, and the head's norm is that of noise."""
    evidence.expect(_NORMS, {FACTOR})
    points = sweep.points(evidence, FACTOR, _measured(evidence))
    fits = sweep.slopes(points, ["logits_rms", "final_norm_output_rms", "head_rms", "median_row_rms"])
    fits = pd.concat([fits, sweep.slopes(_upper(points), ["head_rms", "median_row_rms"])], ignore_index=True)
    found = sweep.findings(points, fits, ["median_row_over_noise", "head_over_noise"])
    found.figures = {"projector_norm": _figure(points, arm_labels(evidence.runs))}
    found.captions = {"projector_norm": _CAPTION}
    return evidence.with_verdicts(found, [verdict for verdict in _verdicts(points) if verdict.seeds])


def _measured(evidence: Evidence) -> pd.DataFrame:
    end = evidence.at_end(*_READ)
    end = end[end["name"].isin(("lm_head", "norm"))]
    read = end.pivot(index="cell", columns="quantity", values="value").reindex(columns=_READ)
    read = read.rename(columns={"weight_rms": "head_rms", "weight_noise_rms": "noise_rms"})
    median = read["row_norm_q50"] * read["row_norm_mean"]  # quantiles are over the mean
    return read.drop(columns=["row_norm_mean", "row_norm_q50"]).assign(
        median_row_rms=median,
        head_over_noise=read["head_rms"] / read["noise_rms"],
        median_row_over_noise=median / read["noise_rms"],
    )


def _upper(points: pd.DataFrame) -> pd.DataFrame:
    """Points at the middle scale and above."""
    scales = sorted(points["scale"].unique())
    upper: pd.DataFrame = points[points["scale"] >= scales[len(scales) // 2]]
    return upper


def _verdicts(points: pd.DataFrame) -> Iterator[Verdict]:
    ends = {"smallest": points["scale"].min(), "largest": points["scale"].max()}
    rises = {
        (arm, end): sweep.rise(sweep.curve(points, sweep.LOSS, arm=arm), at)
        for arm in _NORMS
        for end, at in ends.items()
    }
    for end, at in ends.items():
        claim = f"Under a frozen final norm (FPN) the loss rises at the {end} scale of the head, as in fig. 1 top"
        statistic = f"Loss at S = {at:g} minus that at the best other S, nats per token"
        yield judge(claim, statistic, rises["FPN", end], ABOVE_0)
    for arm in ("SPN", "VPN"):
        for end, at in ends.items():
            flat = f"the loss is flat at the {end} scale (rises by less than a tenth of FPN's)"
            claim = f"Under a {_NORMS[arm]} norm ({arm}) {flat}, as in fig. 1 top"
            statistic = f"Rise of the loss at S = {at:g} minus a tenth of FPN's there, nats per token"
            yield sweep.judge_share(claim, statistic, rises[arm, end], rises["FPN", end], _FLAT)
    for arm in ("SPN", "VPN"):
        claim = f"Under {arm} the norm of the logits does not depend on the scale of the head, as in fig. 1 top"
        logits = sweep.curve(points, "logits_rms", arm=arm)
        yield judge(claim, "Slope of log RMS of the logits against log S", sweep.log_slope(logits), _STABLE)
    for arm, part, over in (("SPN", points, ""), ("VPN", points, ""), ("FPN", _upper(points), " from the middle S on")):
        for head, what in _HEADS.items():
            claim = f"Under {arm} the norm of the {what} follows its scale{over}, as in fig. 1 top"
            norms = sweep.curve(part, f"{head}_rms", arm=arm)
            yield judge(claim, f"Slope of log norm against log S{over}", sweep.log_slope(norms), _PROPORTIONAL)
    if (at := ends["smallest"]) < ends["largest"]:
        pulled, free = (sweep.curve(points, "head_over_noise", arm=arm)[at] for arm in ("FPN", "VPN"))
        pulled, free = pulled.align(free, join="inner")
        claim = "At the smallest scale the loss pulls the head of FPN away from its scale, as in fig. 1 top"
        statistic = f"‖W‖ over the Brownian level at S = {at:g}, FPN's over VPN's"
        yield judge(claim, statistic, pulled / free, (1, math.inf))
    for arm in ("SPN", "VPN"):
        for head, what in _HEADS.items():
            claim = f"Under {arm} the norm of the {what} is that of noise, as sec. 3 has it of matrices"
            factor = sweep.typical_factor(sweep.curve(points, f"{head}_over_noise", arm=arm))
            yield judge(claim, "Typical factor between norm and noise over S", factor, _COINCIDE)


@styled
def _figure(points: pd.DataFrame, labels: dict[str, str]) -> Figure:
    table = points.assign(reference=False).sort_values("arm", kind="stable")
    figure, axes = panel_grid(2, 2, 2.1, sharex=True, xlabel="scale $S$ of the head")
    styles = arm_styles(table)
    labels = {
        sweep.LOSS: drawing.LOSS,
        "logits_rms": "RMS of the logits",
        "final_norm_output_rms": "RMS of the final\nnorm's output",
        "head_rms": "‖W‖ of the head",
    }
    for (measure, label), ax in zip(labels.items(), axes.flat, strict=True):
        sweep.draw(ax, table, measure, styles)
        if measure == "head_rms":
            sweep.draw(ax, table, "median_row_rms", styles, _MEDIAN_ROW)
            noise = sweep.means(table[table["noise_rms"].notna()], "noise_rms")  # that of all arms
            ax.plot(noise["scale"], noise["noise_rms"], **_BROWNIAN)
        ax.set_ylabel(label)
        if measure != sweep.LOSS:
            log_y(ax)
    for ax in axes[1]:
        sweep.against_scale(ax, table["scale"])  # for all of its column
    hollow = {"color": "0.3", "marker": "o", "mfc": "white"}
    marks = [("row of median norm", hollow), ("Brownian level", _BROWNIAN)]
    marks += [DIVERGED] if table[sweep.LOSS].isna().any() else []
    add_legend(figure, table, styles, marks, labels=labels)
    return figure

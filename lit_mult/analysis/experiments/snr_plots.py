"""Figure of the signal-to-noise ratio of gradients against what parameters move over pure noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from lit_mult.analysis.experiments.parameters import KINDS, geometric_mean, kinds_drawn
from lit_mult.analysis.frame import rows
from lit_mult.analysis.style import against_width, draw_means, log_y, mark_legend, panel_grid, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "h")
_SIDES: dict[str, dict[str, Any]] = {
    "matrices": {"color": "black", "marker": "o", "ls": "-"},
    "vectors": {"color": "0.5", "marker": "s", "ls": "--"},
}
_CUT: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": ":"}


def caption(floor: float) -> str:
    """Of `motion_against_snr`, where lower SNRs stand at a floor."""
    return (
        "What parameters moved over what their Brownian reference did, against the signal-to-noise ratio (SNR) of a "
        "batch's gradient in the second half of the run: matrices (left), multipliers and RMSNorm weights (middle). A "
        "point is one parameter at one batch size, mean over seeds. Shaded: ratios that count as noise; lighter, for "
        "parameters of few entries alone. Dotted, where any does: the SNR that best separates trapped from free. SNRs "
        f"below {floor:g} stand there. Right: share of parameters that are free, mean over seeds with 95 % intervals. "
        "An open question: the paper has no such figure."
    )


@styled
def motion_against_snr(points: pd.DataFrame, sides: pd.DataFrame, cuts: pd.DataFrame, floor: float) -> Figure:
    """Ratio of moved against SNR, for matrices and for vectors, and the share that is free against batch size.

    Args:
        points: a row a parameter of a run: side, kind, name, part, batch, snr, ratio, low, high (of ratios like noise).
        sides: mean and interval of the share that is free: side, batch, measure, value, low, high.
        cuts: SNR between trapped and free for each side and seed, NaN for none.
        floor: what lower SNRs are drawn at.
    """
    figure, axes = panel_grid(1, 3, 3.2)
    sizes = sorted(points["batch"].unique())
    markers = {size: _MARKERS[number % len(_MARKERS)] for number, size in enumerate(sizes)}
    over_seeds = points.groupby(["side", "kind", "batch", "name", "part", "low", "high"])
    drawn = over_seeds.agg(snr=("snr", "mean"), ratio=("ratio", geometric_mean)).reset_index()
    drawn["snr"] = drawn["snr"].clip(lower=floor)
    for ax, side in zip(axes[0], _SIDES, strict=False):
        _scatter(ax, drawn[drawn["side"] == side], markers)
        if len(found := cuts.loc[cuts["side"] == side, "snr"].dropna()):
            ax.axvline(geometric_mean(found), **_CUT)
        ax.set(xscale="log", title=side, xlabel="SNR of the batch's gradient")
        ax.set_xlim(drawn["snr"].min() / 1.5, drawn["snr"].max() * 1.5)
        ax.set_ylim(drawn["ratio"].min() / 1.3, drawn["ratio"].max() * 1.3)
        log_y(ax)
    axes[0, 0].set_ylabel("moved / noise's moved")
    right, free = axes[0, 2], sides[sides["measure"] == "free"].sort_values("batch")
    for side, look in _SIDES.items():
        line = free[free["side"] == side]
        draw_means(right, line["batch"], line, "value", look)
    against_width(right, points["batch"])
    right.set(ylim=(-0.05, 1.05), title="share that is free", xlabel="batch size (sequences)")
    marks = [(kind, {"color": KINDS[kind], "marker": "o", "mfc": "none"}) for kind in kinds_drawn(points["kind"])]
    marks += [(f"batch size {size}", {"color": "0.3", "marker": markers[size], "mfc": "none"}) for size in sizes]
    marks += [(f"share of {side}", look) for side, look in _SIDES.items()]
    marks += [("cut", _CUT)] if cuts["snr"].notna().any() else []
    mark_legend(figure, marks)
    return figure


def _scatter(ax: Axes, drawn: pd.DataFrame, markers: dict[Any, str]) -> None:
    for row in rows(drawn):
        look: dict[str, Any] = {"color": KINDS[row.kind], "marker": markers[row.batch]}
        ax.plot(row.snr, row.ratio, **look, ls="none", ms=3.5, mew=0.7, mfc="none")
    ax.axhspan(drawn["low"].min(), drawn["high"].max(), color="0.93", lw=0)
    ax.axhspan(drawn["low"].max(), drawn["high"].min(), color="0.85", lw=0)

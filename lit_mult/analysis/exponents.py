"""Exponents of a coordinate check: fits against width or depth, verdicts and their figure."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Figure, against_width, panel_grid, styled
from lit_mult.analysis.frame import rows
from lit_mult.analysis.seeds import mean_interval, slope

Size = Literal["width", "depth"]
"""What an exponent is in; the column of it."""
TOLERANCE = 0.25
"""Half of the smallest possible error of a rule: an exponent of 1/2 (Muon without its factor)."""


def exponents(values: pd.DataFrame, size: Size = "width") -> pd.DataFrame:
    """Slope of log2(value) against log2(size) of every coordinate, over the larger half of the sizes, at least three.

    Below, muP's own finite-size part shows: the head starts at 1 / sqrt(m) of its size, so that logits change by
    a + b / sqrt(m). The exponent is the mean over seeds, its 95 % interval that of Student's t.

    Args:
        values: columns seed, kind, coordinate, low, high (the expected exponents), value, and that of the size.
        size: width or depth.

    Returns:
        Columns kind, coordinate, low, high, exponent, exponent_low, exponent_high and verdict: PASS when the exponent
        lies within `TOLERANCE` of what is expected; a value that is not positive and finite is a FAIL.
    """
    found = []
    larger = values[values[size].isin(larger_half(values[size]))]
    for (kind, coordinate), group in larger.groupby(["kind", "coordinate"], sort=False):
        low, high = float(group["low"].iloc[0]), float(group["high"].iloc[0])
        usable = bool((np.isfinite(group["value"]) & (group["value"] > 0)).all())
        exponent = (math.nan,) * 3
        if usable:
            by_seed = group.groupby("seed")
            exponent = mean_interval([slope(np.log2(one[size]), np.log2(one["value"])) for _, one in by_seed])
        passed = usable and low - TOLERANCE <= exponent[0] <= high + TOLERANCE
        found.append((kind, coordinate, low, high, *exponent, "PASS" if passed else "FAIL"))
    names = ["kind", "coordinate", "low", "high", "exponent", "exponent_low", "exponent_high", "verdict"]
    return pd.DataFrame(found, columns=names)


def larger_half(sizes: pd.Series) -> list[int]:
    """The larger half of the different sizes, but at least three if possible."""
    different = sorted(sizes.unique())
    return different[-max(3, math.ceil(len(different) / 2)) :]


@styled
def coordinate_check(values: pd.DataFrame, verdicts: pd.DataFrame, size: Size = "width") -> Figure:
    """Each coordinate against size, relative to the smallest: a panel a kind, failing coordinates in red and named."""
    kinds = list(dict.fromkeys(values["kind"]))
    xlabel = {"width": "width $d$", "depth": "depth $L$"}[size]
    figure, axes = panel_grid(1, len(kinds), 2.6, xlabel=xlabel, ylabel=f"RMS over that at the smallest {size}")
    failed = {(row.kind, row.coordinate) for row in rows(verdicts) if row.verdict == "FAIL"}
    for kind, ax in zip(kinds, axes[0], strict=True):
        against_width(ax, values[size])
        for coordinate, group in values[values["kind"] == kind].groupby("coordinate", sort=False):
            means = np.exp2(np.log2(group.set_index(size)["value"]).groupby(level=0).mean())
            fails = (kind, coordinate) in failed
            label = str(coordinate) if fails else None
            ax.plot(means.index, means / means.iloc[0], color="#D55E00" if fails else "0.6", label=label, marker=".")
        ax.set_yscale("log", base=2)
        ax.set_title(kind)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    return figure

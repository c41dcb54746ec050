"""Shared by figures: the look of each arm, panels, axes and legends."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any, Literal

import numpy as np
import pandas as pd

from lit_mult.analysis.frame import optimizer_name
from lit_mult.analysis.styles import Axes as Axes
from lit_mult.analysis.styles import Figure as Figure
from lit_mult.analysis.styles import colours, letters, letters_of, page, scale
from lit_mult.analysis.styles import save as save
from lit_mult.analysis.styles import styled as styled
from lit_mult.registry.optimizers import OPTIMIZERS

Styles = dict[str, dict[str, Any]]
Mark = tuple[str, dict[str, Any]]
"""(label, style) of an entry of a legend."""

_DASHES = ("-", (0, (5, 1.5)), "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "D", "v", "P", "h", "p")
_GREYS = (("0.25", (0, (4, 2))), ("0.5", (0, (2, 2))), ("0.4", (0, (7, 2, 2, 2))))
LOSS = "validation loss\n(nats per token)"
STAR: dict[str, Any] = {"marker": "*", "ms": 7, "mec": "black", "mew": 0.6}
CROSS: dict[str, Any] = {"marker": "x", "ms": 4.5, "ls": "none"}
DIVERGED: Mark = ("diverged", CROSS | {"color": "0.3"})
"""Entry of a legend."""
TRIANGLE: dict[str, Any] = {"marker": "^", "ms": 3, "ls": "none"}
SHADE: dict[str, Any] = {"color": "0.92", "lw": 0, "zorder": 0}
SHADE_MARK: dict[str, Any] = {"marker": "s", "ms": 6, "ls": "none", "color": "0.85"}
_OPTIMIZER_LOOKS: tuple[dict[str, Any], ...] = (
    {"ls": "--", "mfc": "white"},
    {"ls": "-"},
    {"ls": "-.", "mfc": "white"},
    {"ls": ":"},
)
_OTHER_LOOK: dict[str, Any] = {"ls": (0, (5, 1, 1, 1, 1, 1)), "mfc": "white"}
OPTIMIZER_LOOKS: Mapping[str, dict[str, Any]] = defaultdict(
    lambda: _OTHER_LOOK, zip(OPTIMIZERS, cycle(_OPTIMIZER_LOOKS), strict=False)
)
"""Name -> look of lines; those of libraries look alike."""


def draw_means(ax: Axes, x: Any, line: pd.DataFrame, measure: str, look: Mapping[str, Any]) -> None:
    """Draw column `measure` of the rows of `line` at `x`, with bars from `low` to `high` where there is an interval."""
    y = line[measure].to_numpy(float)
    ends = np.abs(line[["low", "high"]].to_numpy(float).T - y)
    ax.errorbar(x, y, yerr=np.nan_to_num(ends), fmt="none", ecolor=look["color"], elinewidth=0.9, capsize=1.5)
    ax.plot(x, y, **look)


def draw_band(ax: Axes, x: Any, line: pd.DataFrame, measure: str, look: Mapping[str, Any]) -> None:
    """Draw column `measure` of the rows of `line` along `x`, with a band from `low` to `high` where there is one."""
    ax.plot(x, line[measure], **look)
    ax.fill_between(x, line["low"], line["high"], color=look["color"], alpha=0.12, lw=0)


def mark_at_top(ax: Axes, x: Any, y: float, colour: str, mark: Mapping[str, Any] = CROSS) -> None:
    """Draw marks, such as those of diverged runs, at `x` and at the height `y` of the panel, from 0 to 1."""
    at_top = {"transform": ax.get_xaxis_transform(), "color": colour, "zorder": 4}
    ax.plot(x, np.full(len(x), y), **{**mark, **at_top})


def beside(width: Any, arm: str, styles: Styles) -> Any:
    """x of an arm at a width (a number or an array), shifted so that bars of arms do not overlap."""
    return width * 2 ** (0.05 * (list(styles).index(arm) - (len(styles) - 1) / 2))


def against_width(ax: Axes, widths: pd.Series) -> None:
    """Make the x axis log2 with a tick at each width."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    ticks = sorted(widths.unique())
    ax.set_xscale("log", base=2)
    ax.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.4)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())


def in_octaves(ax: Axes) -> None:
    """Make the y axis of a finished panel log2, two octaves high or more: it has ticks, and what is flat looks so."""
    ax.set_yscale("log", base=2)
    low, high = np.log2(ax.get_ylim())
    room = max(0.0, (2 - (high - low)) / 2)
    ax.set_ylim(2 ** (low - room), 2 ** (high + room))


def against_compute(ax: Axes, low: float, high: float) -> None:
    """Make the x axis logarithmic from below `low` to above `high`, with a few labelled ticks however short it is."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    room = max((high / low) ** 0.25, 1.6)  # for labels beside the points
    ratio = room**2 * high / low
    ax.set_xscale("log")
    ax.set_xlim(low / room, high * room)
    subs = (1, 2, 5) if ratio < 20 else (1, 3) if ratio < 100 else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs) if letters(ax) > 24 else LogLocator(numticks=3))
    ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def log_y(ax: Axes) -> None:
    """Make the y axis of a finished panel logarithmic, with a few ticks written out: 0.2 instead of 2 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not math.isfinite(ax.dataLim.minposy):  # nothing is drawn: the study has no finished runs yet
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ratio = high / low
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7) if ratio < 5 else (1, 1.5, 2, 3, 5, 7) if ratio < 20 else (1, 2, 5)
    ax.yaxis.set_major_locator(LogLocator(subs=subs if ratio < 200 else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def arm_styles(points: pd.DataFrame) -> Styles:
    """Colour, dashes and marker of each arm; references are grey and dashed."""
    references = points.groupby("arm", sort=False)["reference"].any()
    styles: Styles = {}
    for i, name in enumerate(references[references].index):
        grey, dashes = _GREYS[i % len(_GREYS)]
        styles[str(name)] = {"color": grey, "ls": dashes, "marker": "_"}
    return styles | line_styles(references[~references].index)


def line_styles(names: Iterable[str]) -> Styles:
    """Colour, dashes and marker of each name."""
    looks = (("color", colours()), ("ls", _DASHES), ("marker", _MARKERS))
    return {str(name): {look: values[i % len(values)] for look, values in looks} for i, name in enumerate(names)}


def optimizer_marks(optimizers: Iterable[str]) -> list[Mark]:
    """Legend entries of the optimizers' lines."""
    return [(optimizer_name(name), {"color": "0.3", "marker": "o", **OPTIMIZER_LOOKS[name]}) for name in optimizers]


def comparison_colours(n: int) -> list[str]:
    """Colours for n comparisons, other than those of the first arms."""
    every = colours()
    return [every[(number + 2) % len(every)] for number in range(n)]


Place = Literal["outside lower center", "outside upper center"]
_PANEL = 1.35
"""Inches of a panel under which labels of its ticks still fit, on paper."""
_LOWEST = 1.4
"""Inches of a row of panels, on paper, that a page of little height leaves it at least."""
_ROOM = 1.4
"""Inches of a legend, on paper, from which on arms have names without words."""


def add_legend(
    figure: Figure,
    points: pd.DataFrame,
    styles: Styles,
    marks: Iterable[Mark] = (),
    loc: Place = "outside lower center",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Add a legend of the arms and other marks (label, style), by default below the panels.

    `labels` say in words what an arm is (`arms.arm_labels`); where there is no room for that arms have their names.
    """
    references = set(points.loc[points["reference"], "arm"])
    marks = list(marks)

    def entries(words: Mapping[str, str]) -> list[Mark]:
        return [(words.get(arm, arm) + " (one lr)" * (arm in references), look) for arm, look in styles.items()] + marks

    if not labels or not mark_legend(figure, entries(labels), loc, at_most=_ROOM):
        mark_legend(figure, entries({}), loc)


def mark_legend(
    figure: Figure, marks: Iterable[Mark], loc: Place = "outside lower center", at_most: float = math.inf
) -> bool:
    """Add a legend of marks (label, style), by default below the panels; a mark without dashes has no line.

    It has as many columns as fit, up to four, and the figure grows by what it takes. A legend higher than `at_most`
    inches on paper is not added; whether it was.
    """
    from matplotlib.lines import Line2D

    most = max(letters_of(figure) - 8, 12)
    handles = [Line2D([], [], **{"ls": "none", **mark}, label=textwrap.fill(label, most)) for label, mark in marks]
    if not handles:
        return True
    for columns in range(min(len(handles), 4), 0, -1):
        legend = figure.legend(handles=handles, loc=loc, ncols=columns)
        box = legend.get_window_extent()
        if columns == 1 or _width_in_a_file(figure, legend) <= figure.get_figwidth():
            break
        legend.remove()
    if box.height / figure.dpi > at_most * scale():
        legend.remove()
        return False
    make_room(figure, box.height / figure.dpi - 0.35 * scale())
    return True


def _width_in_a_file(figure: Figure, legend: Any) -> float:
    """Inches, at the dots an inch of saved figures: letters are up to 6 % wider there than at the figure's own."""
    import matplotlib

    own, saved = figure.dpi, matplotlib.rcParams["savefig.dpi"]
    figure.set_dpi(own if saved == "figure" else saved)
    inches = legend.get_window_extent().width / figure.dpi
    figure.set_dpi(own)
    return float(inches)


def pairs_across() -> int:
    """Of panels that stand in pairs, and need more room than others, how many stand side by side: one in a column."""
    return 2 if most_across() > 2 else 1


def make_room(figure: Figure, inches: float) -> None:
    """Make a figure higher, for what stands below its panels."""
    figure.set_figheight(figure.get_figheight() + max(inches, 0))


def most_across() -> int:
    """Panels side by side that a page has room for in the style in force."""
    return max(int((page()[0] - 0.5) / _PANEL), 1)


def panel_grid(
    down: int, across: int, height: float, *, wide: bool = False, xlabel: str = "", ylabel: str = "", **shared: Any
) -> tuple[Figure, Any]:
    """A figure of `down` by `across` axes, with labels at its bottom and left.

    `height` is that of a row in inches, on paper. The figure is as wide as the panels need and at most the page, unless
    their labels would not fit there; `wide` makes it at least the page. Rows are lower where a page has a height.
    """
    from matplotlib.figure import Figure

    most, highest = page()
    width = max(most if wide else min(most, 1.0 + 2.4 * across), 0.5 + _PANEL * across)
    row = height if wide else min(height, 1.45 * width / across)
    whole = max(min(0.5 + row * down, highest), 0.5 + min(row, _LOWEST) * down)
    figure = Figure(figsize=(scale() * width, scale() * whole), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    return figure, axes


def label_bottoms(axes: Any, xlabel: str) -> None:
    """Label the x axis of the lowest panel of each column of a grid, those of other panels being the same."""
    for column in axes.T:
        shown = [ax for ax in column if ax.axison]
        shown[-1].set_xlabel(xlabel)


def entitle(ax: Axes, *parts: str) -> None:
    """Set the title of a panel: its parts on one line, or on lines of their own where that is wider than the panel."""
    title, most = ", ".join(filter(None, parts)), letters(ax)
    if len(title.replace("$", "")) > most:
        title = "\n".join(textwrap.fill(part, most) for part in parts if part)
    ax.set_title(title)

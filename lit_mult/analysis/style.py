"""Shared by figures: style, the style of each arm, and creating and saving figures without pyplot."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np
import pandas as pd

from lit_mult.analysis.frame import optimizer_name
from lit_mult.registry.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # for annotations, here and elsewhere: matplotlib is loaded when a figure is drawn

P = ParamSpec("P")
Styles = dict[str, dict[str, Any]]
Mark = tuple[str, dict[str, Any]]
"""(label, style) of an entry of a legend."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (5, 1.5)), "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "D", "v", "P", "h", "p")
_GREYS = (("0.25", (0, (4, 2))), ("0.5", (0, (2, 2))), ("0.4", (0, (7, 2, 2, 2))))
LOSS = "validation loss\n(nats per token)"
_STYLE: Any = {
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "svg.hashsalt": "lit_mult",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}
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


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Apply the project's style in a plotting function, without changing matplotlib's global settings."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def save(figure: Figure) -> dict[str, bytes]:
    """The figure as files: ending ("png", "svg") -> content; no dates inside."""
    import matplotlib

    files = {}
    with matplotlib.rc_context(_STYLE):
        figure.draw_without_rendering()  # the layout of long labels beside a legend takes a second pass to settle
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=metadata)
            files[ending] = buffer.getvalue()
            figure.set_layout_engine("none")  # laid out by now: both files get the same layout, the second for nothing
    return files


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
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 20 else (1, 3) if ratio < 100 else (1,)))
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
    looks = (("color", _COLOURS), ("ls", _DASHES), ("marker", _MARKERS))
    return {str(name): {look: values[i % len(values)] for look, values in looks} for i, name in enumerate(names)}


def optimizer_marks(optimizers: Iterable[str]) -> list[Mark]:
    """Legend entries of the optimizers' lines."""
    return [(optimizer_name(name), {"color": "0.3", "marker": "o", **OPTIMIZER_LOOKS[name]}) for name in optimizers]


def comparison_colours(n: int) -> list[str]:
    """Colours for n comparisons, other than those of the first arms."""
    return [_COLOURS[(number + 2) % len(_COLOURS)] for number in range(n)]


def add_legend(
    figure: Figure,
    points: pd.DataFrame,
    styles: Styles,
    marks: Iterable[Mark] = (),
    loc: Literal["outside lower center", "outside upper center"] = "outside lower center",
) -> None:
    """Add a legend of the arms and other marks (label, style), by default below the panels."""
    references = set(points.loc[points["reference"], "arm"])
    arms = [(f"{arm} (one lr)" if arm in references else arm, style) for arm, style in styles.items()]
    mark_legend(figure, [*arms, *marks], loc)


def mark_legend(
    figure: Figure,
    marks: Iterable[Mark],
    loc: Literal["outside lower center", "outside upper center"] = "outside lower center",
) -> None:
    """Add a legend of marks (label, style), by default below the panels; a mark without dashes has no line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{"ls": "none", **mark}, label=label) for label, mark in marks]
    most = 4 if figure.get_figwidth() > 5 else 2  # columns that a figure of one panel has no room for are cut off
    figure.legend(handles=handles, loc=loc, ncols=min(len(handles), most))


def panel_grid(
    down: int, across: int, height: float, *, width: float = 0, xlabel: str = "", ylabel: str = "", **shared: Any
) -> tuple[Figure, Any]:
    """A figure of `down` by `across` axes, with labels at its bottom and left.

    `height` is that of a row in inches, `width` that of the figure: at most 7 inches, as the panels need, by default.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or min(7.0, 1.0 + 2.4 * across), 0.5 + height * down))
    axes = figure.subplots(down, across, squeeze=False, **shared)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    return figure, axes

"""Matplotlib style sheets of the figures, and what draws in them: without pyplot, without changing global settings.

The sheets are matplotlib's own kind: `plt.style.use(["lit_mult.analysis.styles.lit_mult",
"lit_mult.analysis.styles.talk"])` takes them by themselves.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, get_args

import numpy as np

from lit_mult.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # for annotations, here and elsewhere: matplotlib is loaded when a figure is drawn

P = ParamSpec("P")
StyleName = Literal["paper", "talk", "poster"]
Width = Literal["page", "column"]
_COLUMN: Final = 3.25 / 6.75
_SLIDE: Final = 5.625  # inches of height that figures of a talk share, however many rows they have
_CHOSEN: ContextVar[tuple[StyleName | None, Width] | None] = ContextVar("_CHOSEN", default=None)


@contextmanager
def figure_style(style: StyleName | None = "paper", width: Width = "page") -> Iterator[None]:
    """Draw figures in a style, those of this package and any other that matplotlib makes.

    Args:
        style: "paper" (8 points on 6.75 inches, as a page of ICML or NeurIPS has), "talk" (13 points on a slide of
            10 by 5.625 inches), "poster" (20 points on 10 inches), or None for matplotlib's rcParams as they are, such
            as those of `plt.style.context`. Settings that change inside the context win.
        width: of what a figure may fill: "page", or "column", one of two of a page: 3.25 inches on paper. A figure with
            more panels side by side than that has room for is wider.

    Raises:
        UserError: no such style or width.
    """
    import matplotlib

    for name, value, known in (("style", style or "paper", StyleName), ("width", width, Width)):
        if value not in get_args(known):
            raise UserError(f"{name}: {value}: must be one of {', '.join(get_args(known))}")
    sheet = _sheet(style) if style else {}
    with matplotlib.rc_context(sheet):
        if width == "column":
            whole, height = matplotlib.rcParams["figure.figsize"]
            matplotlib.rcParams["figure.figsize"] = (whole * _COLUMN, height * _COLUMN)
        token = _CHOSEN.set((style, width))
        try:
            yield
        finally:
            _CHOSEN.reset(token)


def in_force() -> AbstractContextManager[None]:
    """The style that `figure_style` has chosen, or else that of papers."""
    return nullcontext() if _CHOSEN.get() else figure_style()


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the style in force, without changing matplotlib's global settings.

    A plotting function gives sizes of lines and markers as the paper's style has them: they grow with `lines.linewidth`
    and `lines.markersize`. Labels of axes that are longer than their panel are broken.
    """

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with in_force():
            paper: Any = {name: _sheet("paper")[name] for name in ("lines.linewidth", "lines.markersize")}
            settings: Any = matplotlib.rcParams
            lines, markers = (settings[name] / size for name, size in paper.items())
            with matplotlib.rc_context(paper):
                figure = draw(*args, **kwargs)
            _break_labels(figure)
            if (lines, markers) != (1, 1):
                _enlarge(figure, lines, markers)
        return figure

    return wrapper


def save(figure: Figure) -> dict[str, bytes]:
    """The figure as files: ending ("png", "svg") -> content; no dates inside."""
    import matplotlib

    files = {}
    with in_force(), matplotlib.rc_context({"svg.hashsalt": "lit_mult"}):
        figure.draw_without_rendering()  # the layout of long labels beside a legend takes a second pass to settle
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=metadata)
            files[ending] = buffer.getvalue()
            figure.set_layout_engine("none")  # laid out by now: both files get the same layout, the second for nothing
    return files


def scale() -> float:
    """Size of type in force over that of papers. Panels grow with it, so that labels have the same room."""
    import matplotlib

    return float(matplotlib.rcParams["font.size"] / _sheet("paper")["font.size"])


def page() -> tuple[float, float]:
    """Width and height in inches that a figure may fill in the style in force, over `scale`."""
    import matplotlib

    style, _ = _CHOSEN.get() or (None, None)
    return float(matplotlib.rcParams["figure.figsize"][0]) / scale(), _SLIDE / scale() if style == "talk" else math.inf


def grid_of(ax: Axes) -> tuple[Figure, int, int]:
    """The figure of a panel, and the numbers of rows and columns of its panels."""
    figure, place = ax.get_figure(root=True), ax.get_subplotspec()
    assert figure is not None
    assert place is not None
    down, across = place.get_gridspec().get_geometry()
    return figure, down, across


def letters(ax: Axes) -> int:
    """How many letters of text the width of a panel has room for."""
    figure, _, across = grid_of(ax)
    return int((0.8 * letters_of(figure) - 5) / across)


def letters_of(figure: Figure) -> int:
    """How many letters of text the width of a figure has room for: 16 an inch on paper."""
    return int(16 * figure.get_figwidth() / scale())


def colours() -> list[str]:
    """The colours of lines in the style in force."""
    import matplotlib

    with in_force():
        return list(matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])


@cache
def _sheet(style: str) -> Any:
    """Settings of a style, as `rc_context` takes them."""
    import matplotlib

    settings: Any = {}
    for name in ("lit_mult", style):
        path = Path(__file__).with_name(f"{name}.mplstyle")
        settings |= matplotlib.rc_params_from_file(path, use_default_template=False)
    return settings


def _break_labels(figure: Figure) -> None:
    """Break labels of axes that are longer than their panel, if they are not broken yet."""
    height = letters_of(figure) * figure.get_figheight() / figure.get_figwidth()
    for ax in figure.axes:
        if ax.get_subplotspec() is not None:
            _, down, _ = grid_of(ax)
            for axis, room in ((ax.xaxis, letters(ax)), (ax.yaxis, int(0.9 * height / down) - 3)):
                text = axis.get_label_text()
                if "\n" not in text and len(text) > room:
                    # Formulas stay whole: they are long words.
                    broken = textwrap.fill(text, max(room, 1), break_long_words=False, break_on_hyphens=False)
                    axis.set_label_text(broken)


def _enlarge(figure: Figure, lines: float, markers: float) -> None:
    """Multiply widths of lines and sizes of markers, but for those of the axes, which have settings of their own."""
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D

    of_axes = {id(line) for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for line in axis.findobj(Line2D)}
    for line in figure.findobj(Line2D):
        if id(line) not in of_axes:
            line.set(linewidth=lines * line.get_linewidth(), markersize=markers * line.get_markersize())
            line.set_markeredgewidth(lines * line.get_markeredgewidth())
    for collection in figure.findobj(Collection):
        collection.set_linewidth((lines * np.asarray(collection.get_linewidth())).tolist())

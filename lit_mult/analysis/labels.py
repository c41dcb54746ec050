"""Labels beside points, each on the side where it covers the least ink."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lit_mult.analysis.seeds import Floats
from lit_mult.analysis.styles import Axes, grid_of, scale

_GAP = np.array([3.0, 2.0])  # between a label and its points, or another label
_SIDES = tuple(map(np.array, ((-1, -1), (1, 1), (-1, 1), (1, -1), (0, 1), (0, -1))))  # left or right, below or above
_ALIGNED = ({-1: "right", 0: "center", 1: "left"}, {-1: "top", 1: "bottom"})
_SIZE = 7  # of the font, on paper


def label_points(ax: Axes, labels: Iterable[tuple[str, Floats]], strokes: Iterable[Floats]) -> None:
    """Write each text beside its points, on the side where it covers least of the strokes and of the texts before it.

    Points and strokes (lines from point to point) are arrays of (x, y) rows in the axes' data. The limits of the axes
    must be final.
    """
    on_panel, panel = ax.transScale + ax.transLimits, _points_of(ax)
    ink = np.concatenate([_dense(on_panel.transform(stroke) * panel) for stroke in strokes])
    size_of_type = _SIZE * scale()
    taken: list[tuple[Floats, Floats]] = []
    for text, points in labels:
        at = on_panel.transform(points) * panel
        low, high = at.min(axis=0) - _GAP, at.max(axis=0) + _GAP
        size = np.array([0.57 * size_of_type * len(text.replace("$", "")), size_of_type])
        spots = []
        for side in _SIDES:
            start = np.where(side < 0, low - size, np.where(side > 0, high, (low + high - size) / 2))
            end = start + size
            covered = ((ink > start - 1) & (ink < end + 1)).all(axis=1).sum()
            covered += sum(100 for other in taken if (start - _GAP < other[1]).all() and (end + _GAP > other[0]).all())
            covered += 100 * bool((start < 0).any() or (end > panel).any())
            spots.append((int(covered), start, end))
        best = min(range(len(_SIDES)), key=lambda spot: spots[spot][0])
        side = _SIDES[best]
        taken.append(spots[best][1:])
        corner = np.where(side < 0, points.min(axis=0), np.where(side > 0, points.max(axis=0), points.mean(axis=0)))
        ha, va = (names[int(way)] for names, way in zip(_ALIGNED, side, strict=True))
        ax.annotate(text, corner, side * _GAP, textcoords="offset points", fontsize=size_of_type, ha=ha, va=va)


def _points_of(ax: Axes) -> Floats:
    """Width and height of a panel of `style.panel_grid` in typographic points, near enough before it is laid out."""
    figure, down, across = grid_of(ax)
    inches: Floats = figure.get_size_inches() - 0.5 * scale()
    return 72 * inches / (across, down) * (0.86, 0.75)


def _dense(path: Floats) -> Floats:
    """The path as points that no label can lie between."""
    steps = np.linspace(0, len(path) - 1, 60 * (len(path) - 1) + 1)
    return np.stack([np.interp(steps, np.arange(len(path)), column) for column in path.T], axis=1)

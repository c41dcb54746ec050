"""Multiplier kinds: what each adds to a weight matrix W (d_out, d_in), and what may be done with it.

A kind has some of three multipliers, which act on the effective matrix as a product:

    W_eff[i,j] = constant * scalar * row[i] * W'[i,j] * column[j]

W' is W, or what the kind's formula makes of it. So shapes, redundancies (`method.symmetry`) and merging (W_eff in place
of W) are the same for all kinds, and a kind says the rest: which multipliers, their start, the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from lit_mult.registry import with_plugins
from lit_mult.registry.roles import Shape


class Axis(StrEnum):
    """A multiplier of a matrix W (d_out, d_in)."""

    SCALAR = "scalar"
    ROW = "row"
    COLUMN = "column"

    def shape(self, matrix: Shape) -> tuple[int, ...]:
        """Shape of the multiplier: (), (d_out,) or (d_in,)."""
        return {Axis.SCALAR: (), Axis.ROW: matrix[:1], Axis.COLUMN: matrix[1:]}[self]


Axes = frozenset[Axis]
NONE: Axes = frozenset()
SCALAR: Axes = frozenset({Axis.SCALAR})
ROW: Axes = frozenset({Axis.ROW})
ROW_COLUMN: Axes = frozenset({Axis.ROW, Axis.COLUMN})


@dataclass(frozen=True)
class Kind:
    """A choice of `multipliers`."""

    name: str
    label: str
    """What it is, in words for a model card or a figure."""
    help: str
    """What it is, for `--help`."""
    axes: Callable[[Axes], Axes]
    """Learnable multipliers of a matrix, from those that the placement table gives it."""
    forward: Literal["unused", "constant", "start"]
    """Use of a preset's forward multipliers: none; a constant; or, with `placement.init: preset`, where the learnable
    multipliers start."""
    formula: str = "lit_mult.nn.multipliers:PRODUCT"
    """The `nn.multipliers.Formula` that makes W_eff."""
    start: Callable[[Axis, Shape, float], float] = lambda axis, shape, init_std: 1.0
    """(axis, shape, init std of W) -> value at which the multiplier starts where W_eff is to be W; where that depends
    on the very weights, its expectation."""

    @property
    def is_learnable(self) -> bool:
        """Whether matrices have any learnable multiplier."""
        return bool(self.axes(ROW_COLUMN))

    def uses_forward(self, init: str) -> bool:
        """Whether a run uses a preset's forward multipliers; `init` is `placement.init`."""
        return self.forward == "constant" or (self.forward == "start" and init == "preset")


def _none(_: Axes) -> Axes:
    return NONE


def _row_norm(axis: Axis, shape: Shape, init_std: float) -> float:
    return init_std * math.sqrt(shape[1]) if axis is Axis.ROW else 1.0


KINDS: Final = with_plugins(
    (
        Kind("none", "no multipliers", "W itself", _none, "unused"),
        Kind("fixed", "fixed multipliers", "the preset's forward multipliers", _none, "constant"),
        Kind(
            "scalar",
            "learnable scalar multipliers",
            "one learnable scalar a matrix",
            axes=lambda table: SCALAR if table else NONE,
            forward="start",
        ),
        Kind(
            "vector",
            "learnable vector multipliers",
            "learnable row and column vectors, as the placement has them",
            axes=lambda table: table,
            forward="start",
        ),
        Kind(
            "weight_norm",
            "weight normalization",
            "a learnable norm for each row, wherever the placement has a multiplier (arXiv:1602.07868)",
            axes=lambda table: ROW if table else NONE,
            forward="start",
            formula="lit_mult.nn.weight_norm:WEIGHT_NORM",
            start=_row_norm,
        ),
    ),
    "lit_mult.kinds",
)
"""Name -> kind; the order is that of arms in tables and figures."""

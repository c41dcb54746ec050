"""The multiplier kinds."""

from __future__ import annotations

import math
from typing import Final

from lit_mult.errors import ConfigError
from lit_mult.registry import with_plugins
from lit_mult.registry.contracts import NONE, ROW, SCALAR, Axes, Axis, Kind
from lit_mult.registry.roles import Shape


def _none(_: Axes) -> Axes:
    return NONE


def _scaled_softplus(start: float, factor: float) -> float:
    """x with softplus(x) = factor * softplus(start); written so that no exponential overflows."""
    gain = factor * (max(start, 0.0) + math.log1p(math.exp(-abs(start))))
    return gain + math.log(-math.expm1(-gain))


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
            "learnable row + column multipliers",
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
        Kind(
            "softplus",
            "softplus gains",
            "learnable row and column vectors, each the softplus of what is trained (arXiv:2606.25971)",
            axes=lambda table: table,
            forward="start",
            formula="lit_mult.nn.softplus:SOFTPLUS",
            start=lambda axis, shape, init_std: math.log(math.e - 1),  # whose softplus is 1
            scaled=_scaled_softplus,
            # Its redundancies are those of the gains; the diagnostics read what is trained, whose logarithms are not
            # those of the gains.
            is_product=False,
        ),
    ),
    "lit_mult.kinds",
)
"""Name -> kind; the order is that of arms in tables and figures."""


def check_redundancies(kind: str, feature: str) -> None:
    """Raises: ConfigError when the redundancies of a kind, which a feature needs, are unknown."""
    if not KINDS[kind].is_product:
        raise ConfigError("multipliers", kind, f"is no product of multipliers and matrix, which {feature} needs")

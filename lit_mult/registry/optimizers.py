"""Optimizers: which parameters each trains, how its steps scale with width, and what may be done with it.

A run has one `optimizer`. It trains the matrices of the roles that it names; `others` says who trains the rest, which
is AdamW unless it says otherwise. What an entry leaves out (None) is unsupported: whatever needs it raises one line
(`unsupported`), and nothing falls back to another optimizer's formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lit_mult.errors import ConfigError
from lit_mult.registry import with_plugins
from lit_mult.registry.roles import HIDDEN_ROLES, MATRIX_ROLES, Role


class Matrix(NamedTuple):
    """What the step of an optimizer on a matrix may depend on."""

    d_out: int
    d_in: int
    init_std: float


@dataclass(frozen=True)
class OptimizerSpec:
    """A choice of `optimizer`."""

    name: str
    label: str
    """How it is written in tables and figures."""
    help: str
    """What it is, for `--help`."""
    trains: frozenset[Role]
    """Roles of the matrices that it updates."""
    build: str
    """"module:callable" that makes the `torch.optim.Optimizer` from (parameter groups, OptimConfig)."""
    others: Mapping[Role, str] = field(default_factory=dict)
    """Role -> optimizer of parameters that it does not train; AdamW trains the roles that are not named."""
    width_factor: Callable[[Matrix, Matrix], float] | None = None
    """(matrix, the same at base width) -> factor on the lr at which activations change alike at every width."""
    width_exponent: float | None = None
    """Power of the width that `width_factor` has for a hidden matrix of fixed aspect ratio, stated independently of
    it: the coordinate check holds one against the other."""
    width_rules: frozenset[str] = frozenset({"lr", "lr_wd", "multiplier"})
    """Values of `parametrization.width_rule` that make sense for it."""
    decays: bool = True
    """Whether weight decay applies to its matrices."""
    noise: str | None = None
    """"module:attribute" of its `optim.noise.NoiseReference`: what it makes of gradients that are pure noise."""
    stacked: str | None = None
    """"module:class" of its `optim.stacking.StackedUpdate`: the update of many models at once."""


def adamw_width_factor(matrix: Matrix, base: Matrix) -> float:
    """Entries of size lr that align with the input give |dW|_2 ~ lr sqrt(d_out d_in), hence lr ~ 1 / d_in.

    Sources: arXiv:2203.03466 table 3; "LR only" in arXiv:2601.04890 table 1.
    """
    return base.d_in / matrix.d_in


def muon_width_factor(matrix: Matrix, base: Matrix) -> float:
    """Muon matched to Adam's RMS: dW = 0.2 lr sqrt(max(d_out, d_in)) O with O orthogonal.

    So |dW|_2 is lr sqrt(max(d_out, d_in)) and lr ~ sqrt(d_out / d_in / max(d_out, d_in)), which is 1 / sqrt(m) for a
    fixed aspect ratio, not 1 / m: an orthogonal update does not pile up in one direction.
    """
    unit = matrix.d_out / matrix.d_in / max(matrix.d_out, matrix.d_in)
    base_unit = base.d_out / base.d_in / max(base.d_out, base.d_in)
    return math.sqrt(unit / base_unit)


OPTIMIZERS: Final = with_plugins(
    (
        OptimizerSpec(
            "adamw",
            "AdamW",
            "AdamW for all parameters",
            trains=MATRIX_ROLES,
            build="lit_mult.optim.adamw:build",
            width_factor=adamw_width_factor,
            width_exponent=-1.0,
            noise="lit_mult.optim.adamw:NOISE",
            stacked="lit_mult.optim.adamw:StackedAdamW",
        ),
        OptimizerSpec(
            "muon",
            "Muon",
            "Muon for the hidden matrices, AdamW for the rest",
            trains=HIDDEN_ROLES,  # embedding, head, norms and multipliers stay under AdamW (arXiv:2502.16982)
            build="lit_mult.optim.muon:build",
            width_factor=muon_width_factor,
            width_exponent=-0.5,
            noise="lit_mult.optim.muon:NOISE",
            stacked="lit_mult.optim.muon:StackedMuon",
        ),
    ),
    "lit_mult.optimizers",
)
"""Name -> optimizer. The order is that of the parts of a `HybridOptimizer`, and so of its parameter groups."""


def trained_by(role: Role, optimizer: str) -> str:
    """The optimizer of a parameter's role in a run of this optimizer."""
    spec = OPTIMIZERS[optimizer]
    return optimizer if role in spec.trains else spec.others.get(role, "adamw")


def unsupported(optimizer: str, lacks: str, feature: str) -> ConfigError:
    """The error of a feature that needs what an optimizer's entry leaves out."""
    return ConfigError("optimizer", optimizer, f"has no {lacks}, which {feature} needs")

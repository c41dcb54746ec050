"""The contracts of what can be chosen; entries of other packages import them from here. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from lit_mult.registry.roles import Role, Shape


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
    """A choice of `multipliers`: what it adds to a weight matrix W (d_out, d_in), and what may be done with it.

    A kind has some of three multipliers, which act on the effective matrix as a product:

        W_eff[i,j] = constant * scalar * row[i] * W'[i,j] * column[j]

    W' is W, or what the kind's formula makes of it. So shapes, redundancies (`method.symmetry`) and merging (W_eff in
    place of W) are the same for all kinds, and a kind says the rest: which multipliers, their start, the formula.
    """

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


class Matrix(NamedTuple):
    """What the step of an optimizer on a matrix may depend on."""

    d_out: int
    d_in: int
    init_std: float


@dataclass(frozen=True)
class OptimizerSpec:
    """A choice of `optimizer`: which parameters it trains, how its steps scale with width, what may be done with it.

    What an entry leaves out (None) is unsupported: whatever needs it raises one line (`optimizers.unsupported`), and
    nothing falls back to another optimizer's formula.
    """

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

"""The types of registry entries, also for other packages. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple

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
PLAIN: Final = "lit_mult.nn.multipliers:PRODUCT"


@dataclass(frozen=True)
class Kind:
    """A choice of `multipliers` for weight matrices W (d_out, d_in).

    A kind uses some of three multipliers, which usually act on the effective matrix as a product:

        W_eff[i,j] = constant * scalar * row[i] * W'[i,j] * column[j]

    W' is W, transformed by the kind's formula. Shapes and merging (W_eff in place of W) are the same for all kinds,
    redundancies (`method.symmetry`) for all products; a kind defines its multipliers, their initial values and the
    formula.
    """

    name: str
    label: str
    """Description for model cards and figures."""
    help: str
    """Description for `--help`."""
    axes: Callable[[Axes], Axes]
    """Axes in the placement table -> learnable multipliers of a matrix."""
    forward: Literal["unused", "constant", "start"]
    """Use of a preset's forward multipliers: none; as a constant; or, with `placement.init: preset`, as initial values
    of learnable multipliers."""
    formula: str = PLAIN
    """The `nn.multipliers.Formula` that makes W_eff."""
    start: Callable[[Axis, Shape, float], float] = lambda axis, shape, init_std: 1.0
    """(axis, shape, init std of W) -> initial value of the multiplier for W_eff = W; its expectation if that depends on
    the weights."""
    scaled: Callable[[float, float], float] = lambda start, factor: start * factor
    """(initial value of a multiplier, factor) -> the initial value for `factor` times W_eff."""
    is_product: bool = True
    """Whether W_eff is that product. Redundancies of other kinds are unsupported."""

    @property
    def is_learnable(self) -> bool:
        """Whether matrices have any learnable multiplier."""
        return bool(self.axes(ROW_COLUMN))

    @property
    def is_plain(self) -> bool:
        """Whether the formula is the product itself, W' = W."""
        return self.formula == PLAIN

    def uses_forward(self, init: str) -> bool:
        """Whether a run uses a preset's forward multipliers; `init` is `placement.init`."""
        return self.forward == "constant" or (self.forward == "start" and init == "preset")


@dataclass(frozen=True)
class OptimizerSettings:
    """What all groups of an optimizer share; `config.OptimConfig` has the same fields."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Momentum of Muon, Nesterov's, and of Muown."""
    muon_ns_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    muown_norm_lr: float | None = None
    """Muown's learning rate of row norms; None: that of the matrix."""
    sphere: Literal["matrix", "row"] = "matrix"
    """What keeps its norm under the optimizers on spheres."""
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """Coefficients of these iterations; see `optim.muon.COEFFICIENTS`."""
    scion_radius: float = 50.0
    """Radius of the spectral balls of hidden matrices under Scion."""
    scion_sign_radius: float = 3000.0
    """Radius of the balls of the largest entry under Scion: that of the LM head."""
    scion_momentum: float = 0.9
    """Decay rate of Scion's momentum."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of an optimizer by import path."""


class Matrix(NamedTuple):
    """Properties of a matrix that an optimizer's width factor may depend on."""

    d_out: int
    d_in: int
    init_std: float


@dataclass(frozen=True)
class OptimizerSpec:
    """A choice of `optimizer`: which parameters it trains, and how its steps scale with width.

    None means unsupported: a feature that needs the entry raises `optimizers.unsupported`. There are no fallbacks.
    """

    name: str
    label: str
    """Name in tables and figures."""
    help: str
    """Description for `--help`."""
    trains: frozenset[Role]
    """Roles of the matrices that it trains."""
    build: str
    """"module:callable" that makes the `torch.optim.Optimizer` from (parameter groups, `OptimizerSettings`)."""
    others: Mapping[Role, str] = field(default_factory=dict)
    """Role -> optimizer of other parameters; AdamW for all other roles."""
    width_factor: Callable[[Matrix, Matrix], float] | None = None
    """(matrix, the same at base width) -> factor on the lr for which activations change equally at every width."""
    width_exponent: float | None = None
    """Exponent of `width_factor` in the width, for a hidden matrix of fixed aspect ratio; stated independently, as the
    coordinate check compares the two."""
    width_rules: frozenset[str] = frozenset({"lr", "lr_wd", "lr_sqrt_wd", "multiplier"})
    """Supported values of `parametrization.width_rule`."""
    depth_rules: frozenset[str] = frozenset()
    """Supported values of `parametrization.depth_rule` other than none; `method.rules.depth_scaling` assumes steps of a
    size that does not depend on that of the gradients."""
    has_eps: bool = False
    """Whether the `eps` of its parameter groups is Adam's epsilon, `OptimizerSettings.eps` by default."""
    decays: bool = True
    """Whether weight decay applies to its matrices."""
    decays_entries: bool = True
    """Whether some entries may decay and others not, after the step, as cautious decay has it (`optim.decay`). False if
    the state would not follow."""
    own_decay: float | None = None
    """Weight decay that is part of the method, in place of `optim.weight_decay`, its mode and factors by role."""
    owns_weights: bool = False
    """Whether its state or its step settles the norms of its matrices, so that nothing else may change them."""
    noise: str | None = None
    """"module:attribute" of its `optim.noise.NoiseReference`."""
    stacked: str | None = None
    """"module:class" of its `optim.stacking.StackedUpdate`."""
    sharded: bool = False
    """Whether its step on sharded parameters (DTensors), alone or beside whole ones, is that on whole ones."""


@dataclass(frozen=True)
class RowParts:
    """Several matrices in one (d_out, d_in): its rows are `groups` repetitions of blocks, one block a part.

    (1, (d_q, d_k, d_v)) for query, key and value one after the other; (n_heads, (head_dim, head_dim, head_dim)) where
    each head has its own three, as in GPT-NeoX.
    """

    groups: int
    sizes: tuple[int, ...]
    """Rows of the block of each part; a part has `groups` times as many."""

    @property
    def rows(self) -> int:
        """d_out of the fused matrix."""
        return self.groups * sum(self.sizes)

"""Weight matrices with multipliers. The plain kinds: W_eff[i,j] = constant * scalar * row[i] * W[i,j] * column[j].

Source: arXiv:2601.04890 eq. 2 and 3; autograd through `effective_weight` gives eq. 4. Fixed multipliers are the
constant, learnable ones are parameters. The product is formed on the weight (d_out * d_in elements, once per forward
pass), never on activations (batch * time * width elements).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_mult.nn.functional import linear
from lit_mult.nn.precision import NARROW, keeping_float32
from lit_mult.registry import load
from lit_mult.registry.contracts import Axis
from lit_mult.registry.kinds import KINDS

if TYPE_CHECKING:
    from lit_mult.method.plan import MatrixPlan


def effective_weight(
    weight: Tensor,
    constant: float | Tensor = 1.0,
    scalar: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
) -> Tensor:
    """The matrix that multiplies the input; `weight` itself when every multiplier is absent.

    Args:
        weight: (d_out, d_in)
        constant: fixed multiplier
        scalar: ()
        row: (d_out,)
        column: (d_in,)
    """
    scale = constant if scalar is None else constant * scalar
    plain = scalar is None and not isinstance(constant, Tensor) and constant == 1.0
    # The scale multiplies a vector if there is one, to read the matrix as few times as possible.
    if row is not None:
        weight = weight * (row if plain else row * scale)[..., :, None]
        plain = True
    if column is not None:
        weight = weight * (column if plain else column * scale)[..., None, :]
        plain = True
    return weight if plain else weight * scale


def constant_start(axis: Axis, weight: Tensor, value: float, unit: float) -> Tensor:
    """The planned initial value of a multiplier, independent of the weights."""
    return weight.new_full(axis.shape((weight.shape[0], weight.shape[1])), value)


@dataclass(frozen=True)
class Formula:
    """The computation of a kind of multipliers (`registry.kinds`)."""

    effective_weight: Callable[..., Tensor]
    """W_eff from the arguments of `effective_weight`, which may have a leading dimension (stacks)."""
    start: Callable[[Axis, Tensor, float, float], Tensor] = constant_start
    """(multiplier, weight (d_out, d_in), planned value, value for W_eff = W) -> initial value of the multiplier.
    Both values are expectations if that depends on the weights."""
    takes_zero_rows: bool = False
    """Whether it is defined on a matrix with rows of zeros; asked of formulas other than `PRODUCT`."""


PRODUCT = Formula(effective_weight)


class MultipliedMatrix(nn.Module):
    """A weight matrix of one role with the multipliers that its plan gives it."""

    constant: float | Tensor
    scalar: nn.Parameter | None
    row: nn.Parameter | None
    column: nn.Parameter | None

    def __init__(self, plan: MatrixPlan, weight: nn.Parameter | None = None) -> None:
        """Allocate the parameters, uninitialized (see `nn.init`); a given `weight` is shared (tied embeddings)."""
        super().__init__()
        self.role = plan.role
        self.formula: Formula = load(KINDS[plan.kind].formula)
        self.constant = plan.constant
        self.weight = nn.Parameter(torch.empty(plan.shape)) if weight is None else weight
        for axis in Axis:
            multiplier = nn.Parameter(torch.empty(axis.shape(plan.shape))) if axis in plan.axes else None
            self.register_parameter(axis.value, multiplier)

    @property
    def multipliers(self) -> dict[Axis, nn.Parameter]:
        """Its learnable multipliers."""
        found = {axis: getattr(self, axis.value) for axis in Axis}
        return {axis: multiplier for axis, multiplier in found.items() if multiplier is not None}

    @torch.no_grad()
    def start_multipliers(self, plan: MatrixPlan) -> None:
        """Set the multipliers to their start, which may depend on the weight."""
        for axis, multiplier in self.multipliers.items():
            unit = KINDS[plan.kind].start(axis, plan.shape, plan.init_std)
            multiplier.copy_(self.formula.start(axis, self.weight, plan.start[axis], unit))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts the matrix alone to 16 bits, see `nn.precision`."""
        keep, ndim = keeping_float32(fn), self.weight.ndim
        super()._apply(lambda x: (fn if x.ndim == ndim else keep)(x), recurse)  # type: ignore[no-untyped-call]
        return self

    def effective_weight(self) -> Tensor:
        """W_eff (d_out, d_in), differentiable in the weight and in every multiplier; in the weight's dtype."""
        return self.form(self.weight, self.scalar, self.row, self.column)

    def form(
        self, weight: Tensor, scalar: Tensor | None = None, row: Tensor | None = None, column: Tensor | None = None
    ) -> Tensor:
        """`effective_weight` from other values of the parameters."""
        arguments = (self.constant, scalar, row, column)
        if weight.dtype in NARROW and any(part is not None for part in arguments[1:]):
            # Rounded once, as a product: a multiplier near 1 would be rounded to 1.
            return self.formula.effective_weight(weight.float(), *arguments).to(weight.dtype)
        return self.formula.effective_weight(weight, *arguments)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_eff (d_out, d_in) for inference, formed in float64 and cast once; the module is left as it is."""
        multipliers = (None if part is None else part.double() for part in (self.scalar, self.row, self.column))
        weight = self.formula.effective_weight(self.weight.double(), self.constant, *multipliers)
        return weight.to(self.weight.dtype, copy=True)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        axes = "+".join(self.multipliers) or "none"
        return f"{d_out}x{d_in}, role={self.role.value}, multipliers={axes}, constant={self.constant:g}"


class MultipliedLinear(MultipliedMatrix):
    """y = W_eff x without bias; x (..., d_in) -> y (..., d_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.effective_weight())


class MultipliedEmbedding(MultipliedMatrix):
    """Rows of W_eff (vocabulary, d_model) by token; ids (...) -> (..., d_model)."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.effective_weight())

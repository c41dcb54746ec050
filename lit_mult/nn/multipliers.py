"""Weight matrices with multipliers: W_eff[i,j] = constant * scalar * row[i] * W[i,j] * column[j].

Source: arXiv:2601.04890 eq. 2 and 3; autograd through `effective_weight` gives eq. 4. Fixed multipliers are the
constant, learnable ones are parameters, and both take this one path. The product is formed on the weight (d_out * d_in
elements, once a forward), never on activations (batch * time * width elements).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_mult.method.placement import Axis
from lit_mult.method.plan import MatrixPlan
from lit_mult.nn.functional import embedding, linear


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

    Of a stack of M models everything has a leading dimension M; a constant is (M,), or one for all.
    """
    scale = constant if scalar is None else constant * scalar
    plain = scalar is None and not isinstance(constant, Tensor) and constant == 1.0
    # The scale joins a vector where there is one, so that the matrix is read as few times as possible.
    if row is not None:
        weight = weight * (row if plain else row * _along(scale, 1))[..., :, None]
        plain = True
    if column is not None:
        weight = weight * (column if plain else column * _along(scale, 1))[..., None, :]
        plain = True
    return weight if plain else weight * _along(scale, 2)


def _along(scale: float | Tensor, dims: int) -> float | Tensor:
    """The scale of one model, or (M,) those of a stack with `dims` dimensions behind them."""
    return scale.view(-1, *[1] * dims) if isinstance(scale, Tensor) and scale.ndim else scale


class MultipliedMatrix(nn.Module):
    """A weight matrix of one role with the multipliers that its plan gives it."""

    constant: float | Tensor
    scalar: nn.Parameter | None
    row: nn.Parameter | None
    column: nn.Parameter | None

    def __init__(self, plan: MatrixPlan, weight: nn.Parameter | None = None) -> None:
        """Allocate the parameters, uninitialized (see `nn.init`); a given `weight` is shared (tied embeddings)."""
        super().__init__()
        d_out, d_in = plan.shape
        self.role = plan.role
        self.constant = plan.constant
        self.weight = nn.Parameter(torch.empty(d_out, d_in)) if weight is None else weight
        sizes: dict[Axis, tuple[int, ...]] = {Axis.SCALAR: (), Axis.ROW: (d_out,), Axis.COLUMN: (d_in,)}
        for axis, size in sizes.items():
            multiplier = nn.Parameter(torch.empty(size)) if axis in plan.axes else None
            self.register_parameter(axis.value, multiplier)

    def effective_weight(self) -> Tensor:
        """W_eff (d_out, d_in), differentiable in the weight and in every multiplier."""
        return effective_weight(self.weight, self.constant, self.scalar, self.row, self.column)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_eff (d_out, d_in) for inference, formed in float64 and cast once; the module is left as it is."""
        multipliers = (None if part is None else part.double() for part in (self.scalar, self.row, self.column))
        return effective_weight(self.weight.double(), self.constant, *multipliers).to(self.weight.dtype, copy=True)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        axes = "+".join(axis.value for axis in Axis if getattr(self, axis.value) is not None) or "none"
        return f"{d_out}x{d_in}, role={self.role.value}, multipliers={axes}, constant={self.constant:g}"


class MultipliedLinear(MultipliedMatrix):
    """y = W_eff x without bias; x (..., d_in) -> y (..., d_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.effective_weight())


class MultipliedEmbedding(MultipliedMatrix):
    """Rows of W_eff (vocabulary, d_model) by token; ids (...) -> (..., d_model)."""

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.effective_weight())

"""Weight normalization (arXiv:1602.07868): W_eff[i] = constant * scalar * g[i] * V[i] / |V[i]| * column.

The row multipliers are the row norms g of the effective matrix; the weight V gives directions alone. With G = dL/dW_eff
of the plain form and U[i] = V[i] / |V[i]|, autograd gives (arXiv:1602.07868 eq. 3)

    dL/dg[i] = G[i] . U[i],     dL/dV[i] = g[i] / |V[i]| * (G[i] - (G[i] . U[i]) U[i]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_mult.nn.multipliers import Formula, constant_start, effective_weight
from lit_mult.registry.contracts import Axis


def normalized_weight(
    weight: Tensor,
    constant: float | Tensor = 1.0,
    scalar: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
) -> Tensor:
    """The effective matrix; arguments as of `nn.multipliers.effective_weight`. A matrix without rows is a plain one."""
    if row is not None:
        row = row / torch.linalg.vector_norm(weight, dim=-1)
    return effective_weight(weight, constant, scalar, row, column)


def start(axis: Axis, weight: Tensor, value: float, unit: float) -> Tensor:
    """Rows start at the norms of those of the weight, so that W_eff is W (times a preset's forward multiplier)."""
    if axis is not Axis.ROW:
        return constant_start(axis, weight, value, unit)
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1)
    return value / unit * norm


WEIGHT_NORM = Formula(normalized_weight, start)

"""Softplus gains (arXiv:2606.25971): W_eff[i,j] = constant * sp(scalar) * sp(row[i]) * W[i,j] * sp(column[j]).

sp(x) = ln(1 + e^x) keeps gains positive; what is trained starts at ln(e - 1), where they are 1. With G = dL/dW_eff and
the logistic function f, the derivative of sp, autograd gives the gradients of plain multipliers times f:

    dL/drow[i] = f(row[i]) sum_j G[i,j] W[i,j] sp(column[j]),     dL/dW[i,j] = sp(row[i]) G[i,j] sp(column[j]).

Decay of what is trained pulls a gain towards sp(0) = ln 2; magnitude-direction decoupling has none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_mult.nn.multipliers import Formula, effective_weight


def softplus_weight(
    weight: Tensor,
    constant: float | Tensor = 1.0,
    scalar: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
) -> Tensor:
    """The effective matrix; arguments as of `nn.multipliers.effective_weight`, of which `constant` alone is itself."""
    gains = (None if part is None else F.softplus(part) for part in (scalar, row, column))
    return effective_weight(weight, constant, *gains)


SOFTPLUS = Formula(softplus_weight, takes_zero_rows=True)

"""The closure that `torch.optim.Optimizer.step` may get."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """The loss of the closure, which computes gradients again; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

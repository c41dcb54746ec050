"""What stays in float32 when a model is cast to 16 bits (`trainer.precision` bf16-true and 16-true, through Lightning).

Multipliers and norm weights are near 1, where the next bfloat16 numbers are 0.004 below and 0.008 above: most steps of
an optimizer are smaller than half of that, and would be rounded away. They are few; the memory is in the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

NARROW: Final = (torch.bfloat16, torch.float16)
"""The 16-bit types."""


def keeping_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A conversion for `nn.Module._apply`, with which a tensor follows to the device but not to a 16-bit type."""

    def apply(tensor: Tensor) -> Tensor:
        converted = function(tensor)
        is_narrowed = converted.dtype in NARROW and tensor.dtype not in NARROW
        return tensor.to(converted.device) if is_narrowed else converted

    return apply

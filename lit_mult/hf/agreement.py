"""How far two models' logits lie apart on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TOLERANCE, _USUAL_LOGIT = 1e-4, 10.0
_BATCH = 4  # windows at once: logits of a large vocabulary take room


@dataclass(frozen=True)
class Agreement:
    """Two models' logits on the same tokens."""

    tokens: int
    largest_difference: float
    """Largest absolute difference of two logits; nan where one is not finite."""
    largest_logit: float
    """Largest absolute logit of the first model."""
    same_argmax: float
    """Share of the tokens at which both models give the same id the highest logit."""

    @property
    def bound(self) -> float:
        """What rounding may do to float32 logits: 1e-4 at logits up to 10, and in proportion beyond.

        Measured over random multipliers of every kind it does up to a tenth of that, while a multiplier that is left
        out moves logits by the order of the logits themselves.
        """
        return _TOLERANCE * max(1.0, self.largest_logit / _USUAL_LOGIT)

    @property
    def within_rounding(self) -> bool:
        """Whether rounding alone can have made the difference."""
        return math.isfinite(self.largest_logit) and self.largest_difference <= self.bound


@torch.no_grad()
def agreement(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], ids_BT: Tensor) -> Agreement:
    """Compare the logits (B, T, V) that two models give to ids (B, T)."""
    difference, logit, same = torch.zeros(()), torch.zeros(()), 0
    for part_BT in ids_BT.split(_BATCH):
        ours_BTV, theirs_BTV = ours(part_BT).float(), theirs(part_BT).float()
        # Tensors' maximum, unlike Python's, hands a nan on.
        difference = torch.maximum(difference, (ours_BTV - theirs_BTV).abs().amax())
        logit = torch.maximum(logit, ours_BTV.abs().amax())
        same += int((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).sum())
    return Agreement(ids_BT.numel(), float(difference), float(logit), same / ids_BT.numel())

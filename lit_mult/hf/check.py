"""Checks that two models have the same logits, and that a Hugging Face folder loads with the written weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_mult.errors import UserError, one_line

_TOLERANCE, _USUAL_LOGIT = 1e-4, 10.0
_BATCH = 4  # windows at once: logits of a large vocabulary take much memory


@dataclass(frozen=True)
class Agreement:
    """Two models' logits on the same tokens."""

    tokens: int
    largest_difference: float
    """Largest absolute difference of logits; nan if one is not finite."""
    largest_logit: float
    """Largest absolute logit of the first model."""
    same_argmax: float
    """Share of the tokens with equal argmax."""

    @property
    def bound(self) -> float:
        """Largest difference due to float32 rounding: 1e-4 for logits up to 10, and proportional beyond.

        With random multipliers of every kind, rounding causes at most a tenth of it; a missing multiplier changes
        logits by their own order of magnitude.
        """
        return _TOLERANCE * max(1.0, self.largest_logit / _USUAL_LOGIT)

    @property
    def within_rounding(self) -> bool:
        """Whether rounding explains the difference."""
        return math.isfinite(self.largest_logit) and self.largest_difference <= self.bound


@torch.no_grad()
def agreement(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], ids_BT: Tensor) -> Agreement:
    """Compare the logits (B, T, V) of two models for ids (B, T)."""
    difference, logit, same = torch.zeros(()), torch.zeros(()), 0
    for part_BT in ids_BT.split(_BATCH):
        ours_BTV, theirs_BTV = ours(part_BT).float(), theirs(part_BT).float()
        # torch's maximum, unlike Python's, propagates nan.
        difference = torch.maximum(difference, (ours_BTV - theirs_BTV).abs().amax())
        logit = torch.maximum(logit, ours_BTV.abs().amax())
        same += int((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).sum())
    return Agreement(ids_BT.numel(), float(difference), float(logit), same / ids_BT.numel())


def load_back(folder: Path, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The model in a folder as transformers loads it: ids (B, T) -> logits (B, T, V).

    Raises:
        UserError: it cannot be loaded, or its weights are not bit-identical to those written.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"not exported, transformers cannot load it ({one_line(error)})") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    loaded = model.state_dict()
    for name in sorted(loaded.keys() | weights.keys()):
        ours, theirs = weights.get(name), loaded.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            raise UserError(f"not exported, transformers loads another {name} than was written")

    def logits(ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = model(ids_BT, use_cache=False).logits
        return logits_BTV

    return logits

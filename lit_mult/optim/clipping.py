"""Gradient clipping over part of the parameters, as without multipliers (arXiv:2601.04890 sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Joint 2-norm () of all gradients; a missing gradient counts as 0."""
    return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients so that their joint norm is at most `limit`; return the norm () before."""
    norm = gradient_norm(parameters)
    if limit is not None:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm

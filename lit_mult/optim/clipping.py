"""Gradient clipping over part of the parameters, as without multipliers (arXiv:2601.04890 sec. 4.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lit_mult.optim.sharding import as_dtensor, by_placement, placement_of


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Joint 2-norm () of all gradients, over all their shards; a missing gradient counts as 0."""
    norms = []
    for alike in _by_placement(parameters):
        norm = get_total_norm([parameter.grad for parameter in alike if parameter.grad is not None])
        sharded = as_dtensor(norm)
        norms.append(norm if sharded is None else sharded.full_tensor())
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients so that their joint norm is at most `limit`; return the norm () before."""
    norm = gradient_norm(parameters)
    if limit is not None:
        for alike in _by_placement(parameters):
            clip_grads_with_norm_(alike, limit, norm)
    return norm


def _by_placement(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters with a gradient, by the placement of that."""
    with_gradient = (parameter for parameter in parameters if parameter.grad is not None)
    return by_placement(with_gradient, lambda one: None if one.grad is None else placement_of(one.grad))

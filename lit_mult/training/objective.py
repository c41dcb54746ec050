"""What training minimizes: cross-entropy, and z-loss where asked for; of one model or of the members of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_mult.nn.llama import Llama

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_MODELS = 64
"""Shapes of models that a process may have compiled at once; torch gives up on further ones at 8 by default."""


def predict(model: Llama, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) in float32, and their mean cross-entropy () in nats per token."""
    logits_BTV = model(window_BT1[:, :-1]).float()
    return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), window_BT1[:, 1:].flatten())


def objective(model: Llama, window_BT1: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """What training minimizes (), and its mean cross-entropy (), z-loss left out; nats per token."""
    logits_BTV, cross_entropy = predict(model, window_BT1)
    if not z_loss:
        return cross_entropy, cross_entropy
    # arXiv:2204.02311 sec. 5: keeps the softmax normalizer near 1.
    return cross_entropy + z_loss * logits_BTV.logsumexp(-1).square().mean(), cross_entropy


def stacked_objective(model: Llama, window_NT1: Tensor, z_loss_M: Tensor | None, members: int) -> tuple[Tensor, Tensor]:
    """`objective` of every member (M,), and the mean cross-entropies (M,).

    The sum over members is what is differentiated: members share nothing, so each has the gradient of its own.
    """
    logits_NTV = model(window_NT1[:, :-1]).float()
    loss_N = F.cross_entropy(logits_NTV.flatten(0, 1), window_NT1[:, 1:].flatten(), reduction="none")
    cross_entropy_M = loss_N.view(members, -1).mean(1)
    if z_loss_M is None:
        return cross_entropy_M, cross_entropy_M
    return cross_entropy_M + z_loss_M * logits_NTV.logsumexp(-1).square().view(members, -1).mean(1), cross_entropy_M


def compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function under torch.compile, with code of its own for every shape that it meets.

    What has been compiled for a model serves every other of the same structure in this process, and inductor's cache on
    disk serves other processes.
    """
    from torch._dynamo import config  # takes a second, and most runs are not compiled

    config.recompile_limit = max(config.recompile_limit, _MODELS)
    return torch.compile(function, dynamic=False)

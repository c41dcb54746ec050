"""QK-clip (MuonClip, arXiv:2507.20534 sec. 2.1): no attention logit of a head stays above a limit.

After a step, with S the largest logit of a head over the step's batch, W_q and W_k of the head shrink by
sqrt(limit / S) each where S > limit, so that logits of this batch would have ended at the limit. A key head that
several query heads share shrinks as the worst of them asks, and their queries by what is then left.

Shapes in names: B batch, T time, S time of keys, H query heads, G key heads, K head_dim.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_mult.nn.llama import Attention

Logits = dict[Attention, Tensor]
"""Attention -> the largest logit (H,) of each head since the last step."""


def watch(model: nn.Module, largest: Logits) -> None:
    """Record the largest logits of every training batch from now on, until `clip` forgets them."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.observe = partial(_record, largest)


@torch.no_grad()
def largest_logits(q_BTHK: Tensor, k_BSGK: Tensor, scale: float) -> Tensor:
    """The largest causal attention logit (H,) of each head."""
    T, S, H, G = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[2], k_BSGK.shape[2]
    k_BSHK = k_BSGK.repeat_interleave(H // G, dim=2)
    logits_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k_BSHK.float()) * scale
    future_TS = torch.ones(T, S, dtype=torch.bool, device=q_BTHK.device).triu(1 + S - T)
    return logits_BHTS.masked_fill(future_TS, -torch.inf).amax((0, 2, 3))


def _record(largest: Logits, module: Attention, q_BTHK: Tensor, k_BSGK: Tensor) -> None:
    if module.training:
        found_H = largest_logits(q_BTHK, k_BSGK, module.scale)
        largest[module] = torch.maximum(largest[module], found_H) if module in largest else found_H


@torch.no_grad()
def clip(largest: Logits, limit: float) -> None:
    """Shrink the queries and keys of heads with logits above the limit, of all processes alike; forget the logits."""
    for module, largest_H in largest.items():  # in the order of the forward pass, which all processes share
        if dist.is_initialized():
            dist.all_reduce(largest_H, dist.ReduceOp.MAX)
        share_H = (limit / largest_H.clamp(min=limit)).nan_to_num(nan=1.0)  # of a diverged run: the loss will tell
        share_GN = share_H.view(module.n_kv_heads, -1)
        key_G1 = share_GN.amin(1, keepdim=True).sqrt()
        query_H = (share_GN / key_G1).clamp(max=1.0).flatten()
        for matrix, factor in ((module.q_proj, query_H), (module.k_proj, key_G1.flatten())):
            matrix.weight.mul_(factor.repeat_interleave(module.head_dim)[:, None].to(matrix.weight.dtype))
    largest.clear()

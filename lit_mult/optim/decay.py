"""Decay rules around the step of any optimizer with decoupled weight decay, so that none needs code for them.

A group's `decay_rule` (`method.decay.DecayRule`) is plain if it has none. `corrected` (arXiv:2506.02285) also needs the
group's `peak_lr`: a step then decays by lr^2 / peak_lr * weight_decay. `cautious` (arXiv:2510.12402) decays the entries
with u W >= 0, u being the update: those that it shrinks, or turns to the other sign. The optimizer steps without decay,
u is what it has moved, and the decay lr * weight_decay * W follows; it takes a copy of the matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_mult.errors import UserError
from lit_mult.method.decay import DecayRule
from lit_mult.optim.sharding import by_placement, local

_ROUNDING = 1e-6


def rule_settings(rule: DecayRule, lr: float) -> dict[str, Any]:
    """What a group needs for a decay rule, beside its peak lr and weight_decay; nothing for plain."""
    settings: dict[str, Any] = {} if rule == "plain" else {"decay_rule": rule}
    return settings | ({"peak_lr": lr} if rule == "corrected" else {})


@contextmanager
def decaying(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Let the steps of these groups inside follow their decay rules; gradients are there before.

    Raises:
        UserError: the lr of a corrected group is above its peak.
    """
    own = [group["weight_decay"] for group in groups]
    copies: list[tuple[dict[str, Any], float, dict[Tensor, Tensor]]] = []
    try:
        for group in groups:
            rule, decay = group.get("decay_rule", "plain"), group["weight_decay"]
            if rule == "corrected":
                group["weight_decay"] = decay * _share_of_peak(group)
            elif rule == "cautious" and decay:
                copies.append((group, decay, _copied(one for one in group["params"] if one.grad is not None)))
                group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in zip(groups, own, strict=True):
            group["weight_decay"] = decay
    for group, decay, starts in copies:
        _decay_cautiously(float(group["lr"] * decay), starts)


def _share_of_peak(group: dict[str, Any]) -> float:
    share: float = group["lr"] / group["peak_lr"]
    if share > 1 + _ROUNDING:
        above = f"{group['lr']:g} is above the peak of {group['peak_lr']:g}, by which corrected decay divides"
        raise UserError(f"lr of group {group['name']}: {above}; build the groups with the peak lr")
    return share


@torch.no_grad()
def _copied(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copies of this rank's shards."""
    pairs = ((alike, local(alike)) for alike in by_placement(parameters))
    return {one: shard.clone() for alike, shards in pairs for one, shard in zip(alike, shards, strict=True)}


@torch.no_grad()
def _decay_cautiously(share: float, starts: dict[Tensor, Tensor]) -> None:
    """Decay this rank's shards of what has taken a step from here."""
    for alike in by_placement(starts):
        for parameter, shard in zip(alike, local(alike), strict=True):
            start = starts[parameter]
            start.masked_fill_((start - shard).mul_(start) < 0, 0.0)  # the update was start - shard, up to its lr
            shard.sub_(start, alpha=share)

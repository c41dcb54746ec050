"""Scion (arXiv:2502.07529): steps to the border of a norm ball, in which the weights stay.

    m <- 0.9 m + 0.1 g,     W <- (1 - lr) W - lr radius lmo(m)

`scion` takes hidden matrices on a spectral ball, lmo(m) = sqrt(d_out / d_in) NS(m); `scion-sign` takes the LM head, or
hidden matrices too, on a ball of the largest entry, lmo(m) = sign(m) / d_in. Both take inputs of size 1 to outputs of
size at most the radius, at any width. The decay of 1 per lr is part of the method: it takes the place of
`optim.weight_decay`, its mode and its factors by role, which are AdamW's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.optim.closure import evaluated
from lit_mult.optim.muon import Muon, StackedMuon, by_shape, settings
from lit_mult.optim.sharding import local, local_gradients
from lit_mult.optim.stacking import StackedUpdate

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Muon:
    """`scion`: Muon without Nesterov's lookahead, its update scaled to the ball; groups have an lr and weight_decay."""
    own = settings(config) | {"momentum": config.scion_momentum, "nesterov": False}
    return Muon([group | {"radius": config.scion_radius} for group in groups], **own)


class ScionSign(Optimizer):
    """`scion-sign`. Parameters are matrices or stacks of them, sharded or not; a group may be `transposed`."""

    def __init__(self, groups: list[dict[str, Any]], radius: float, momentum: float) -> None:
        """Each group has an lr and weight_decay."""
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 1.0, "radius": radius, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                momenta = local([self.state[parameter]["momentum_buffer"] for parameter in parameters])
                torch._foreach_lerp_(momenta, local_gradients(parameters), 1 - group["momentum"])
                d_in = parameters[0].shape[-2 if group.get("transposed") else -1]
                shards = local(parameters)
                torch._foreach_mul_(shards, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(shards, torch._foreach_sign(momenta), alpha=-group["lr"] * group["radius"] / d_in)
        return loss


def build_sign(groups: list[dict[str, Any]], config: OptimConfig) -> ScionSign:
    """`scion-sign`; each group has an lr and weight_decay."""
    return ScionSign(groups, radius=config.scion_sign_radius, momentum=config.scion_momentum)


class StackedScion(StackedMuon):
    """As `build` has it."""

    def momentum(self, gradients_MP: Tensor) -> Tensor:
        averages_MP = self.state["momentum_buffer"]
        return averages_MP.lerp_(gradients_MP, 1 - self.config.scion_momentum)

    def scale(self, shape: torch.Size) -> float:
        return self.config.scion_radius * math.sqrt(shape[0] / shape[1])


class StackedScionSign(StackedUpdate):
    """Element-wise, but for d_in."""

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    by_shape = True

    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """Signs of the momenta on the border of the ball."""
        averages_MP = self.state["momentum_buffer"]
        averages_MP.lerp_(gradients_MP, 1 - self.config.scion_momentum)
        update_MP = averages_MP.sign()
        for columns, shape in self.matrices:
            update_MP[:, columns] *= self.config.scion_sign_radius / shape[1]
        return update_MP

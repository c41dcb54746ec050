"""AdamW: `torch.optim.AdamW`, its noise reference, and its update of stacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from lit_mult.optim.noise import Autocorrelation, NoiseReference
from lit_mult.optim.sharding import by_placement
from lit_mult.optim.stacking import StackedUpdate
from lit_mult.registry.roles import Shape

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

# Devices on which torch ships a fused kernel.
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def build(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    """The optimizer; each group has an lr and weight_decay."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    is_mixed = any(len(list(by_placement(group["params"]))) > 1 for group in groups)
    kind = _MixedAdamW if is_mixed else AdamW
    return kind(groups, betas=config.betas, eps=config.eps, fused=devices <= _FUSED_DEVICES)


class _MixedAdamW(AdamW):
    """For groups of whole and sharded parameters, which torch cannot step together."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group | {"params": alike} for group in groups for alike in by_placement(group["params"])]
        try:
            loss: Tensor | None = super().step(closure)
        finally:
            self.param_groups = groups
        return loss


def adam_updates(
    gradients: list[Tensor], states: Sequence[dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """Adam's m / (sqrt(v) + eps), both with bias correction, of tensors of any shape that have made the same steps.

    Args:
        gradients: in float32.
        states: of each, with exp_avg, exp_avg_sq and step from the first call on.
        group: betas and eps.
    """
    for state, gradient in zip(states, gradients, strict=True):
        if "step" not in state:
            zeros = {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
            state.update(zeros, step=torch.tensor(0.0))
        state["step"] += 1
    averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), step = group["betas"], float(states[0]["step"])
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, math.sqrt(1 - beta2**step))
    torch._foreach_add_(sizes, group["eps"])
    updates = torch._foreach_div(averages, sizes)
    torch._foreach_div_(updates, 1 - beta1**step)
    return list(updates)


def autocorrelation(config: OptimConfig, shape: Shape | None = None) -> Autocorrelation:
    """R of u = m / sqrt(v) to first order in 1 - beta2; the same for every shape.

    u_t = (1 - beta1) sum_i beta1^(t-i) g_i / sqrt(v_t), and v depends on squares alone: by the symmetry of each g only
    products of a gradient with itself survive,

        R(s - t) = (1 - beta1)^2 sum_i beta1^(s-i) beta1^(t-i) E[g_i^2 / sqrt(v_s v_t)].

    With v = 1 + d and V = Var d = 2 (1 - beta2) / (1 + beta2), 1 / sqrt(v_s v_t) is
    1 - (d_s + d_t) / 2 + 3 (d_s^2 + d_t^2) / 8 + d_s d_t / 4, E[g_i^2 d_s] = 2 (1 - beta2) beta2^(s-i), and so

        R(k) = (1 - beta1)^2 beta1^k [(1 + 3 V / 4 + beta2^k V / 4) / (1 - beta1^2)
                                      - (1 - beta2) (1 + beta2^k) / (1 - beta1^2 beta2)].

    At (0.9, 0.95): R(0) = 0.051 (an update's RMS of 0.226) and sum R = 0.978, c = 0.989.
    """
    beta1, beta2 = config.betas
    variance = 2 * (1 - beta2) / (1 + beta2)
    plain = (1 - beta1) ** 2 / (1 - beta1**2)
    own = (1 - beta1) ** 2 * (1 - beta2) / (1 - beta1**2 * beta2)
    amplitudes = (plain * (1 + 0.75 * variance) - own, plain * 0.25 * variance - own)
    return Autocorrelation(sum(amplitudes), amplitudes, (beta1, beta1 * beta2))


NOISE = NoiseReference(by_shape=False, autocorrelation=autocorrelation)


class StackedAdamW(StackedUpdate):
    """Element-wise, on one tensor of all parameters of all members."""

    states = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """Bias-corrected updates, for a learning rate of 1."""
        (beta1, beta2), count = self.config.betas, step + 1
        averages_MP, squares_MP = self.state["exp_avg"], self.state["exp_avg_sq"]
        averages_MP.lerp_(gradients_MP, 1 - beta1)
        squares_MP.mul_(beta2).addcmul_(gradients_MP, gradients_MP, value=1 - beta2)
        size_MP = squares_MP.sqrt().div_(math.sqrt(1 - beta2**count)).add_(self.eps)
        return averages_MP.div(size_MP).div_(1 - beta1**count)

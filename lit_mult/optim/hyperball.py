"""Hyperball (arXiv:2606.16899): every matrix stays on the sphere of its initial norm, and a step has relative size lr.

    W <- R N(W - lr R N(u)),     N(x) = x / |x|_F,     R = |W_0|_F

u is AdamW's update (`hyperball`) or Muon's (`muon-hyperball`); its size does not matter, and there is no weight decay.
Under pure noise u is orthogonal to W: a step keeps 1 / sqrt(1 + lr^2) of W. Sums of steps have no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.errors import ConfigError
from lit_mult.optim.muon import COEFFICIENTS, by_shape, orthogonal_momenta
from lit_mult.optim.noise import NoiseReference
from lit_mult.optim.sharding import as_dtensor

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

Update = Callable[[list[Tensor], Mapping[Tensor, dict[str, Tensor]], Mapping[str, Any]], list[Tensor]]
"""(matrices of one shape with gradients, their states, parameter group) -> update of each, up to a factor."""

_TINY = 1e-12


class Hyperball(Optimizer):
    """Moves matrices on spheres; the state has the radius and the state of the update."""

    def __init__(self, groups: list[dict[str, Any]], update: Update, **defaults: Any) -> None:
        """`defaults`: further settings of a group, for `update`.

        Raises:
            ConfigError: a parameter has no sphere of its own: it is sharded, a stack, or several matrices in one.
        """
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0, **defaults})
        self._update = update
        for group in self.param_groups:
            for parameter in group["params"]:
                if as_dtensor(parameter) is not None or parameter.ndim > 2 or group.get("parts") is not None:
                    where = f"cannot train {group.get('name', 'a matrix')}, which is sharded, stacked or fused"
                    raise ConfigError("optimizer", group.get("optimizer", "hyperball"), f"{where}: use adamw or muon")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update": self._update}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                for parameter in parameters:
                    if "radius" not in self.state[parameter]:
                        self.state[parameter]["radius"] = self._radius(parameter, group)
                updates = self._update(parameters, self.state, group)
                for parameter, update in zip(parameters, updates, strict=True):
                    radius, weight = self.state[parameter]["radius"], parameter.float()
                    weight = weight - update * (group["lr"] * radius / update.norm().clamp(min=_TINY))
                    parameter.copy_(weight * (radius / weight.norm()))
        return loss

    @staticmethod
    def _radius(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        radius: Tensor = parameter.float().norm()
        if radius < _TINY:
            where = f"cannot train {group.get('name', 'a matrix')}, which starts at 0: its norm would stay 0"
            raise ConfigError("optimizer", group.get("optimizer", "hyperball"), where)
        return radius


def adam_updates(
    parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """Adam's m / (sqrt(v) + eps), both with bias correction; group: betas, eps. States: exp_avg, exp_avg_sq, step."""
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if "step" not in states[parameter]:
            zeros = {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
            states[parameter].update(zeros, step=torch.tensor(0.0))
        states[parameter]["step"] += 1
    averages, squares = ([states[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), step = group["betas"], float(states[parameters[0]]["step"])
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, math.sqrt(1 - beta2**step))
    torch._foreach_add_(sizes, group["eps"])
    updates = torch._foreach_div(averages, sizes)
    torch._foreach_div_(updates, 1 - beta1**step)
    return list(updates)


def build_adam(groups: list[dict[str, Any]], config: OptimConfig) -> Hyperball:
    """`hyperball`; each group has an lr."""
    return Hyperball(groups, adam_updates, betas=config.betas, eps=config.eps)


def build_muon(groups: list[dict[str, Any]], config: OptimConfig) -> Hyperball:
    """`muon-hyperball`; each group has an lr."""
    settings: dict[str, Any] = {"momentum": config.muon_momentum, "ns_steps": config.muon_ns_steps, "eps": 1e-7}
    settings["ns_coefficients"] = COEFFICIENTS[config.muon_coefficients]
    return Hyperball(groups, orthogonal_momenta, nesterov=True, **settings)


NOISE = NoiseReference(by_shape=True, autocorrelation=None, kept=lambda lr, weight_decay: 1 / math.sqrt(1 + lr**2))

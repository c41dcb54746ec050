"""Muown (arXiv:2605.10797): Muon on the directions of the rows of a matrix, Adam on their norms.

    W = diag(g) U,    U = V / |V| by row

    G_g[i] = sum_j G[i,j] U[i,j],    G_V = (g / |V|) (G - G_g U)
    M <- EMA(G_V; momentum),         V <- V - lr 0.2 sqrt(max(d_out, d_in)) NS(M)
    g <- (1 - lr weight_decay) g - lr_g Adam(G_g; betas, eps)

G is dL/dW. g and |V| start at the row norms of W, which are |g| after every step; the state has both of them, and V is
|V| W / g. Momentum is that of Muon, without Nesterov's term, and the step is matched to Adam's RMS; betas and eps are
AdamW's. Decay acts on the norms alone, at the pace of the matrix, and not on entries, as cautious decay would. lr_g is
lr, as published, or `optim.muown_norm_lr` times the schedule. Updates of V are nearly orthogonal to it, so that |V|
grows and directions turn ever more slowly: pure noise has no balance here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.errors import ConfigError
from lit_mult.optim.adamw import adam_updates
from lit_mult.optim.closure import evaluated
from lit_mult.optim.muon import COEFFICIENTS, NS_EPS, RMS_OF_ADAM, by_shape, orthogonalize
from lit_mult.optim.sharding import check_whole_matrices

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig


class Muown(Optimizer):
    """Trains matrices (d_out, d_in), or (d_in, d_out) in a group that is `transposed`."""

    def __init__(self, groups: list[dict[str, Any]], *, norm_lr: float | None, **settings: Any) -> None:
        """Take groups that have an lr and weight_decay each.

        Args:
            groups: of whole matrices.
            norm_lr: lr_g where lr is that of now; None: lr.
            settings: betas, eps, momentum, ns_coefficients and ns_steps of a group.

        Raises:
            ConfigError: a parameter is not one whole matrix.
        """
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0, "norm_ratio": None, **settings})
        check_whole_matrices(self.param_groups)
        for group in self.param_groups:
            if group["norm_ratio"] is None:
                group["norm_ratio"] = 1.0 if norm_lr is None else norm_lr / group["lr"]  # so it follows the schedule

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                self._step_alike(parameters, group)
        return loss

    def _step_alike(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        """Step parameters of one shape (A, B), whose rows are (A, 1) or, transposed, (1, B)."""
        along = -2 if group.get("transposed") else -1
        weights_NxAxB = torch.stack(parameters).float()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients_NxAxB = torch.stack(gradients).float()
        for parameter, weight in zip(parameters, weights_NxAxB, strict=True):
            if "row_norm" not in self.state[parameter]:
                self.state[parameter].update(_start(weight, along, group))
        states = [self.state[parameter] for parameter in parameters]
        norms_N, lengths_N = (torch.stack([state[name] for state in states]) for name in ("row_norm", "length"))

        units_NxAxB = weights_NxAxB / norms_N
        of_norms_N = (gradients_NxAxB * units_NxAxB).sum(along, keepdim=True)
        of_directions_NxAxB = norms_N / lengths_N * (gradients_NxAxB - units_NxAxB * of_norms_N)

        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, list(of_directions_NxAxB), 1 - group["momentum"])
        dtype = torch.float32 if weights_NxAxB.device.type == "cpu" else torch.bfloat16
        turns_NxAxB = orthogonalize(
            torch.stack(momenta).to(dtype), group["ns_coefficients"], group["ns_steps"], group["ns_eps"]
        ).float()
        scale = group["lr"] * RMS_OF_ADAM * math.sqrt(max(weights_NxAxB.shape[-2:]))
        directions_NxAxB = units_NxAxB * lengths_N - scale * turns_NxAxB

        updates_N = torch.stack(adam_updates(list(of_norms_N), states, group))
        norms_N = (1 - group["lr"] * group["weight_decay"]) * norms_N - group["lr"] * group["norm_ratio"] * updates_N
        lengths_N = directions_NxAxB.norm(dim=along, keepdim=True)
        weights_NxAxB = norms_N * directions_NxAxB / lengths_N
        for parameter, state, *after in zip(parameters, states, weights_NxAxB, norms_N, lengths_N, strict=True):
            for held, new in zip((parameter, state["row_norm"], state["length"]), after, strict=True):
                held.copy_(new)


def _start(weight: Tensor, along: int, group: Mapping[str, Any]) -> dict[str, Tensor]:
    norm = weight.norm(dim=along, keepdim=True)
    if not norm.all():
        where = f"cannot train {group.get('name', 'a matrix')}, which has a row of zeros: it has no direction"
        raise ConfigError("optimizer", group.get("optimizer", "muown"), where)
    return {"row_norm": norm, "length": norm.clone(), "momentum_buffer": torch.zeros_like(weight)}


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Muown:
    """The optimizer; each group has an lr and weight_decay."""
    coefficients = COEFFICIENTS[config.muon_coefficients]
    iteration = {"ns_coefficients": coefficients, "ns_steps": config.muon_ns_steps, "ns_eps": NS_EPS}
    adam = {"betas": config.betas, "eps": config.eps}
    return Muown(groups, norm_lr=config.muown_norm_lr, momentum=config.muon_momentum, **adam, **iteration)

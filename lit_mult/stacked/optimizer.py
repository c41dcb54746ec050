"""AdamW and Muon for a stack of models: one update of everything, with a learning rate and a decay for each member.

All parameters lie in one buffer, of which the model's are views, and so do gradients and moments: an update is a dozen
kernels, whatever the number of parameters. The mathematics is that of `optim.hybrid.HybridOptimizer`, clipping and
schedule included, and the state of a member goes out and comes in as that of a `HybridOptimizer` of its own.

Shapes in names: S steps, C schedules, M members, P numbers of a member.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.config import RunConfig
from lit_mult.optim.groups import ParameterPlan
from lit_mult.optim.muon import NS_COEFFICIENTS, RMS_OF_ADAM, orthogonalize
from lit_mult.optim.schedules import schedule_factor
from lit_mult.registry.roles import Role

_NORM_EPS = 1e-6  # of torch.nn.utils.clip_grads_with_norm_
_MUON_EPS = 1e-7  # of torch.optim.Muon

Moments = dict[str, dict[str, Tensor]]
"""Parameter -> its state in `torch.optim`: exp_avg, exp_avg_sq and step of AdamW, momentum_buffer of Muon."""


@dataclass(frozen=True)
class _Group:
    """Neighbours in the buffer that a member trains with one lr and weight decay; under Muon, matrices of one shape."""

    columns: slice
    lr_M1: Tensor
    """Peak learning rates."""
    weight_decay_M1: Tensor
    matrix: torch.Size | None
    """(d_out, d_in) under Muon."""


class StackedOptimizer(Optimizer):
    """Trains the parameters of a stack, each member by its own config."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Sequence[Sequence[ParameterPlan]],
        configs: Sequence[RunConfig],
    ) -> None:
        """Move the parameters into one buffer, on their device.

        Args:
            parameters: name -> parameter (M, ...) of the stack, as far as it is trained.
            rows: what is decided about the parameters of every member, by parameter in one order.
            configs: of the members, which differ in learning rates, decays, schedule and clipping at most.

        Raises:
            ValueError: a parameter has no plan.
        """
        ordered = sorted(zip(*rows, strict=True), key=_place)
        if {row.name for row, *_ in ordered} != parameters.keys():
            raise ValueError("parameters and their plans do not agree")
        self._parameters = {row.name: parameters[row.name] for row, *_ in ordered}
        super().__init__(list(self._parameters.values()), {})
        with torch.no_grad():
            self._weights_MP = torch.cat([_by_member(parameter) for parameter in self._parameters.values()], dim=1)
        ends = list(itertools.accumulate(row.parameter.numel() for row, *_ in ordered))
        self._columns = {
            row.name: slice(end - row.parameter.numel(), end) for (row, *_), end in zip(ordered, ends, strict=True)
        }
        for name, parameter in self._parameters.items():
            parameter.data = self._view(self._weights_MP, name)
        self._groups = [self._group(list(members)) for _, members in itertools.groupby(ordered, _place)]

        def share(rows: list[tuple[ParameterPlan, ...]]) -> int:
            return sum(row.parameter.numel() for row, *_ in rows)

        self._multipliers = slice(0, share([row for row in ordered if row[0].role is Role.MULTIPLIER]))
        self._adamw = slice(0, share([row for row in ordered if row[0].optimizer == "adamw"]))
        self._gradients_MP, self._averages_MP = torch.zeros_like(self._weights_MP), torch.zeros_like(self._weights_MP)
        self._squares_MP = torch.zeros_like(self._weights_MP[:, self._adamw])

        self._optim, steps = configs[0].optim, configs[0].train.steps
        schedules = list({config.schedule.model_dump_json(): config.schedule for config in configs}.values())
        factors = [[schedule_factor(step, steps, schedule) for schedule in schedules] for step in range(steps)]
        self._factors_SxC = self._tensor(factors)
        which_M = [schedules.index(config.schedule) for config in configs]
        self._schedule_M = torch.tensor(which_M, device=self._weights_MP.device)
        limits = [math.inf if config.optim.clip is None else config.optim.clip for config in configs]
        self._limit_M1 = self._tensor(limits)[:, None]
        self._clip_multipliers_M1 = self._tensor([config.optim.clip_multipliers for config in configs])[:, None]
        self._step = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [_by_member(_gradient(parameter)) for parameter in self._parameters.values()]
        torch.cat(gradients, dim=1, out=self._gradients_MP)
        self._clip()
        update_MP = self._adamw_update()
        factor_M1 = self._factors_SxC[self._step][self._schedule_M][:, None]
        for group in self._groups:
            lr_M1 = group.lr_M1 * factor_M1
            weights = self._weights_MP[:, group.columns]
            weights.mul_(1 - lr_M1 * group.weight_decay_M1)
            update = update_MP[:, group.columns] if group.matrix is None else self._muon_update(group)
            weights.addcmul_(update, lr_M1, value=-1)
        self._step += 1
        return loss

    def _clip(self) -> None:
        """As `optim.clipping.clip_gradients` does, member by member."""
        own, rest = self._gradients_MP[:, self._multipliers], self._gradients_MP[:, self._multipliers.stop :]
        norm_M1 = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        counted_M1 = torch.linalg.vector_norm(own, dim=1, keepdim=True) * self._clip_multipliers_M1
        factor_M1 = (self._limit_M1 / (torch.hypot(norm_M1, counted_M1) + _NORM_EPS)).clamp(max=1)
        rest.mul_(factor_M1)
        own.mul_(torch.where(self._clip_multipliers_M1 > 0, factor_M1, 1))

    def _adamw_update(self) -> Tensor:
        """Bias-corrected updates of everything under AdamW, for a learning rate of 1."""
        (beta1, beta2), count = self._optim.betas, self._step + 1
        gradients, averages = self._gradients_MP[:, self._adamw], self._averages_MP[:, self._adamw]
        averages.lerp_(gradients, 1 - beta1)
        self._squares_MP.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        size_MP = self._squares_MP.sqrt().div_(math.sqrt(1 - beta2**count)).add_(self._optim.eps)
        return torch.div(averages, size_MP, out=size_MP).div_(1 - beta1**count)

    def _muon_update(self, group: _Group) -> Tensor:
        """Orthogonalized momentum of a group, matched to Adam's RMS, for a learning rate of 1."""
        assert group.matrix is not None
        momentum = self._optim.muon_momentum
        gradients, averages = self._gradients_MP[:, group.columns], self._averages_MP[:, group.columns]
        averages.lerp_(gradients, 1 - momentum)
        dtype = torch.float32 if gradients.device.type == "cpu" else torch.bfloat16
        update_NxAxB = gradients.lerp(averages, momentum).to(dtype).reshape(-1, *group.matrix)
        update_NxAxB = orthogonalize(update_NxAxB, NS_COEFFICIENTS, self._optim.muon_ns_steps, _MUON_EPS)
        return update_NxAxB.to(gradients.dtype).reshape(gradients.shape) * (RMS_OF_ADAM * math.sqrt(max(group.matrix)))

    def moments(self, member: int) -> Moments:
        """Copies of the state of a member, on the CPU."""
        moments: Moments = {}
        for name, columns in self._columns.items():
            average = self._view(self._averages_MP, name)[member].cpu().clone()
            if columns.stop > self._adamw.stop:
                moments[name] = {"momentum_buffer": average}
            else:
                square = self._view(self._squares_MP, name)[member].cpu().clone()
                moments[name] = {"step": torch.tensor(float(self._step)), "exp_avg": average, "exp_avg_sq": square}
        return moments

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the steps done and the `moments` of every member: {"step": ..., "members": [...]}."""
        self._step = state_dict["step"]
        for member, moments in enumerate(state_dict["members"]):
            for name, state in moments.items():
                average = state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]
                self._view(self._averages_MP, name)[member].copy_(average)
                if "exp_avg_sq" in state:
                    self._view(self._squares_MP, name)[member].copy_(state["exp_avg_sq"])

    def _view(self, flat_MP: Tensor, name: str) -> Tensor:
        return flat_MP[:, self._columns[name]].view(self._parameters[name].shape)

    def _group(self, rows: list[tuple[ParameterPlan, ...]]) -> _Group:
        first = rows[0][0]
        columns = slice(self._columns[first.name].start, self._columns[rows[-1][0].name].stop)
        lr, weight_decay = ([getattr(row, field) for row in rows[0]] for field in ("lr", "weight_decay"))
        matrix = first.parameter.shape if first.optimizer == "muon" else None
        return _Group(columns, self._tensor(lr)[:, None], self._tensor(weight_decay)[:, None], matrix)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        """Rates and limits, in float32 at least: bfloat16 would take 1 - lr * weight_decay for 1."""
        dtype = torch.promote_types(self._weights_MP.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=self._weights_MP.device)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _by_member(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _place(rows: tuple[ParameterPlan, ...]) -> tuple[Any, ...]:
    """What puts parameters side by side: multipliers first, Muon's matrices last, equal rates and shapes together."""
    first = rows[0]
    rates = [(row.lr, row.weight_decay) for row in rows]
    shape = tuple(first.parameter.shape) if first.optimizer == "muon" else ()
    return first.optimizer == "muon", first.role is not Role.MULTIPLIER, rates, shape

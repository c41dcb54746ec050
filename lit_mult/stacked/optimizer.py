"""The optimizer of a stack: one fused update, with a learning rate and a weight decay per member.

Parameters are views of one buffer, and so are gradients and optimizer states: an update is a dozen kernels for any
number of parameters. The mathematics is that of `optim.hybrid.HybridOptimizer` with clipping and schedule, and members'
states are saved and loaded in its format.

Shapes in names: S steps, C schedules, M members, P numbers of a member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.config import RunConfig
from lit_mult.method.decay import DecayRule
from lit_mult.method.schedule import schedule_factor
from lit_mult.optim.groups import ParameterPlan
from lit_mult.optim.stacking import StackedUpdate
from lit_mult.registry import load
from lit_mult.registry.optimizers import OPTIMIZERS, unsupported
from lit_mult.registry.roles import Role

_NORM_EPS = 1e-6  # of torch.nn.utils.clip_grads_with_norm_

Moments = dict[str, dict[str, Tensor]]
"""Parameter -> its state in `torch.optim`: exp_avg, exp_avg_sq and step of AdamW, momentum_buffer of Muon, radius."""


@dataclass(frozen=True)
class _Group:
    """Adjacent columns of the buffer with one lr and weight decay per member."""

    columns: slice
    lr_M1: Tensor
    """Peak learning rates."""
    weight_decay_M1: Tensor
    corrected_M1: Tensor | None
    """Whether the decay of a member follows that rule (`optim.decay`); None if no member's does."""
    cautious_M1: Tensor | None
    """Likewise."""


@dataclass(frozen=True)
class _Part:
    """The columns of one optimizer, adjacent in the buffer."""

    columns: slice
    groups: list[_Group]
    update: StackedUpdate


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
            parameters: name -> trainable parameter (M, ...) of the stack.
            rows: plans of every member's parameters, in the same order.
            configs: of the members, which may differ in learning rates, decays, schedule and clipping.

        Raises:
            ValueError: a parameter has no plan, or has another type than the others.
            ConfigError: an optimizer has no stacked form.
        """
        ordered = sorted(zip(*rows, strict=True), key=_sort_key)
        if {row.name for row, *_ in ordered} != parameters.keys():
            raise ValueError("parameters and their plans do not agree")
        if len(types := {parameter.dtype for parameter in parameters.values()}) > 1:
            raise ValueError(f"parameters share one buffer, and are of {' and '.join(sorted(map(str, types)))}")
        self._parameters = {row.name: parameters[row.name] for row, *_ in ordered}
        super().__init__(list(self._parameters.values()), {})
        with torch.no_grad():
            self._weights_MP = torch.cat([_by_member(parameter) for parameter in self._parameters.values()], dim=1)
        self._gradients_MP = torch.zeros_like(self._weights_MP)
        ends = accumulate(row.parameter.numel() for row, *_ in ordered)
        self._columns = {
            row.name: slice(end - row.parameter.numel(), end) for (row, *_), end in zip(ordered, ends, strict=True)
        }
        for name, parameter in self._parameters.items():
            parameter.data = self._weights_MP[:, self._columns[name]].view(parameter.shape)
        self._optim, steps = configs[0].optim, configs[0].train.steps
        self._parts = [self._part(name, list(own)) for name, own in groupby(ordered, lambda row: row[0].optimizer)]
        multipliers = [row for row in ordered if row[0].role is Role.MULTIPLIER]
        self._multipliers = self._span(multipliers) if multipliers else slice(0, 0)

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
        factor_M1 = self._factors_SxC[self._step][self._schedule_M][:, None]
        for part in self._parts:
            update_MP = part.update.update(self._gradients_MP[:, part.columns], self._step)
            for group in part.groups:
                lr_M1 = group.lr_M1 * factor_M1
                weights, own_MP = self._weights_MP[:, group.columns], update_MP[:, _within(group.columns, part.columns)]
                decay = lr_M1 * group.weight_decay_M1
                if group.corrected_M1 is not None:
                    decay = decay * torch.where(group.corrected_M1, factor_M1, 1)
                if group.cautious_M1 is not None:
                    decay = decay.where(~group.cautious_M1 | (own_MP * weights >= 0), 0)
                weights.mul_(1 - decay)
                weights.addcmul_(own_MP, lr_M1, value=-1)
            part.update.settle(self._weights_MP[:, part.columns])
        self._step += 1
        return loss

    def _clip(self) -> None:
        """Clip like `optim.clipping.clip_gradients`, member by member."""
        own, rest = self._gradients_MP[:, self._multipliers], self._gradients_MP[:, self._multipliers.stop :]
        norm_M1 = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        counted_M1 = torch.linalg.vector_norm(own, dim=1, keepdim=True) * self._clip_multipliers_M1
        factor_M1 = (self._limit_M1 / (torch.hypot(norm_M1, counted_M1) + _NORM_EPS)).clamp(max=1)
        rest.mul_(factor_M1)
        own.mul_(torch.where(self._clip_multipliers_M1 > 0, factor_M1, 1))

    def moments(self, member: int) -> Moments:
        """A copy of a member's state, on the CPU."""
        moments: Moments = {}
        for name, states in self._states():
            moments[name] = {state: values[member].cpu().clone() for state, values in states.items()}
            if self._part_of(name).update.counts_steps:
                moments[name]["step"] = torch.tensor(float(self._step))
        return moments

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load {"step": steps done, "members": [`moments` of each]}."""
        self._step = state_dict["step"]
        for name, states in self._states():
            for member, moments in enumerate(state_dict["members"]):
                for state, values in states.items():
                    values[member].copy_(moments[name][state])

    def _states(self) -> list[tuple[str, dict[str, Tensor]]]:
        """Parameter -> its state (M, ...), views of the buffers, in the order of the buffer."""
        found = []
        for name, parameter in self._parameters.items():
            part = self._part_of(name)
            columns = _within(self._columns[name], part.columns)
            found.append((name, part.update.state_of(columns, parameter.shape)))
        return found

    def _part_of(self, name: str) -> _Part:
        return next(part for part in self._parts if self._columns[name].stop <= part.columns.stop)

    def _part(self, optimizer: str, rows: list[tuple[ParameterPlan, ...]]) -> _Part:
        kind, columns = _stacked_update(optimizer), self._span(rows)
        same_shape = (
            [list(own) for _, own in groupby(rows, lambda row: row[0].parameter.shape)] if kind.by_shape else []
        )
        matrices = [(_within(self._span(own), columns), own[0][0].parameter.shape) for own in same_shape]
        groups = [self._group(list(own)) for _, own in groupby(rows, _sort_key)]
        update = kind(self._weights_MP[:, columns], matrices, self._optim)
        if any(row.eps is not None for members in rows for row in members):
            update.eps = torch.cat([self._eps(members) for members in rows], dim=1)
        return _Part(columns, groups, update)

    def _group(self, rows: list[tuple[ParameterPlan, ...]]) -> _Group:
        lr, weight_decay = ([getattr(row, field) for row in rows[0]] for field in ("lr", "weight_decay"))
        rules = (self._follow(rows[0], rule) for rule in ("corrected", "cautious"))
        return _Group(self._span(rows), self._tensor(lr)[:, None], self._tensor(weight_decay)[:, None], *rules)

    def _follow(self, members: tuple[ParameterPlan, ...], rule: DecayRule) -> Tensor | None:
        """Which members' decay follows a rule (M, 1); None if no member's does."""
        which = [row.decay_rule == rule for row in members]
        return torch.tensor(which, device=self._weights_MP.device)[:, None] if any(which) else None

    def _eps(self, members: tuple[ParameterPlan, ...]) -> Tensor:
        """Adam's epsilon of one parameter (M, its numbers)."""
        eps_M = self._tensor([self._optim.eps if row.eps is None else row.eps for row in members])
        return eps_M[:, None].expand(-1, members[0].parameter.numel())

    def _span(self, rows: list[tuple[ParameterPlan, ...]]) -> slice:
        """Columns of adjacent parameters."""
        return slice(self._columns[rows[0][0].name].start, self._columns[rows[-1][0].name].stop)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        """Rates and limits, at least in float32: bfloat16 would round 1 - lr * weight_decay to 1."""
        dtype = torch.promote_types(self._weights_MP.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=self._weights_MP.device)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _by_member(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _within(columns: slice, part: slice) -> slice:
    return slice(columns.start - part.start, columns.stop - part.start)


def _sort_key(rows: tuple[ParameterPlan, ...]) -> tuple[Any, ...]:
    """Sorts by: multipliers first, optimizer, shape (if relevant), rates; each of these is adjacent in the buffer."""
    first = rows[0]
    shape = tuple(first.parameter.shape) if _stacked_update(first.optimizer).by_shape else ()
    rates = [(row.lr, row.weight_decay, row.decay_rule) for row in rows]
    return first.role is not Role.MULTIPLIER, list(OPTIMIZERS).index(first.optimizer), shape, rates


def _stacked_update(optimizer: str) -> type[StackedUpdate]:
    path = OPTIMIZERS[optimizer].stacked
    if path is None:
        raise unsupported(optimizer, "stacked form", "training runs together")
    update: type[StackedUpdate] = load(path)
    return update

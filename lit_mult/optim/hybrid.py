"""Several optimizers as one, so that Lightning's automatic optimization, schedulers and checkpoints apply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.nn.precision import NARROW
from lit_mult.optim.closure import evaluated
from lit_mult.optim.decay import decaying
from lit_mult.registry import load
from lit_mult.registry.contracts import OptimizerSettings
from lit_mult.registry.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig


class HybridOptimizer(Optimizer):
    """Runs the registered optimizers over one list of parameter groups and one state."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig | OptimizerSettings | None = None) -> None:
        """Each group names its `optimizer`, has its own `lr` and `weight_decay`, and may have a rule of `optim.decay`.

        Args:
            groups: as `parameter_groups` or `build_param_groups` makes them.
            config: settings that all groups share; by default those of `OptimizerSettings`.

        Raises:
            ValueError: a parameter is in two groups, or a group's optimizer is not registered.
        """
        for group in groups:
            if group["optimizer"] not in OPTIMIZERS:
                raise ValueError(f"group {group['name']}: unknown optimizer {group['optimizer']!r}")
        self._parts: list[Optimizer] = []
        for name in dict.fromkeys((*OPTIMIZERS, *(group["optimizer"] for group in groups))):
            if own := [group for group in groups if group["optimizer"] == name]:
                self._parts.append(load(OPTIMIZERS[name].build)(own, config or OptimizerSettings()))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._link()
        self._complete = True

    def _link(self) -> None:
        """Give every part its slice of the groups and the shared state, which loading a state replaces."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: a later group would belong to no optimizer."""
        if getattr(self, "_complete", False):
            raise RuntimeError("groups are fixed at construction; build the optimizer anew")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:  # torch's has the groups and the state alone
        return {**super().__getstate__(), "_parts": self._parts, "_complete": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; and what optimizers of libraries add to theirs, in the order of the parts, if any does."""
        added = [_added(part)[1] for part in self._parts]
        return super().state_dict() | ({"parts": added} if any(added) else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts states to the types of their parameters; Hyperball's are in float32, also of 16-bit matrices.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if parameter.dtype in NARROW and index in state_dict["state"]:
                self.state[parameter] = _in_float32(state_dict["state"][index], self.state[parameter])
        self._link()
        for part, added in zip(self._parts, state_dict.get("parts", ()), strict=False):
            if added:
                part.load_state_dict(_added(part)[0] | added)
        self._link()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = evaluated(closure)
        with decaying(self.param_groups):
            for part in self._parts:
                part.step()
        return loss


def _in_float32(saved: Any, held: Any) -> Any:
    """A loaded state, with the saved values where those were in float32; libraries nest states."""
    if isinstance(saved, Tensor):
        return saved.to(held.device, copy=True) if saved.dtype == torch.float32 else held
    if isinstance(saved, dict):
        return {name: _in_float32(value, held[name]) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_in_float32(*pair) for pair in zip(saved, held, strict=True))
    return held


def _added(part: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state_dict of an optimizer without the states of its parameters, in torch's form; and what it adds."""
    state, part.state = part.state, defaultdict(dict)
    try:
        saved = part.state_dict()
    finally:
        part.state = state
    plain = {name: saved[name] for name in ("state", "param_groups")}
    return plain, {name: value for name, value in saved.items() if name not in plain}

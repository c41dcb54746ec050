"""The interface of a group of diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.diagnostics.parts import TrainingModule
from lit_mult.diagnostics.probe import outputs
from lit_mult.diagnostics.readings import Reading
from lit_mult.nn.llama import Llama


@dataclass(frozen=True)
class Moment:
    """A run at one step."""

    config: RunConfig
    module: TrainingModule
    step: int
    """Step of the readings: optimizer steps done, minus one in `after_update`."""
    probe_BT: Tensor
    """Fixed validation windows, token ids."""
    windows_BT1: Sequence[Tensor] = ()
    """Micro-batches of the current step."""
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of a forward pass in the run's precision."""

    @property
    def model(self) -> Llama:
        return self.module.model

    @cached_property
    def outputs(self) -> list[Reading]:
        """`probe.outputs` of the fixed windows: one forward pass for all groups."""
        with self.forward_context():
            return outputs(self.model, self.probe_BT.to(self.model.device))


class Group:
    """Hooks that return readings; a group overrides those that it needs. It must not change the run."""

    def check(self, config: RunConfig, processes: int) -> None:
        """Raises: ConfigError when the run does not support the group, or the group this number of processes."""

    def state(self, moment: Moment) -> Iterable[Reading]:
        """Readings before a step, and at the end of the run."""
        return ()

    def before_update(self, moment: Moment) -> Iterable[Reading]:
        """Readings after the backward pass, before gradients are clipped."""
        return ()

    def after_update(self, moment: Moment) -> Iterable[Reading]:
        """Readings right after the update."""
        return ()

    def at_end(self, moment: Moment, start: Callable[[], Llama]) -> Iterable[tuple[int, Reading]]:
        """(step, reading) for the whole run; `start` makes the initial model."""
        return ()


def make_group(name: str) -> Group:
    """The group defined in the module `diagnostics.groups.NAME`."""
    module = import_module(f"lit_mult.diagnostics.groups.{name}")
    (made,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Group) and value.__module__ == module.__name__
    )
    return made()

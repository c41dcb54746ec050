"""The contract between a group of diagnostics and the run that it reads."""

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
    """The step that readings belong to: optimizer steps done, one less right after an update."""
    probe_BT: Tensor
    """Fixed validation windows, token ids."""
    windows_BT1: Sequence[Tensor] = ()
    """Micro-batches of the step under way."""
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of a forward in the run's precision."""

    @property
    def model(self) -> Llama:
        return self.module.model

    @cached_property
    def outputs(self) -> list[Reading]:
        """`probe.outputs` of the fixed windows: one forward for all groups that need it."""
        with self.forward_context():
            return outputs(self.model, self.probe_BT.to(self.model.device))


class Group:
    """What to read of a run, and when. A group overrides the hooks that it needs, and changes nothing of the run."""

    def check(self, config: RunConfig, processes: int) -> None:
        """Raises: ConfigError when the group cannot be recorded in such a run with so many processes."""

    def state(self, moment: Moment) -> Iterable[Reading]:
        """Readings of the state before a step, and of that at the end of the run."""
        return ()

    def before_update(self, moment: Moment) -> Iterable[Reading]:
        """Readings between the backward pass and the update, before gradients are clipped."""
        return ()

    def after_update(self, moment: Moment) -> Iterable[Reading]:
        """Readings right after that update."""
        return ()

    def at_end(self, moment: Moment, start: Callable[[], Llama]) -> Iterable[tuple[int, Reading]]:
        """(step, reading) of the whole run; `start` makes the model as the run began with it."""
        return ()


def make_group(name: str) -> Group:
    """The group that the module of that name in `diagnostics.groups` defines."""
    module = import_module(f"lit_mult.diagnostics.groups.{name}")
    (made,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Group) and value.__module__ == module.__name__
    )
    return made()

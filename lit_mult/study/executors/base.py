"""What a sweep asks of an executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lit_mult.study.job import Job, Message

Handler = Callable[[str, Message], bool]
"""Takes the id of a cell and a message about it; its answer to `Evaluated` is whether the cell is to be pruned."""


class Executor(Protocol):
    """Runs jobs, each to its end or its process's; an end is the last message about a cell (an `Outcome`)."""

    @property
    def free(self) -> int:
        """Jobs that could start now."""

    def submit(self, job: Job) -> None:
        """Start a job; one must be free."""

    def poll(self, timeout: float, handle: Handler) -> None:
        """Hand over the messages that are there or come within `timeout` seconds."""

    def close(self) -> None:
        """Ask the jobs under way to write a checkpoint and leave; wait for them, and enforce it after a while."""

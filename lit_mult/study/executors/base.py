"""What a sweep asks of an executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lit_mult.study.job import Job, Message

Handler = Callable[[str, Message], bool]
"""Takes the id of a cell and a message about it; its answer to `Evaluated` is whether the cell is to be pruned."""


class Executor(Protocol):
    """Runs jobs, alone or as stacks, each to its end or its process's; the last message about a cell is an `Outcome`.

    A worker has one stack at a time, and is free again when all cells of it have their outcome.
    """

    @property
    def workers(self) -> int:
        """Workers, busy ones included."""

    @property
    def free(self) -> int:
        """Workers that could start now."""

    def gpu_memory(self) -> int | None:
        """Bytes of GPU memory for each worker, free before any had begun a job; None: on CPUs."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give a worker one job, or several to train together; one must be free."""

    def poll(self, timeout: float, handle: Handler) -> None:
        """Hand over the messages that are there or come within `timeout` seconds."""

    def close(self) -> None:
        """Ask the jobs under way to write a checkpoint and leave; wait for them, and enforce it after a while."""

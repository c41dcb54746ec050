"""What a sweep asks of an executor, and what those have in common whose workers are other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from lit_mult.config import TrainerConfig
from lit_mult.errors import UserError
from lit_mult.study.job import Evaluated, Failed, Job, Message, Outcome

GRACE_SECONDS = 30.0
"""Time for the cells under way to write their checkpoints after a stop was requested."""

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


Connect = Callable[[int | None, int, TrainerConfig, str | None], Executor]
"""Makes an executor: `connect(workers, cells, trainer, address)`, in every module of `lit_mult.study.executors`.

workers: jobs at once; None chooses. cells: those that are left, no more workers are needed. trainer: accelerator and
devices of the cells. address: of a cluster. Raises UserError where it cannot run them.
"""


def refuse_address(address: str | None) -> None:
    """Raise UserError for an address given to an executor of this machine."""
    if address is not None:
        raise UserError(f"--address {address}: needs --executor ray")


class Worker(ABC):
    """Another process, which runs one cell, or one stack of them, after the other, as the sweep's process knows it."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        """Those under way: without an outcome yet."""

    @abstractmethod
    def answer(self, prune: bool) -> None:
        """Answer the last `Evaluated`."""

    def deliver(self, messages: Iterable[tuple[str, Message]], handle: Handler) -> None:
        """Hand over messages, each with its cell, and send back the answers."""
        for cell, message in messages:
            answer = handle(cell, message)
            if isinstance(message, Evaluated):
                self.answer(answer)

    def note(self, cell: str, message: Message) -> None:
        """Keep count of the cells under way."""
        if isinstance(message, Outcome):
            self.cells.remove(cell)

    def deaths(self, reason: str) -> list[tuple[str, Message]]:
        """The outcomes of the cells under way when the process has died."""
        cells, self.cells = self.cells, []
        return [(cell, Failed(reason, died=True)) for cell in cells]

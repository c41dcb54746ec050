"""The interface of executors, and the base class of workers that are other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from lit_mult.config import TrainerConfig
from lit_mult.errors import UserError
from lit_mult.study.job import Evaluated, Failed, Job, Message, Outcome

GRACE_SECONDS = 30.0
"""Time for running cells to write their checkpoints after a stop was requested."""

Handler = Callable[[str, Message], bool]
"""Takes the id of a cell and a message about it; for `Evaluated` it returns whether to prune the cell."""


class Executor(Protocol):
    """Runs jobs, alone or stacked. The last message about a cell is an `Outcome`.

    A worker runs one stack at a time, and is free again when every cell of it has its outcome.
    """

    @property
    def workers(self) -> int:
        """Number of workers, free and busy."""

    @property
    def free(self) -> int:
        """Number of free workers."""

    def gpu_memory(self) -> int | None:
        """Bytes of GPU memory per worker that were free before the first job; None on CPUs."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give a free worker one job, or several to train as a stack."""

    def poll(self, timeout: float, handle: Handler) -> None:
        """Pass on all messages that arrive within `timeout` seconds."""

    def close(self) -> None:
        """Ask running jobs to write a checkpoint and stop; kill their workers after `GRACE_SECONDS`."""


Connect = Callable[[int | None, int, TrainerConfig, str | None], Executor]
"""Makes an executor: `connect(workers, cells, trainer, address)`, in every module of `lit_mult.study.executors`.

workers: number of jobs at once; None chooses. cells: number that remain, an upper limit to the workers. trainer:
accelerator and devices of the cells. address: of a cluster. Raises UserError when the cells cannot run.
"""


def refuse_address(address: str | None) -> None:
    """Raise UserError for an address given to an executor without a cluster."""
    if address is not None:
        raise UserError(f"--address {address}: needs --executor ray")


class Worker(ABC):
    """The sweep's handle of a process that runs cells, one stack after the other."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        """Running cells, which have no outcome yet."""

    @abstractmethod
    def answer(self, prune: bool) -> None:
        """Answer the last `Evaluated`."""

    def deliver(self, messages: Iterable[tuple[str, Message]], handle: Handler) -> None:
        """Pass on messages, each with its cell, and send back the answers."""
        for cell, message in messages:
            answer = handle(cell, message)
            if isinstance(message, Evaluated):
                self.answer(answer)

    def note(self, cell: str, message: Message) -> None:
        """Keep track of the running cells."""
        if isinstance(message, Outcome):
            self.cells.remove(cell)

    def deaths(self, reason: str) -> list[tuple[str, Message]]:
        """Outcomes of the running cells after the process has died."""
        cells, self.cells = self.cells, []
        return [(cell, Failed(reason, died=True)) for cell in cells]

"""Runs cells in this process, one stack after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

from lit_mult.config import TrainerConfig
from lit_mult.errors import Interrupted
from lit_mult.study.executor import Handler, refuse_address
from lit_mult.study.job import Job, Message
from lit_mult.study.machine import gpus_for, memory_of
from lit_mult.study.stack import run_jobs


def connect(workers: int | None, cells: int, trainer: TrainerConfig, address: str | None) -> InProcessExecutor:
    """One worker, whatever `workers` is."""
    refuse_address(address)
    return InProcessExecutor(trainer)


class InProcessExecutor:
    """Runs jobs in `poll`; the run handles signals itself and raises `Interrupted`."""

    workers = 1

    def __init__(self, trainer: TrainerConfig) -> None:
        self._trainer = trainer
        self._jobs: Sequence[Job] = ()

    @property
    def free(self) -> int:
        return 0 if self._jobs else 1

    def gpu_memory(self) -> int | None:
        return self._gpu_memory

    @cached_property  # measured once: later torch keeps memory of earlier jobs reserved
    def _gpu_memory(self) -> int | None:
        return memory_of(gpus_for(self._trainer), sharing=1)

    def submit(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def poll(self, timeout: float, handle: Handler) -> None:
        jobs, self._jobs = self._jobs, ()
        if not jobs:
            time.sleep(timeout)
            return
        errors: list[Exception] = []

        def post(cell: str, message: Message) -> bool:
            # An error of the sweep stops training; it must not count as a failure of the cell.
            try:
                return not errors and handle(cell, message)
            except Exception as error:
                errors.append(error)
                return False

        try:
            run_jobs(jobs, post, lambda: bool(errors))
        except Interrupted:
            if not errors:
                raise
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._jobs = ()

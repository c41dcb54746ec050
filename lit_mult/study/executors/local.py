"""Runs cells in processes of this machine, which keep torch loaded and share its cores and GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from lit_mult.config import TrainerConfig
from lit_mult.errors import Interrupted
from lit_mult.study.executor import GRACE_SECONDS, Handler, Worker, refuse_address
from lit_mult.study.job import Evaluated, Job, Message
from lit_mult.study.machine import Slot, memory_of, slots
from lit_mult.study.stack import run_jobs


def connect(workers: int | None, cells: int, trainer: TrainerConfig, address: str | None) -> ProcessExecutor:
    """Start the workers; see `slots`. Raises: UserError when a cell needs more GPUs than there are."""
    refuse_address(address)
    return ProcessExecutor(slots(workers, cells, trainer))


class ProcessExecutor:
    """A process per slot, restarted when it dies."""

    def __init__(self, slots: list[Slot]) -> None:
        self._idle = [_Worker(slot) for slot in slots]
        self._busy: dict[Connection, _Worker] = {}

    @property
    def workers(self) -> int:
        return len(self._idle) + len(self._busy)

    @property
    def free(self) -> int:
        return len(self._idle)

    def gpu_memory(self) -> int | None:
        return self._gpu_memory

    @cached_property  # measured once: later the workers use part of it
    def _gpu_memory(self) -> int | None:
        workers = Counter(worker.slot.gpus for worker in [*self._idle, *self._busy.values()])
        return memory_of([gpus for gpus in workers if gpus is not None], sharing=max(workers.values()))

    def submit(self, jobs: Sequence[Job]) -> None:
        worker = self._idle.pop()
        worker.start(jobs)
        self._busy[worker.connection] = worker

    def poll(self, timeout: float, handle: Handler) -> None:
        if not self._busy:
            time.sleep(timeout)
        for connection in wait(list(self._busy), timeout):
            worker = self._busy[connection]  # type: ignore[index]
            messages = worker.receive()
            if not worker.cells:
                del self._busy[worker.connection]
                if worker.died:
                    worker.join(timeout=0)
                self._idle.append(_Worker(worker.slot) if worker.died else worker)
            worker.deliver(messages, handle)

    def close(self) -> None:
        workers = [*self._idle, *self._busy.values()]
        for worker in workers:
            worker.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        finally:  # also after a second Ctrl-C
            for worker in workers:
                worker.join(0.0)


class _Worker(Worker):
    """A process at the other end of a pipe."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot
        self.died = False
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_connection, slot), daemon=True)
        with _sigint_blocked():
            self.process.start()
        child_connection.close()  # so that the pipe closes when the process dies

    def start(self, jobs: Sequence[Job]) -> None:
        self.cells = [job.id for job in jobs]
        self._send(jobs)

    def answer(self, prune: bool) -> None:
        self._send(prune)

    def receive(self) -> list[tuple[str, Message]]:
        """The next message with its cell; when the process has died, one message per running cell."""
        message: Message
        try:
            cell, message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=10)
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            self.died = True
            return self.deaths(f"its worker process died ({how})")
        self.note(cell, message)
        return [(cell, message)]

    def stop(self) -> None:
        """Ask the process to write a checkpoint and exit.

        The closed pipe stops a worker that misses the signal, as between two cells.
        """
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()

    def join(self, timeout: float) -> None:
        """Wait for the process to exit, and kill it after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _send(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # the process is dead, which `receive` reports
            self.connection.send(message)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in processes started now: Ctrl-C reaches the whole group, but the parent decides what to stop."""
    resource_tracker.ensure_running()  # starting it with the first process would unblock the signal
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _serve(connection: Connection, slot: Slot) -> None:
    requested = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: requested.set())  # until a run sets its own handler
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    if slot.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpus
    threading.Thread(target=_leave_with_parent, name="parent watch", daemon=True).start()
    import torch

    torch.set_num_threads(slot.threads)

    def post(cell: str, message: Message) -> bool:
        # A closed pipe means that the parent is gone or stopping; SIGTERM, which comes with it, writes a checkpoint.
        with suppress(OSError, EOFError):
            connection.send((cell, message))
            return isinstance(message, Evaluated) and bool(connection.recv())
        return False

    with suppress(OSError, EOFError, Interrupted):
        while True:
            run_jobs(connection.recv(), post, requested.is_set)


def _leave_with_parent() -> None:
    """When the parent has died, stop as on request, which writes a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)

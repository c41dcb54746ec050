"""Runs cells: here, or in processes of their own that each keep torch loaded and a share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.record import CellInfo, RunRecord


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a cell; plain values, so that it can cross a process border."""

    config: dict[str, Any]
    cell: dict[str, Any]
    work: Path
    """Folder for the run while it is under way; removed at the end when nothing in it is to be kept."""
    record: Path
    keep_checkpoint: bool


@dataclass(frozen=True)
class Progress:
    """A point of the training-loss curve of the cell under way."""

    step: int
    loss: float


@dataclass(frozen=True)
class Finished:
    """The cell has its record."""

    record: RunRecord


@dataclass(frozen=True)
class Failed:
    """The cell has no record."""

    reason: str
    retry: bool = False
    """The cell may be fine and its process was not: killed, or out of memory."""
    bad_input: bool = False
    """The user's to mend: other cells would fail alike."""
    trace: str = ""


Message = Progress | Finished | Failed


def run_job(job: Job, on_progress: Callable[[int, float], None]) -> Finished | Failed:
    """Run one cell in this process; only a stop on request (`Interrupted`) escapes as an exception."""
    from lit_mult.training.run import run

    try:
        record = run(
            RunConfig.from_dict(job.config),
            job.work,
            cell=CellInfo.model_validate(job.cell),
            record_path=job.record,
            keep_checkpoint=job.keep_checkpoint,
            on_progress=on_progress,
        )
    except UserError as error:
        return Failed(str(error), bad_input=True)
    except (Interrupted, BrokenPipeError):
        raise
    except Exception as error:  # the study goes on without this cell and says so
        return Failed(f"{type(error).__name__}: {error}".splitlines()[0], trace=traceback.format_exc())
    if not job.keep_checkpoint and not (job.work / "tensorboard").exists():
        shutil.rmtree(job.work, ignore_errors=True)
    return Finished(record)


class Worker:
    """A process that runs one cell after the other."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the process is the end of the pipe

    def submit(self, job: Job) -> None:
        """Start a cell; its messages come through `messages`."""
        with suppress(BrokenPipeError):  # dead already: `messages` will say so
            self.connection.send(job)

    def receive(self) -> Message:
        """The next message, which must be there; the death of the process is one."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=10)
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return Failed(f"its worker process died ({how})", retry=True)
        return message

    def stop(self) -> None:
        """Ask for the end: a cell under way is checkpointed first.

        The closed pipe reaches a worker that had no ear for the signal, as between two cells.
        """
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()

    def join(self, timeout: float) -> None:
        """Wait for the end, and enforce it after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def messages(workers: list[Worker], timeout: float) -> Iterator[tuple[Worker, Message]]:
    """Messages that have come or come within `timeout` seconds, one for each worker at most."""
    by_connection: dict[Any, Worker] = {worker.connection: worker for worker in workers}
    for connection in wait(list(by_connection), timeout):
        worker = by_connection[connection]
        yield worker, worker.receive()


def _serve(connection: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what to stop
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)

    def progress(step: int, loss: float) -> None:
        connection.send(Progress(step, loss))

    # A closed pipe means that the parent is gone: whatever is under way will be run again by its successor.
    with suppress(EOFError, BrokenPipeError, Interrupted):
        while True:
            connection.send(run_job(connection.recv(), progress))

"""A cell in a worker: the job it receives, the messages it sends, and how it runs."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.layout import step_of
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.study.attempts import Attempts
from lit_mult.study.lease import Lease
from lit_mult.training.folder import RunFolder


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to run a cell; plain values, so that it can be pickled."""

    config: dict[str, Any]
    cell: dict[str, Any]
    attempts: Path
    """Folder of the study's attempts."""
    work: Path
    """Run folder; removed at the end when nothing in it is kept."""
    record: Path
    diagnostics: Path
    keep_checkpoint: bool
    prune: bool
    """Ask after every validation whether to prune the cell."""

    @property
    def id(self) -> str:
        return str(self.cell["cell"])


@dataclass(frozen=True)
class Progress:
    """A point of the training-loss curve."""

    step: int
    loss: float


@dataclass(frozen=True)
class Evaluated:
    """The validation losses so far, (step, nats per token); the worker waits for the pruning decision."""

    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Finished:
    """The cell has its record."""

    record: RunRecord


@dataclass(frozen=True)
class AlreadyClaimed:
    """Another process runs the cell."""


@dataclass(frozen=True)
class LogMessage:
    """A line for the progress display."""

    line: str


@dataclass(frozen=True)
class Failed:
    """The cell has no record."""

    reason: str
    died: bool = False
    """The process ended before the cell did."""
    bad_input: bool = False
    """The user must fix it: other cells would fail in the same way."""
    trace: str = ""


Message = Progress | Evaluated | LogMessage | Finished | AlreadyClaimed | Failed
Outcome = Finished | AlreadyClaimed | Failed


@dataclass(frozen=True)
class ActiveAttempt:
    """This process's attempt at a cell."""

    job: Job
    lease: Lease

    @classmethod
    def begin(cls, job: Job) -> Self | Outcome:
        """Begin an attempt; an outcome when the cell cannot run or need not."""
        attempts = Attempts(job.attempts)
        checkpoint = RunFolder(job.work).newest_checkpoint()
        try:
            lease = attempts.begin(job.id, step_of(checkpoint) if checkpoint else 0)
        except OSError as error:
            return Failed(f"{job.attempts}: cannot be written ({error.strerror})", bad_input=True)
        if lease is None:
            return AlreadyClaimed()
        attempt = cls(job, lease)
        if job.record.is_file():  # finished since the sweep chose it
            return attempt.finished(RunRecord.read(job.record))
        return attempt

    def finished(self, record: RunRecord) -> Finished:
        """End the attempt: the cell has its record."""
        if not self.job.keep_checkpoint and not (self.job.work / "tensorboard").exists():
            shutil.rmtree(self.job.work, ignore_errors=True)
        self.lease.close("done")
        Attempts(self.job.attempts).clear(self.job.id)
        return Finished(record)

    def failed(self, error: Exception) -> Finished | Failed:
        """End the attempt: training raised an error."""
        if self.job.record.is_file():  # another process finished the cell after this lease expired
            return self.finished(RunRecord.read(self.job.record))
        if isinstance(error, UserError):
            self.stopped(reason_of(error))
            return Failed(str(error), bad_input=True)
        self.lease.close("failed", reason_of(error))
        return Failed(reason_of(error), trace=traceback.format_exc())

    def stopped(self, reason: str = "") -> None:
        """End the attempt; the next one resumes from its checkpoint."""
        self.lease.close("stopped", reason)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_job(job: Job, post: Callable[[Message], bool], stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Run one cell in this process. The only exception that escapes is a stop on request (`Interrupted`).

    Args:
        job: the cell.
        post: takes the messages before the outcome; for `Evaluated` it returns whether to prune the cell.
        stop: called after every step; True writes a checkpoint and stops.
    """
    attempt = ActiveAttempt.begin(job)
    return run_attempt(attempt, post, stop) if isinstance(attempt, ActiveAttempt) else attempt


def run_attempt(attempt: ActiveAttempt, post: Callable[[Message], bool], stop: Callable[[], bool]) -> Outcome:
    """Run the cell of an attempt; see `run_job`."""
    from lit_mult.training.run import run

    job, lease = attempt.job, attempt.lease

    def progress(step: int, loss: float) -> None:
        post(Progress(step, loss))

    try:
        record = run(
            RunConfig.from_dict(job.config),
            job.work,
            cell=CellInfo.model_validate(job.cell),
            record_path=job.record,
            diagnostics_path=job.diagnostics,
            keep_checkpoint=job.keep_checkpoint,
            on_progress=progress,
            prune=(lambda curve: post(Evaluated(curve))) if job.prune else None,
            should_stop=lambda: lease.lost or stop(),
        )
    except (Interrupted, KeyboardInterrupt, BrokenPipeError, EOFError) as error:
        attempt.stopped()
        if isinstance(error, Interrupted) and lease.lost and not stop():
            return AlreadyClaimed()
        raise
    except Exception as error:
        return attempt.failed(error)
    return attempt.finished(record)

"""Runs a study: every cell that has no record yet, on several workers, until all have one."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lit_mult.data.batches import TrainWindows, validation_windows
from lit_mult.data.cache import prepare
from lit_mult.errors import Interrupted, UserError
from lit_mult.parametrization.plan import plan_run
from lit_mult.study.folder import StudyFolder
from lit_mult.study.progress import SweepProgress
from lit_mult.study.queue import CellQueue, Ticket, cost
from lit_mult.study.spec import StudySpec
from lit_mult.study.worker import Failed, Finished, Job, Message, Progress, Worker, messages, run_job

_ATTEMPTS = 2
"""Times a cell is tried whose worker process died."""
_GRACE_SECONDS = 30.0
"""Time for a cell to write its checkpoint after a stop was requested."""


@dataclass
class SweepResult:
    """What came of one call of `sweep`."""

    folder: Path
    cells: int
    """Cells of the study."""
    ran: int = 0
    """Cells that this call finished."""
    diverged: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> reason, of the cells that have no record."""


def sweep(spec: StudySpec, out: Path | str, workers: int | None = None) -> SweepResult:
    """Run the cells of a study that have no record in `out` yet.

    Args:
        spec: the study.
        out: its results folder; new, or holding this same study.
        workers: number of processes, each with its share of the CPU threads; 0 runs the cells in this process, one
            after the other. By default one for each CPU core.

    Raises:
        UserError: the study does not fit the folder, or its data or settings are not usable.
        Interrupted: SIGINT or SIGTERM came; cells under way were checkpointed.
    """
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers}: must be 0 or more")
    corpora = check_cells(spec)
    folder = StudyFolder(Path(out))
    with folder.claim(spec, corpora):
        queue = CellQueue(spec, folder)
        result = SweepResult(folder.path, spec.n_cells)
        remaining = queue.remaining_cost()
        waiting = queue.n_waiting
        progress = SweepProgress(spec.n_cells, spec.n_cells - waiting, remaining, spec.budget.steps)
        stop = _Stop(folder)
        with progress, stop.listening():
            if workers == 0:
                _run_here(queue, folder, spec, progress, result, stop)
            else:
                cores = _cores()
                n_workers = max(1, min(workers or cores, waiting))
                _run_in_workers(queue, folder, spec, progress, result, stop, n_workers, max(1, cores // n_workers))
    return result


def check_cells(spec: StudySpec) -> list[str]:
    """Find before anything is written what would stop every cell of a point, and fill the token cache they share.

    Returns:
        The hashes of the corpora of the study.
    """
    corpora = {}
    for point in spec.points():
        config = point.first_cell().config
        data = json.dumps(config.data.model_dump(mode="json"))
        if data not in corpora:
            corpora[data] = prepare(config.data)
            TrainWindows(corpora[data].train, config.data.seq_len, config.train.batch_size, config.seed)
            validation_windows(corpora[data].val, config.data.seq_len, config.data.val_windows)
        plan_run(config, corpora[data].vocab_size)
    return sorted({corpus.hash for corpus in corpora.values()})


def _cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run_here(
    queue: CellQueue, folder: StudyFolder, spec: StudySpec, progress: SweepProgress, result: SweepResult, stop: _Stop
) -> None:
    while (ticket := queue.next()) is not None:
        stop.check()
        label = ticket.cell.label
        progress.started(label, cost(ticket.cell.config))
        outcome = run_job(_job(ticket, folder, spec), partial(progress.stepped, label))
        _settle(ticket, outcome, progress, result, attempts=_ATTEMPTS)


def _run_in_workers(
    queue: CellQueue,
    folder: StudyFolder,
    spec: StudySpec,
    progress: SweepProgress,
    result: SweepResult,
    stop: _Stop,
    n_workers: int,
    threads: int,
) -> None:
    idle: list[Worker] = [Worker(threads) for _ in range(n_workers)]
    busy: dict[Worker, Ticket] = {}
    attempts: Counter[str] = Counter()
    try:
        while True:
            stop.check()
            while idle and (ticket := queue.next()) is not None:
                worker = idle.pop()
                busy[worker] = ticket
                attempts[ticket.cell.id] += 1
                progress.started(ticket.cell.label, cost(ticket.cell.config))
                worker.submit(_job(ticket, folder, spec))
            if not busy:
                return
            for worker, message in messages(list(busy), timeout=1.0):
                ticket = busy[worker]
                if isinstance(message, Progress):
                    progress.stepped(ticket.cell.label, message.step, message.loss)
                    continue
                del busy[worker]
                if isinstance(message, Failed) and message.retry:
                    worker.stop()
                    worker.join(timeout=0)
                    worker = Worker(threads)
                idle.append(worker)
                _settle(ticket, message, progress, result, attempts[ticket.cell.id])
    finally:
        everyone = [*idle, *busy]
        for worker in everyone:
            worker.stop()
        for worker in everyone:
            worker.join(_GRACE_SECONDS)


def _job(ticket: Ticket, folder: StudyFolder, spec: StudySpec) -> Job:
    cell = ticket.cell
    config = cell.config.with_overrides({"trainer.progress_bar": False})
    return Job(
        config=config.to_dict(),
        cell=cell.info.model_dump(),
        work=folder.work(cell),
        record=folder.record(cell.id),
        keep_checkpoint=spec.keep_checkpoints,
    )


def _settle(ticket: Ticket, message: Message, progress: SweepProgress, result: SweepResult, attempts: int) -> None:
    label = ticket.cell.label
    if isinstance(message, Finished):
        ticket.complete(message.record)
        diverged = message.record.status == "diverged"
        result.ran += 1
        result.diverged += diverged
        progress.ended(label, diverged=diverged)
    elif isinstance(message, Failed):
        retry = message.retry and attempts < _ATTEMPTS
        ticket.fail(message.reason, retry=retry)
        progress.ended(label, failed=True, retry=retry)
        progress.say(f"{label}: {message.reason}{'; trying again' if retry else ''}")
        if message.trace:
            progress.say(message.trace)
        if message.bad_input:
            raise UserError(f"cell {ticket.cell.id}: {message.reason}")
        if not retry:
            result.failures[ticket.cell.id] = message.reason


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the sweep looks at between two messages; a second SIGINT interrupts.

    Not an exception from the handler: it could come in the middle of telling Optuna, or in a destructor, which
    swallows it.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.requested = False

    def check(self) -> None:
        """Raise `Interrupted` once a stop was requested."""
        if self.requested:
            raise Interrupted(f"stopped; finished cells are in {self.folder.path}, and the same command goes on")

    def _request(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while a sweep runs; a cell in this very process listens for itself while it trains."""
        here = threading.current_thread() is threading.main_thread()  # signals reach no other
        signals = (signal.SIGINT, signal.SIGTERM) if here else ()
        # What the caller has set to be ignored, as shells do with SIGINT for jobs in the background, stays ignored.
        heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._request) for number in heard}
        try:
            yield
        except Interrupted:
            self.requested = True
            self.check()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

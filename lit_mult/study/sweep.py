"""Runs a study: submits cells to an executor until all have a record."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lit_mult.data.batches import TrainWindows, validation_windows
from lit_mult.data.cache import prepare
from lit_mult.errors import Interrupted, UserError
from lit_mult.method.plan import plan_run
from lit_mult.method.presets import run_multipliers
from lit_mult.optim import imported
from lit_mult.registry.optimizers import check_any_stacked_form
from lit_mult.schema import RunRecord
from lit_mult.stacked.size import MOST_SUGGESTIONS, asked_members, members_that_fit
from lit_mult.study import executors
from lit_mult.study.attempts import RETRIES
from lit_mult.study.executor import Executor
from lit_mult.study.folder import StudyFolder
from lit_mult.study.job import AlreadyClaimed, Evaluated, Failed, Finished, Job, LogMessage, Message, Progress
from lit_mult.study.progress import SweepProgress
from lit_mult.study.queue import CellQueue
from lit_mult.study.search import Ticket, make_pruner
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import failing_in_one_line, open_storage

_REFRESH_SECONDS = 5.0
"""How often to read the results of other sweeps."""


@dataclass
class SweepResult:
    """Result of one call of `sweep`."""

    folder: Path
    cells: int
    """Cells of the study, with those added to its plan."""
    ran: int = 0
    """Cells that this call finished."""
    diverged: int = 0
    pruned: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> reason, of cells that were given up."""


def sweep(
    spec: StudySpec,
    out: Path | str,
    workers: int | None = None,
    *,
    storage: str | None = None,
    executor: str = "local",
    address: str | None = None,
    retries: int = RETRIES,
    retry_failed: bool = False,
    vectorize: str | int = "auto",
) -> SweepResult:
    """Run the cells of a study that have no record in `out` yet.

    Several sweeps may run the same study at once, on any machines that share the results folder. Each ends when all
    cells have a record or are given up.

    Args:
        spec: the study.
        out: its results folder; new, or holding this same study.
        workers: stacks (or single cells) to run at once; 0 runs them in this process. By default one per GPU, or else
            per CPU core (of the cluster, with ray).
        storage: Optuna storage, see `open_storage`; by default a journal file in the results folder.
        executor: a module of `lit_mult.study.executors`: local (processes of this machine), ray (a Ray cluster) or
            in_process (as with workers=0).
        address: of the Ray cluster ("auto" finds a running one); by default one is started on this machine.
        retries: see `Attempts.given_up`.
        retry_failed: retry cells that were given up earlier.
        vectorize: most cells that a worker trains as one stack, if their tensors have equal shapes (see
            `stacked.key`); "off" is 1, "auto" as many as fit on a GPU, or 1 on CPUs. Cells of an optimizer without a
            stacked form train one by one beside the others; a study of such cells alone is refused.

    Raises:
        UserError: the study does not match the folder, or its data, settings, storage or cluster are not usable.
        Interrupted: on SIGINT or SIGTERM; running cells were checkpointed.
    """
    for name, number in (("workers", workers), ("retries", retries)):
        if number is not None and number < 0:
            raise UserError(f"--{name} {number}: must be 0 or more")
    members = asked_members(vectorize)
    connect = executors.load("in_process" if workers == 0 else executor)
    folder = StudyFolder(Path(out).absolute())
    make_pruner(spec.pruner)
    if members is not None and members > 1:
        check_any_stacked_form({point.first_cell().config.optimizer for point in spec.points()})
    corpora = check_cells(spec)
    folder.check(spec, corpora)
    source = storage or folder.journal
    if retry_failed:
        for cell in list(folder.attempts.cells()):
            if folder.attempts.given_up(cell, retries):
                folder.attempts.clear(cell)
    with folder.locked():
        identity = folder.claim(spec, corpora)
        folder.remove_dead_sweeps()
        trials = open_storage(source, replace_damaged=not folder.running_sweeps())
        lease = folder.join()
    try:
        with failing_in_one_line(source):
            queue = CellQueue(spec, folder, trials, identity, lease.path.stem, retries)
            return _Sweep(spec, folder, queue, members).run(
                lambda cells: connect(workers, cells, spec.base_config.trainer, address)
            )
    finally:
        lease.path.unlink(missing_ok=True)
        lease.close("done")


def check_cells(spec: StudySpec) -> list[str]:
    """Check a cell of every point, and the multipliers by role of all, before anything is written.

    Fills the token cache that the cells share.

    Returns:
        Hashes of the study's corpora.
    """
    corpora = {}
    for point in spec.points():
        config = point.first_cell().config
        data = json.dumps(config.data.model_dump(mode="json"))
        if data not in corpora:
            corpora[data] = prepare(config.data)
            of_data = config.data
            TrainWindows(corpora[data].train, of_data.seq_len, config.train.batch_size, config.seed)
            validation_windows(corpora[data].val, of_data.seq_len, of_data.val_windows, of_data.val_offset)
        plan_run(config, corpora[data].vocab_size)
        imported.check(config.optimizer, config.optim)
        for nuisance in point.searched():
            run_multipliers(point.config(nuisance, config.seed))
    return sorted({corpus.hash for corpus in corpora.values()})


@dataclass(frozen=True)
class _Started:
    """A cell that was submitted to a worker."""

    ticket: Ticket
    attempts_before: int
    share: float
    """1 over the number of cells submitted with it."""


class _Sweep:
    """State of one call of `sweep`."""

    def __init__(self, spec: StudySpec, folder: StudyFolder, queue: CellQueue, members: int | None) -> None:
        """`members`: most cells of a stack; None: limited by GPU memory."""
        self.spec, self.folder, self.queue = spec, folder, queue
        self.result = SweepResult(folder.path, spec.n_cells)
        self.progress = SweepProgress(queue.counts(), queue.best_losses())
        self._stop = _Stop(folder)
        self._busy: dict[str, _Started] = {}
        self._early_deaths = 0.0
        """Workers in a row that died before they began an attempt, which no lease counts."""
        self._retried: dict[str, list[str]] = {}
        """Reason -> labels of the cells to retry that have just died of it."""
        self._members = members
        self._fitting: dict[str, int] = {}
        """Stack key -> members that fit on a worker's GPU."""

    def run(self, connect: Callable[[int], Executor]) -> SweepResult:
        """Run all remaining cells on the executor that `connect(number of cells)` makes."""
        with self.progress, self._stop.listening():
            counts = self.queue.counts()
            if counts.ready or counts.elsewhere:
                cells = counts.waiting + counts.elsewhere
                # Fewer may be left of a round of further seeds than the next one has.
                executor = connect(max(cells, self.spec.n_cells) if self.spec.precision else cells)
                try:
                    self._run(executor)
                    self.queue.publish()
                finally:
                    self._shut_down(executor)
        self.result.cells, self.result.failures = self.queue.counts().cells, self.queue.failures
        return self.result

    def _run(self, executor: Executor) -> None:
        refreshed = time.monotonic()
        while True:
            self._stop.check()
            self._start_cells(executor)
            ready = 0
            if not self._busy or time.monotonic() - refreshed > _REFRESH_SECONDS:
                self.queue.refresh()
                self.progress.update(counts := self.queue.counts(), self.queue.best_losses())
                refreshed, ready = time.monotonic(), counts.ready
                if not (self._busy or ready or counts.elsewhere):
                    return
            could_start = not self._busy and executor.free and ready
            executor.poll(0.0 if could_start else 1.0, self._handle)
            self._report_retries()

    def _start_cells(self, executor: Executor) -> None:
        workers = executor.workers * max(1, len(self.folder.running_sweeps()))
        share = self.progress.cost_to_come() / workers  # once for all workers, so that their shares are equal
        while executor.free and (ticket := self.queue.next()) is not None:
            stack = [ticket, *islice(self.queue.fitting(ticket), self._members_of(executor, ticket, share) - 1)]
            for member in stack:
                cell = member.cell
                attempts_before = len(self.folder.attempts.of(cell.id))
                self._busy[cell.id] = _Started(member, attempts_before, share=1 / len(stack))
                self.progress.started(cell.id, cell.label, cell.config.train.steps, member.search.cost)
            executor.submit([self._job(member) for member in stack])
            self.progress.update(self.queue.counts())

    def _members_of(self, executor: Executor, ticket: Ticket, share: float) -> int:
        """Size of the stack that this cell begins; `share`: of a worker, in the cost to come."""
        key = ticket.search.stack_key
        if key is None or (most := self._most_members(executor, ticket, key)) == 1:
            return 1
        return min(most, max(1, math.ceil(share / ticket.search.cost)))

    def _most_members(self, executor: Executor, ticket: Ticket, key: str) -> int:
        if self._members is not None:
            return self._members
        if key not in self._fitting:
            config, memory = ticket.cell.config, executor.gpu_memory()
            vocab_size = prepare(config.data).vocab_size if memory is not None else 0
            self._fitting[key] = 1 if memory is None else members_that_fit(config, vocab_size, memory)
        learns = self.spec.sampler == "tpe" and not ticket.search.point.is_grid
        return min(self._fitting[key], MOST_SUGGESTIONS) if learns else self._fitting[key]

    def _job(self, ticket: Ticket) -> Job:
        cell = ticket.cell
        config = cell.config.with_overrides({"trainer.progress_bar": False})
        return Job(
            config=config.to_dict(),
            cell=cell.info.model_dump(),
            attempts=self.folder.attempts_folder,
            work=self.folder.cell(cell.id).path,
            record=self.folder.record(cell.id),
            diagnostics=self.folder.diagnostics(cell.id),
            keep_checkpoint=self.spec.keep_checkpoints,
            prune=self.spec.pruner is not None and ticket.trial is not None,
        )

    def _handle(self, cell: str, message: Message) -> bool:
        started = self._busy[cell]
        match message:
            case Progress(step, loss):
                self.progress.stepped(cell, step, loss)
            case Evaluated(curve):
                return started.ticket.should_prune(curve)
            case LogMessage(line):
                self.progress.print(line)
            case AlreadyClaimed():
                self._ended(started.ticket, claimed=True)
            case Finished(record):
                self._finished(started.ticket, record)
            case Failed(died=True):
                self._died(started, message)
            case Failed():
                self._failed(started.ticket, message)
        return False

    def _finished(self, ticket: Ticket, record: RunRecord) -> None:
        del self._busy[ticket.cell.id]
        self.queue.complete(ticket, record)
        self._early_deaths = 0.0
        self.result.ran += 1
        self.result.diverged += record.status == "diverged"
        self.result.pruned += record.status == "pruned"
        self.progress.ended(ticket.cell.id, self.queue.counts(), self.queue.best_losses(), status=record.status)

    def _ended(self, ticket: Ticket, *, failure: str | None = None, claimed: bool = False) -> None:
        """A cell ended without a record."""
        del self._busy[ticket.cell.id]
        self.queue.release(ticket, failure=failure, claimed=claimed)
        self.progress.ended(ticket.cell.id, self.queue.counts())

    def _failed(self, ticket: Ticket, message: Failed) -> None:
        if message.bad_input:
            self._ended(ticket)
            raise UserError(f"cell {ticket.cell.id}: {message.reason}")
        self._ended(ticket, failure=message.reason)
        self.progress.print(f"failed {ticket.cell.label}: {message.reason}", "red")
        if message.trace:
            self.progress.print(message.trace)

    def _died(self, started: _Started, message: Failed) -> None:
        ticket, attempts = started.ticket, self.folder.attempts
        if (record := self.folder.finished(ticket.cell.id)) is not None:  # written right before its process died
            self._finished(ticket, record)
            return
        began = len(attempts.of(ticket.cell.id)) > started.attempts_before
        self._early_deaths = 0.0 if began else self._early_deaths + started.share
        if given_up := attempts.given_up(ticket.cell.id, self.queue.retries):
            self._failed(ticket, Failed(given_up))
        else:
            self._ended(ticket)
            self._retried.setdefault(message.reason, []).append(ticket.cell.label)
        if self._early_deaths > 2 * (self.queue.retries + 1):
            raise UserError(f"one worker after the other died before it began a cell: {message.reason}")

    def _report_retries(self) -> None:
        """Print one line for all cells of a stack, which die together."""
        for reason, (first, *others) in self._retried.items():
            more = f" and {len(others)} more" if others else ""
            self.progress.print(f"{first}{more}: {reason}; trying again", "yellow")
        self._retried.clear()

    def _shut_down(self, executor: Executor) -> None:
        """Stop the running cells, and close their trials."""
        executor.close()
        for started in self._busy.values():
            record = self.folder.finished(started.ticket.cell.id)
            if record is not None:
                self.queue.complete(started.ticket, record)
            else:
                self.queue.release(started.ticket)
        self.queue.close()


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the sweep checks between messages; a second SIGINT interrupts it.

    The first signal raises no exception, which could interrupt a write to Optuna's storage or be lost in a destructor.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.requested = False

    def check(self) -> None:
        """Raise `Interrupted` once a stop was requested."""
        if self.requested:
            raise Interrupted(
                f"stopped; finished cells are in {self.folder.path}; to resume, give the same command again"
            )

    def _request(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals while a sweep runs; a cell in this process has its own handlers while it trains."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        # Signals that the caller ignores stay ignored, such as SIGINT in background jobs of a shell.
        handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._request) for number in handled}
        try:
            yield
        except Interrupted:
            self.requested = True
            self.check()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

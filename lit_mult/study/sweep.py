"""Runs a study: every cell that has no record yet, wherever there is room, until all have one."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from lit_mult.data.batches import TrainWindows, validation_windows
from lit_mult.data.cache import prepare
from lit_mult.errors import Interrupted, UserError
from lit_mult.method.plan import plan_run
from lit_mult.registry.optimizers import check_stacked_form
from lit_mult.stacked.size import MOST_SUGGESTIONS, asked_members, members_that_fit
from lit_mult.study.attempts import RETRIES
from lit_mult.study.executors.base import Executor
from lit_mult.study.executors.in_process import InProcessExecutor
from lit_mult.study.executors.local import ProcessExecutor
from lit_mult.study.executors.ray import RayExecutor
from lit_mult.study.folder import StudyFolder
from lit_mult.study.job import AlreadyClaimed, Evaluated, Failed, Finished, Job, LogMessage, Message, Progress
from lit_mult.study.machine import slots
from lit_mult.study.progress import SweepProgress
from lit_mult.study.queue import CellQueue, Ticket, cost
from lit_mult.study.sampling import make_pruner
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import failing_in_one_line, open_storage

ExecutorName = Literal["local", "ray"]

_TEND_SECONDS = 5.0
"""How often to look after other sweeps."""


@dataclass
class SweepResult:
    """What came of one call of `sweep`."""

    folder: Path
    cells: int
    """Cells of the study, those added to its plan included."""
    ran: int = 0
    """Cells that this call finished."""
    diverged: int = 0
    pruned: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> reason, of the cells that were given up."""


def sweep(
    spec: StudySpec,
    out: Path | str,
    workers: int | None = None,
    *,
    storage: str | None = None,
    executor: ExecutorName = "local",
    address: str | None = None,
    retries: int = RETRIES,
    retry_failed: bool = False,
    vectorize: str | int = "auto",
) -> SweepResult:
    """Run the cells of a study that have no record in `out` yet.

    Any number of sweeps, on any number of machines that see the same results folder, may run the same study at once;
    each ends when all cells have a record or are given up.

    Args:
        spec: the study.
        out: its results folder; new, or holding this same study.
        workers: cells, or stacks of them, to run at once; 0 runs them in this process, one after the other. By default
            one for each GPU, or else for each CPU core (of the cluster, with ray).
        storage: where Optuna keeps the trials, see `open_storage`; by default a journal file in the results folder.
        executor: local, for processes of this machine; ray, for a Ray cluster.
        address: of the Ray cluster ("auto" finds a running one); by default one is started on this machine.
        retries: a cell is given up after more deaths of its process in a row without progress.
        retry_failed: try cells that were given up earlier once more.
        vectorize: the most cells that a worker trains together as one stacked model, where their tensors have equal
            shapes (see `parametrization.stacking`); "off" is 1, and "auto" as many as fit on a GPU, and 1 on CPUs.

    Raises:
        UserError: the study does not fit the folder, or its data, settings, storage or cluster are not usable.
        Interrupted: SIGINT or SIGTERM came; cells under way were checkpointed.
    """
    for name, number in (("workers", workers), ("retries", retries)):
        if number is not None and number < 0:
            raise UserError(f"--{name} {number}: must be 0 or more")
    members = asked_members(vectorize)
    folder = StudyFolder(Path(out).absolute())
    make_pruner(spec.pruner)
    if members is not None and members > 1:
        for point in spec.points():
            check_stacked_form(point.first_cell().config.optimizer)
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
        trials = open_storage(source, set_aside=not folder.running_sweeps())
        lease = folder.join()
    try:
        with failing_in_one_line(source):
            with folder.locked():
                queue = CellQueue(spec, folder, trials, identity, lease.path.stem, retries)
            return _Sweep(spec, folder, queue, members).run(partial(_executor, executor, workers, address))
    finally:
        lease.path.unlink(missing_ok=True)
        lease.close("done")


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


def _executor(name: ExecutorName, workers: int | None, address: str | None, spec: StudySpec, cells: int) -> Executor:
    """The executor asked for, with as many workers as asked for."""
    if address is not None and name != "ray":
        raise UserError(f"--address {address}: needs --executor ray")
    if workers == 0:
        return InProcessExecutor(spec.base_config.trainer)
    if name == "ray":
        return RayExecutor(workers, cells, spec.base_config.trainer, address)
    shares = slots(workers, cells, spec.base_config.trainer)
    return ProcessExecutor(shares)


@dataclass(frozen=True)
class _Started:
    """A cell that was given to a worker."""

    ticket: Ticket
    attempts_before: int
    share: float
    """Of the worker: 1 over the cells that it was given."""


class _Sweep:
    """One call of `sweep`, from the first cell to the last."""

    def __init__(self, spec: StudySpec, folder: StudyFolder, queue: CellQueue, members: int | None) -> None:
        """`members`: the most cells of a stack; None to decide by the GPUs' memory."""
        self.spec, self.folder, self.queue = spec, folder, queue
        self.result = SweepResult(folder.path, spec.n_cells)
        self.progress = SweepProgress(queue.counts(), spec.budget.steps)
        self._busy: dict[str, _Started] = {}
        self._stillborn = 0.0
        """Workers in a row that died before they began an attempt; nothing on file would put an end to that."""
        self._again: dict[str, list[str]] = {}
        """Reason -> labels of the cells that have failed for it just now and are to be tried again."""
        # Cells that somebody else is at work on, or another trial of ours, though their trial came to us: until when
        # to leave them alone.
        self._taken: list[tuple[Ticket, float]] = []
        self._members = members
        self._fitting: dict[str, int] = {}
        """Stack key -> members that fit on a worker's GPU."""

    def run(self, make_executor: Callable[[StudySpec, int], Executor]) -> SweepResult:
        stop = _Stop(self.folder)
        with self.progress, stop.listening():
            if (counts := self.queue.counts()).waiting + counts.elsewhere:
                executor = make_executor(self.spec, counts.waiting + counts.elsewhere)
                try:
                    self._run(executor, stop)
                finally:
                    self._leave(executor)
        self.result.cells, self.result.failures = self.queue.counts().cells, self.queue.failures
        return self.result

    def _run(self, executor: Executor, stop: _Stop) -> None:
        tended = time.monotonic()
        while True:
            stop.check()
            self._hand_out(executor)
            if not self._busy or time.monotonic() - tended > _TEND_SECONDS:
                self.queue.tend()
                self.progress.sync(self.queue.counts())
                tended = time.monotonic()
                counts = self.queue.counts()
                if not (self._busy or self._taken or counts.waiting or counts.elsewhere):
                    with self.folder.locked():
                        self.queue.settle()
                    counts = self.queue.counts()
                    if not (counts.waiting or counts.elsewhere):
                        return
            could_start = not self._busy and executor.free and self.queue.counts().waiting
            executor.poll(0.0 if could_start else 1.0, self._handle)
            self._say_what_is_tried_again()

    def _hand_out(self, executor: Executor) -> None:
        left_alone, self._taken = self._taken, []
        for taken, until in left_alone:
            if time.monotonic() <= until:
                self._taken.append((taken, until))
            elif (record := self.folder.finished(taken.cell.id)) is not None:
                self.queue.complete(taken, record)
            elif executor.free and taken.cell.id not in self._busy:
                self._start(executor, [taken])
            else:
                self._taken.append((taken, until))
        shares: dict[str | None, int] = {}  # of all that waits now, or the last worker would get least
        while executor.free and (ticket := self.queue.next()) is not None:
            if ticket.cell.id in self._busy:  # two trials of a sampled search may stand for one cell
                self._leave_alone(ticket)
                continue
            most = self._most_members(executor, ticket)
            if most > 1 and ticket.search.key not in shares:
                workers = executor.workers * max(1, len(self.folder.running_sweeps()))
                shares[ticket.search.key] = math.ceil((1 + self.queue.waiting_like(ticket)) / workers)
            self._start(executor, self._stack(ticket, min(most, shares.get(ticket.search.key, 1))))

    def _most_members(self, executor: Executor, ticket: Ticket) -> int:
        """The most cells that the stack of a cell may have."""
        key, config = ticket.search.key, ticket.cell.config
        if key is None:
            return 1
        if self._members is not None:
            return self._members
        if key not in self._fitting:
            memory = executor.gpu_memory()
            vocab_size = prepare(config.data).vocab_size if memory is not None else 0
            self._fitting[key] = 1 if memory is None else members_that_fit(config, vocab_size, memory)
        learns = self.spec.sampler == "tpe" and not ticket.search.point.is_grid
        return min(self._fitting[key], MOST_SUGGESTIONS) if learns else self._fitting[key]

    def _stack(self, ticket: Ticket, members: int) -> list[Ticket]:
        """A cell with others that wait and fit it, up to so many in all."""
        stack = {ticket.cell.id: ticket}
        others = self.queue.fitting(ticket)
        while len(stack) < members and (other := next(others, None)) is not None:
            if other.cell.id in self._busy or other.cell.id in stack:
                self._leave_alone(other)
            else:
                stack[other.cell.id] = other
        return list(stack.values())

    def _leave_alone(self, ticket: Ticket) -> None:
        self._taken.append((ticket, time.monotonic() + _TEND_SECONDS))

    def _start(self, executor: Executor, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            cell = ticket.cell
            attempts_before = len(self.folder.attempts.of(cell.id))
            self._busy[cell.id] = _Started(ticket, attempts_before, share=1 / len(tickets))
            self.progress.started(cell.id, cell.label, cost(cell.config))
        executor.submit([self._job(ticket) for ticket in tickets])

    def _job(self, ticket: Ticket) -> Job:
        cell = ticket.cell
        config = cell.config.with_overrides({"trainer.progress_bar": False})
        return Job(
            config=config.to_dict(),
            cell=cell.info.model_dump(),
            attempts=self.folder.attempts.folder,
            work=self.folder.cell(cell.id).path,
            record=self.folder.record(cell.id),
            diagnostics=self.folder.diagnostics(cell.id),
            keep_checkpoint=self.spec.keep_checkpoints,
            prune=self.spec.pruner is not None,
        )

    def _handle(self, cell: str, message: Message) -> bool:
        started = self._busy[cell]
        if isinstance(message, Progress):
            self.progress.stepped(cell, message.step, message.loss)
        elif isinstance(message, Evaluated):
            return started.ticket.should_prune(message.curve)
        elif isinstance(message, LogMessage):
            self.progress.say(message.line)
        else:
            del self._busy[cell]
            if isinstance(message, AlreadyClaimed):
                self.progress.ended(cell)
                self._leave_alone(started.ticket)
            elif isinstance(message, Finished):
                self._finished(started.ticket, message)
            else:
                self._failed(started, message)
        return False

    def _finished(self, ticket: Ticket, message: Finished) -> None:
        self.queue.complete(ticket, message.record)
        status = message.record.status
        self._stillborn = 0.0
        self.result.ran += 1
        self.result.diverged += status == "diverged"
        self.result.pruned += status == "pruned"
        self.progress.ended(ticket.cell.id, status=status)

    def _failed(self, started: _Started, message: Failed) -> None:
        ticket, reason = started.ticket, message.reason
        if message.died and (record := self.folder.finished(ticket.cell.id)) is not None:  # with its last breath
            self._finished(ticket, Finished(record))
            return
        final = not (message.died or message.bad_input)
        if message.died:
            given_up = self.folder.attempts.given_up(ticket.cell.id, self.queue.retries)
            final, reason = given_up is not None, given_up or reason
            began = len(self.folder.attempts.of(ticket.cell.id)) > started.attempts_before
            self._stillborn = 0.0 if began else self._stillborn + started.share
        self.queue.fail(ticket, reason, final=final)
        self.progress.ended(ticket.cell.id, failed=final)
        if message.bad_input:
            raise UserError(f"cell {ticket.cell.id}: {reason}")
        if final:
            self.progress.say(f"{ticket.cell.label}: {reason}")
        else:
            self._again.setdefault(reason, []).append(ticket.cell.label)
        if message.trace:
            self.progress.say(message.trace)
        if self._stillborn > 2 * (self.queue.retries + 1):
            raise UserError(f"one worker after the other died before it began a cell: {message.reason}")

    def _say_what_is_tried_again(self) -> None:
        """One line for all cells of a stack, which die together."""
        for reason, (first, *others) in self._again.items():
            more = f" and {len(others)} more" if others else ""
            self.progress.say(f"{first}{more}: {reason}; trying again")
        self._again.clear()

    def _leave(self, executor: Executor) -> None:
        """Stop what is under way and let its cells wait again, for this storage may never see this sweep again."""
        executor.close()
        taken = [ticket for ticket, _ in self._taken]
        for ticket in [*(started.ticket for started in self._busy.values()), *taken]:
            record = self.folder.finished(ticket.cell.id)
            if record is not None:
                self.queue.complete(ticket, record)
            else:
                self.queue.fail(ticket, "stopped", final=False)


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

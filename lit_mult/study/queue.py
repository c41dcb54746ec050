"""The queue of a sweep: the cells of a study that have no record and that no process is running."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from optuna.storages import BaseStorage

from lit_mult.schema import RunRecord
from lit_mult.stacked.key import stack_key
from lit_mult.study.cells import StudyCells
from lit_mult.study.folder import StudyFolder
from lit_mult.study.search import PointSearch, Ticket, make_pruner
from lit_mult.study.spec import StudySpec, line_of

BestLosses = dict[str, dict[int, float]]
"""Line (arm, and factors but the width) -> width -> lowest final loss."""


@dataclass
class Counts:
    """Cells of a study by status, and their estimated cost (in the unit of `search.cost`)."""

    cells: int = 0
    """All cells, with those added to the plan."""
    waiting: int = 0
    ready: int = 0
    """Waiting cells that can begin now; the others depend on cells that have not ended."""
    elsewhere: int = 0
    """Running in other sweeps."""
    here: int = 0
    """Running in this sweep."""
    failed: int = 0
    cost: float = 0.0
    """Of all cells."""
    cost_to_come: float = 0.0
    """Of cells that wait or run in other sweeps."""

    @property
    def done(self) -> int:
        """Cells that have a record."""
        return self.cells - self.waiting - self.elsewhere - self.here - self.failed


class CellQueue:
    """The cells of a study as one sweep sees them.

    The results folder is the only source of truth: a cell with a record is done, one with a live lease is running. Two
    sweeps may take the same cell at the same time; the lease of the attempt lets only one of them run it.
    """

    def __init__(
        self, spec: StudySpec, folder: StudyFolder, storage: BaseStorage, identity: str, sweep: str, retries: int
    ) -> None:
        """Open or create the Optuna studies, and bring them up to date with the records.

        Args:
            spec: the study.
            folder: its results folder.
            storage: of the Optuna trials.
            identity: id of the folder, from `folder.claim`.
            sweep: name of this sweep's lease.
            retries: see `Attempts.given_up`.

        Raises:
            UserError: the storage belongs to another results folder.
        """
        self.folder, self.retries = folder, retries
        self.failures: dict[str, str] = {}
        """Cell -> reason, of the cells that were given up."""
        self._records: dict[str, RunRecord] = {}
        self._here: set[str] = set()
        self._elsewhere: set[str] = set()
        pruner = make_pruner(spec.pruner)
        self._cells = StudyCells(spec, folder)
        with folder.locked():
            self._searches = [
                PointSearch(known, folder, storage, pruner, identity, sweep) for known in self._cells.points
            ]
            # The most expensive cells first, so that no long cell remains at the end.
            self._searches.sort(key=lambda search: search.cost, reverse=True)
            self.refresh()
            attempted = set(folder.attempts.cells())
            for search in self._searches:
                search.adopt(self._of_point(search), attempted)
                search.publish(self._records)

    def counts(self) -> Counts:
        counts = Counts(here=len(self._here), failed=len(self.failures))
        for search in self._searches:
            waiting = self._waiting(search)
            elsewhere = len(search.cells.keys() & self._elsewhere)
            counts.cells += search.known.n_cells
            counts.waiting += waiting
            counts.ready += self._ready(search)
            counts.elsewhere += elsewhere
            counts.cost += search.known.n_cells * search.cost
            counts.cost_to_come += (waiting + elsewhere) * search.cost
        return counts

    def best_losses(self) -> BestLosses:
        """The lowest final loss so far, nats per token, over rates and seeds; lines in the order of the study."""
        best: BestLosses = {line_of(known.point.arm, known.point.factors): {} for known in self._cells.points}
        for record in self._records.values():
            if record.cell is not None and record.status == "completed" and record.final_loss is not None:
                row = best.setdefault(line_of(record.cell.arm, record.cell.factors), {})
                width = record.config["model"]["d_model"]
                row[width] = min(record.final_loss, row.get(width, math.inf))
        return {line: row for line, row in best.items() if row}

    def next(self) -> Ticket | None:
        """Take the next cell to run; None when no cell waits."""
        return next(self._take(self._searches), None)

    def fitting(self, ticket: Ticket) -> Iterator[Ticket]:
        """Take further cells, lazily, that can be stacked with a cell that was taken."""
        key = ticket.search.stack_key
        return self._take([search for search in self._searches if search.stack_key == key] if key else [])

    def complete(self, ticket: Ticket, record: RunRecord) -> None:
        """A cell has its record: report it to Optuna, and remove the cell's work files."""
        self._here.discard(ticket.cell.id)
        self._records[ticket.cell.id] = record
        self.folder.clear(ticket.cell.id)
        if not ticket.search.point.is_grid:  # the other seeds of its trial may begin
            ticket.search.known.refresh(self._records)
        with self.folder.locked():
            ticket.search.publish(self._records)

    def release(self, ticket: Ticket, *, failure: str | None = None, claimed: bool = False) -> None:
        """A cell ended without a record: it waits again, unless it failed or another process has claimed it."""
        self._here.discard(ticket.cell.id)
        ticket.search.release(ticket)
        if failure is not None:
            self.failures[ticket.cell.id] = failure
        if claimed:  # until the next refresh
            self._elsewhere.add(ticket.cell.id)

    def refresh(self) -> None:
        """Read the results of other sweeps, and extend the grids whose optimum lies at an edge."""
        self._elsewhere.clear()
        for path in self.folder.records():
            if path.stem not in self._records and (record := self.folder.finished(path.stem)) is not None:
                self._records[path.stem] = record
        self._cells.refresh(self._records)
        known = {cell for search in self._searches for cell in search.cells}
        for cell in list(self.folder.attempts.cells()):
            if cell in self._records and cell not in self._here:
                self.folder.clear(cell)
            elif cell in known:
                self._is_free(cell)

    def publish(self) -> None:
        """Bring Optuna up to date with the records, also those of killed sweeps."""
        with self.folder.locked():
            for search in self._searches:
                search.publish(self._records)

    def close(self) -> None:
        """End this sweep's part in Optuna: no trial of it stays open."""
        for search in self._searches:
            search.close()

    def _is_free(self, cell: str) -> bool:
        """Whether a cell can be started, by the current state of the folder."""
        if self._has_begun(cell):
            return False
        if (record := self.folder.finished(cell)) is not None:
            self._records[cell] = record
        elif self.folder.attempts.is_running(cell):
            self._elsewhere.add(cell)
        elif reason := self.folder.attempts.given_up(cell, self.retries):
            self.failures[cell] = reason
        else:
            return True
        return False

    def _waiting(self, search: PointSearch) -> int:
        return search.known.n_cells - sum(map(self._has_begun, search.cells))

    def _ready(self, search: PointSearch) -> int:
        return search.known.startable + len(search.cells) - sum(map(self._has_begun, search.cells))

    def _has_begun(self, cell: str) -> bool:
        return cell in self._records or cell in self._here or cell in self._elsewhere or cell in self.failures

    def _take(self, searches: list[PointSearch]) -> Iterator[Ticket]:
        for search in searches:
            while (ticket := self._take_from(search)) is not None:
                key = search.stack_key
                assert key is None or key == stack_key(ticket.cell.config)
                self._here.add(ticket.cell.id)
                yield ticket

    def _take_from(self, search: PointSearch) -> Ticket | None:
        for cell in search.cells.values():
            if self._is_free(cell.id):
                return search.ticket(cell)
        if not search.known.to_sample:
            return None
        with self.folder.locked():
            return search.sample()

    def _of_point(self, search: PointSearch) -> list[RunRecord]:
        point = search.point
        return [
            record
            for record in self._records.values()
            if record.cell and (record.cell.arm, record.cell.factors) == (point.arm, point.factors)
        ]

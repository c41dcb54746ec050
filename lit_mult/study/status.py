"""Status of a study, read from its results folder: records, attempts and sweeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lit_mult.errors import UserError
from lit_mult.layout import step_of
from lit_mult.schema import RunRecord
from lit_mult.study.attempts import Attempt
from lit_mult.study.cells import StudyCells
from lit_mult.study.folder import StudyFolder
from lit_mult.study.lease import read_lease
from lit_mult.study.spec import StudySpec
from lit_mult.training.folder import RunFolder

_DAMAGED = "damaged"


@dataclass(frozen=True)
class StudyStatus:
    """Cells of a study by status."""

    folder: Path
    name: str
    cells: int
    """Cells of the plan, and those that records have added to it."""
    ended: Counter[str]
    """Number of records by status: completed, diverged, pruned."""
    running: list[Attempt]
    interrupted: dict[str, int]
    """Cell -> step of its checkpoint, of cells that wait to be resumed."""
    failed: dict[str, str]
    """Cell -> reason, of cells that were given up."""
    damaged: list[Path]
    """Records that cannot be read; they are among `ended`, as damaged."""
    sweeps: list[dict[str, Any]]
    """Leases of the sweeps that run on the folder: machine, pid and since (UTC, ISO 8601)."""

    @property
    def waiting(self) -> int:
        """Cells without a record that no process runs, including interrupted ones."""
        return max(0, self.cells - self.ended.total() - len(self.running) - len(self.failed))

    def to_dict(self) -> dict[str, Any]:
        """The status for programs, as plain values (JSON types)."""
        running = ("cell", "number", "machine", "pid", "since", "from_step")
        return {
            "study": self.name,
            "cells": self.cells,
            "waiting": self.waiting,
            "ended": dict(self.ended),
            "running": [{name: getattr(attempt, name) for name in running} for attempt in self.running],
            "interrupted": self.interrupted,
            "failed": self.failed,
            "damaged": [str(path) for path in self.damaged],
            "sweeps": [{name: by.get(name) for name in ("machine", "pid", "since")} for by in self.sweeps],
        }

    def lines(self) -> Iterator[str]:
        """The status for a terminal."""
        numbers = {"waiting": self.waiting, "running": len(self.running), **self.ended, "failed": len(self.failed)}
        yield f"{self.name}: {self.cells} cells: {', '.join(f'{n} {what}' for what, n in numbers.items() if n)}"
        for by in self.sweeps:
            yield f"  sweep on {by['machine']}, process {by['pid']}, for {_since(by['since'])}"
        for attempt in self.running:
            number = f", attempt {attempt.number}" if attempt.number > 1 else ""
            from_step = f" from step {attempt.from_step}" if attempt.from_step else ""
            where = f"on {attempt.machine}, process {attempt.pid}, for {_since(attempt.since)}"
            yield f"  running {attempt.cell}: {where}{from_step}{number}"
        for cell, step in self.interrupted.items():
            yield f"  waiting {cell}: interrupted, resumes from {f'step {step}' if step else 'the start'}"
        for cell, reason in self.failed.items():
            yield f"  failed {cell}: {reason}"
        for path in self.damaged:
            yield f"  damaged {path}: the next sweep sets it aside and trains the cell anew"


def study_status(folder: Path | str, retries: int) -> StudyStatus:
    """Read the status of a study; nothing is written.

    Args:
        folder: its results folder.
        retries: see `Attempts.given_up`.

    Raises:
        UserError: the folder holds no study.
    """
    study = StudyFolder(Path(folder))
    spec, attempts = study.spec(), study.attempts
    records = {path.stem: path for path in study.records()}
    running, interrupted, failed = [], {}, {}
    for cell in attempts.cells():
        of_cell = attempts.of(cell)
        if cell in records or not of_cell:  # it has ended, perhaps since the folder was listed
            continue
        last = of_cell[-1]
        if last.state == "running":
            running.append(last)
        elif reason := attempts.given_up(cell, retries):
            failed[cell] = reason
        else:
            checkpoint = RunFolder(study.cell(cell).path).newest_checkpoint()
            interrupted[cell] = step_of(checkpoint) if checkpoint else 0
    leases = [read_lease(path) for path in study.running_sweeps()]
    statuses = {path: _status(path) for path in records.values()}
    return StudyStatus(
        folder=study.path,
        name=spec.name,
        cells=_n_cells(spec, study),
        ended=Counter(statuses.values()),
        running=running,
        interrupted=interrupted,
        failed=failed,
        damaged=[path for path, status in statuses.items() if status == _DAMAGED],
        sweeps=[by for by in leases if by],
    )


def _n_cells(spec: StudySpec, study: StudyFolder) -> int:
    if not spec.grows:
        return spec.n_cells
    records = {}
    for path in study.records():
        with suppress(UserError):  # damaged: counted as such by the caller
            records[path.stem] = RunRecord.read(path)
    cells = StudyCells(spec, study)
    cells.refresh(records)
    return cells.n_cells


def _status(record: Path) -> str:
    try:
        return str(json.loads(record.read_bytes())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return _DAMAGED


def _since(moment: str) -> str:
    seconds = seconds_since(moment)
    return "unknown time" if seconds is None else str(timedelta(seconds=round(seconds)))


def seconds_since(moment: Any) -> float | None:
    """From a moment (UTC, ISO 8601) to now; None if it is none."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    except (TypeError, ValueError):
        return None

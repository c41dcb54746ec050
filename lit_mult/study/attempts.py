"""The attempts at a cell: one numbered lease each, so that only one runs at a time and every death is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from lit_mult.study.lease import Lease, is_alive, read_lease

RETRIES = 3
"""Default number of deaths in a row without progress after which a cell is still retried."""

State = Literal["running", "stopped", "failed", "died"]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell, read from its lease."""

    cell: str
    number: int
    state: State
    """stopped: on request. failed: training raised an error. died: its process ended without closing the lease."""
    machine: str
    pid: int
    since: str
    """UTC, ISO 8601."""
    from_step: int
    """Step of the checkpoint that it resumed from; 0: from the start."""
    reason: str


class Attempts:
    """The attempts at the cells of one study, kept in a folder as CELL.NUMBER.json; gone once a cell has its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, cell: str, from_step: int) -> Lease | None:
        """Start the next attempt; None while another one is running.

        Raises:
            OSError: the folder cannot be written.
        """
        before = self._paths(cell)
        if before and is_alive(before[-1]):
            return None
        number = self._number(before[-1]) + 1 if before else 1
        try:
            return Lease(self._path(cell, number), {"from_step": from_step}, successor=self._path(cell, number + 1))
        except FileExistsError:  # another process was faster
            return None

    def is_running(self, cell: str) -> bool:
        """Whether a process runs the cell."""
        paths = self._paths(cell)
        return bool(paths) and is_alive(paths[-1])

    def of(self, cell: str) -> list[Attempt]:
        """The attempts at a cell, oldest first."""
        return [_read(cell, self._number(path), path) for path in self._paths(cell)]

    def cells(self) -> Iterator[str]:
        """Cells with an attempt."""
        yield from sorted({path.name.rsplit(".", 2)[0] for path in self.folder.glob("*.*.json") if path.name[0] != "."})

    def given_up(self, cell: str, retries: int) -> str | None:
        """Why the cell is not retried; None while it is.

        A failure is final. A death is not, as its machine may have gone down for other reasons; but after more than
        `retries` deaths in a row from the same step, the cell is taken to be the cause.
        """
        attempts = self.of(cell)
        if not attempts:
            return None
        last = attempts[-1]
        if last.state == "failed":
            return last.reason
        if (deaths := _deaths(attempts)) > retries:
            return f"its process died {deaths} times after step {last.from_step}"
        return None

    def deaths(self, cell: str) -> int:
        """Latest deaths in a row from the same step."""
        return _deaths(self.of(cell))

    def clear(self, cell: str) -> None:
        for path in self._paths(cell):  # the newest last, so that other processes do not reuse a number meanwhile
            path.unlink(missing_ok=True)

    def _path(self, cell: str, number: int) -> Path:
        return self.folder / f"{cell}.{number}.json"

    def _paths(self, cell: str) -> list[Path]:
        paths = (path for path in self.folder.glob(f"{cell}.*.json") if re.fullmatch(r".*\.\d+\.json", path.name))
        return sorted(paths, key=self._number)

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.name.rsplit(".", 2)[1])


def _deaths(attempts: list[Attempt]) -> int:
    ended = [attempt for attempt in reversed(attempts) if attempt.state != "stopped"]
    return len(
        list(takewhile(lambda attempt: attempt.state == "died" and attempt.from_step == attempts[-1].from_step, ended))
    )


def _read(cell: str, number: int, path: Path) -> Attempt:
    content = read_lease(path)
    ended = content.get("ended")
    state: State = "failed" if ended == "failed" else "stopped" if ended else "running" if is_alive(path) else "died"
    return Attempt(
        cell=cell,
        number=number,
        state=state,
        machine=str(content.get("machine", "?")),
        pid=int(content.get("pid", 0)),
        since=str(content.get("since", "?")),
        from_step=int(content.get("from_step", 0)),
        reason=str(content.get("reason", "")),
    )

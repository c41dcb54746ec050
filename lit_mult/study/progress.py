"""Progress display of a sweep: cells done, time left, and the loss of every running cell."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lit_mult.study.queue import Counts

_PLAIN_EVERY_SECONDS = 15.0
_ROWS, _IN_A_LINE = 12, 3
"""Most running cells in the live display, and in a plain line; a stack has many."""


@dataclass
class _Running:
    """A running cell."""

    label: str
    steps: int
    cost: float
    step: int = 0
    loss: float | None = None


class SweepProgress:
    """A live display on a terminal, a plain line every 15 s elsewhere."""

    def __init__(self, counts: Counts, console: Console | None = None) -> None:
        """`counts` at the start."""
        self.console = console or Console(stderr=True)
        self.diverged = self.pruned = 0
        self._counts = counts
        self._done_before = counts.cost - counts.cost_to_come
        self._running: dict[str, _Running] = {}
        self.start = self._last_plain = time.monotonic()
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        self.console.print(self._headline())

    def update(self, counts: Counts) -> None:
        self._counts = counts
        self._tick()

    def started(self, cell: str, label: str, steps: int, cost: float) -> None:
        self._running[cell] = _Running(label, steps, cost)

    def stepped(self, cell: str, step: int, loss: float) -> None:
        self._running[cell].step, self._running[cell].loss = step, loss
        self._tick()

    def ended(self, cell: str, counts: Counts, *, status: str = "") -> None:
        """A cell has ended, with the `status` of its record if it has one."""
        del self._running[cell]
        self.diverged += status == "diverged"
        self.pruned += status == "pruned"
        self.update(counts)

    def print(self, line: str) -> None:
        """Print a permanent line above the display."""
        self.console.print(Text(line), soft_wrap=True)

    def cost_to_come(self) -> float:
        """Of the cells that wait or run elsewhere, and of the steps that the running ones have left."""
        running = sum(cell.cost * (1 - cell.step / cell.steps) for cell in self._running.values())
        return self._counts.cost_to_come + running

    def seconds_left(self) -> float | None:
        """Estimate from the speed so far; None before any progress."""
        to_come = self.cost_to_come()
        spent = self._counts.cost - to_come - self._done_before
        return (time.monotonic() - self.start) * to_come / spent if spent > 0 else None

    def _headline(self) -> str:
        counts, left = self._counts, self.seconds_left()
        parts = [f"{counts.done}/{counts.cells} cells", f"{_clock(time.monotonic() - self.start)} elapsed"]
        if counts.done + counts.failed < counts.cells:
            parts.append(f"ETA {_clock(left)}" if left is not None else "ETA unknown yet")
        numbers = {"elsewhere": counts.elsewhere, "pruned": self.pruned, "diverged": self.diverged}
        numbers |= {"failed": counts.failed}
        return " · ".join(parts + [f"{number} {what}" for what, number in numbers.items() if number])

    def render(self) -> RenderableType:
        """The current display: headline, bar, and a line for each of the first running cells."""
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(no_wrap=True)
        running = list(self._running.values())
        for cell in running[:_ROWS]:
            loss = "" if cell.loss is None else f"loss {cell.loss:.3f}"
            table.add_row(cell.label, f"step {cell.step}/{cell.steps}", loss)
        if more := running[_ROWS:]:
            table.add_row(f"and {len(more)} more")
        display = Table.grid()  # not a Group: ProgressBar prints no newline
        bar = ProgressBar(total=self._counts.cells, completed=self._counts.done, width=40)
        for part in (Text(self._headline()), bar, table):
            display.add_row(part)
        return display

    def _tick(self) -> None:
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_plain < _PLAIN_EVERY_SECONDS:
            return
        self._last_plain = now
        cells = [cell for cell in self._running.values() if cell.loss is not None]
        running = ", ".join(f"{cell.label} step {cell.step} loss {cell.loss:.3f}" for cell in cells[:_IN_A_LINE])
        more = f" and {len(cells) - _IN_A_LINE} more" if len(cells) > _IN_A_LINE else ""
        print(f"{self._headline()} · {running}{more}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

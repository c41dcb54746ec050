"""Progress display of a sweep: cells done, time left, best losses so far, and the loss of every running cell."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lit_mult.study.queue import BestLosses, Counts
from lit_mult.training.progress import Display, bar_below, clock, rate

_MOST_ROWS = 12
"""Most lines, and most running cells, in the live display; a stack has many."""
_WIDTHS = 4
"""Widths that have a column on a terminal of 80 characters."""


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

    def __init__(self, counts: Counts, best: BestLosses | None = None, console: Console | None = None) -> None:
        """`counts` and `best` at the start."""
        self.diverged = self.pruned = self.ended_here = 0
        self._counts, self._best = counts, best or {}
        self._done_before = counts.cost - counts.cost_to_come
        self._running: dict[str, _Running] = {}
        self.start = time.monotonic()
        self._display = Display(self.render, self.line, console)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()
        self._display.print(self._headline())

    def update(self, counts: Counts, best: BestLosses | None = None) -> None:
        self._counts, self._best = counts, self._best if best is None else best
        self._display.tick()

    def started(self, cell: str, label: str, steps: int, cost: float) -> None:
        self._running[cell] = _Running(label, steps, cost)

    def stepped(self, cell: str, step: int, loss: float) -> None:
        self._running[cell].step, self._running[cell].loss = step, loss
        self._display.tick()

    def ended(self, cell: str, counts: Counts, best: BestLosses | None = None, *, status: str = "") -> None:
        """A cell has ended, with the `status` of its record if it has one."""
        del self._running[cell]
        self.ended_here += bool(status)
        self.diverged += status == "diverged"
        self.pruned += status == "pruned"
        self.update(counts, best)

    def print(self, line: str, style: str = "") -> None:
        """Print a permanent line above the display."""
        self._display.print(line, style)

    def cost_to_come(self) -> float:
        """Of the cells that wait or run elsewhere, and of the steps that the running ones have left."""
        running = sum(cell.cost * (1 - cell.step / cell.steps) for cell in list(self._running.values()))
        return self._counts.cost_to_come + running

    def seconds_left(self) -> float | None:
        """Estimate from the speed so far; None before any progress."""
        to_come = self.cost_to_come()
        spent = self._counts.cost - to_come - self._done_before
        return (time.monotonic() - self.start) * to_come / spent if spent > 0 else None

    def line(self) -> str:
        """The headline, how many cells run, the range of their losses, and the best loss so far."""
        parts = [self._headline()]
        if self._running:
            losses = [cell.loss for cell in self._running.values() if cell.loss is not None]
            spread = f" (loss {min(losses):.3f} to {max(losses):.3f})" if losses else ""
            parts.append(f"{len(self._running)} running{spread}")
        best = {f"{line}, d = {width}": loss for line, row in self._best.items() for width, loss in row.items()}
        if best:
            lowest = min(best, key=lambda place: best[place])
            parts.append(f"best {best[lowest]:.3f} ({lowest})")
        return " · ".join(parts)

    def _headline(self) -> str:
        counts, left, seconds = self._counts, self.seconds_left(), time.monotonic() - self.start
        parts = [f"{counts.done}/{counts.cells} cells", f"{clock(seconds)} elapsed"]
        if self.ended_here:
            parts.append(f"{rate(3600 * self.ended_here / seconds)} cells/h")
        if counts.done + counts.failed < counts.cells:
            parts.append(f"ETA {clock(left)}" if left is not None else "ETA unknown yet")
        numbers = {"elsewhere": counts.elsewhere, "pruned": self.pruned, "diverged": self.diverged}
        numbers |= {"failed": counts.failed}
        return " · ".join(parts + [f"{number} {what}" for what, number in numbers.items() if number])

    def render(self) -> RenderableType:
        """The current display: headline, bar, best losses by line and width, and the first of the running cells."""
        console = self._display.console
        display = bar_below(self._headline(), self._counts.done, self._counts.cells)
        rows = max(1, min(_MOST_ROWS, (console.height - 8) // 2))
        if best := self._best:
            display.add_row(_losses(best, rows, console.width))
        if running := list(self._running.values()):
            display.add_row(_cells(running, rows, console.width))
        display.add_row(Text("Ctrl-C stops; the same command resumes", "dim"))
        return display


def _losses(best: BestLosses, most: int, width: int) -> Table:
    """Lowest final losses, the lowest at each width bold."""
    widths = sorted({width for row in best.values() for width in row})[-_WIDTHS:]
    lowest = {width: min(row.get(width, math.inf) for row in best.values()) for width in widths}

    def cell(loss: float | None, d_model: int) -> Text:
        return Text("" if loss is None else f"{loss:.4f}", "bold" if loss == lowest[d_model] else "")

    rows = [[Text(line), *(cell(row.get(d_model), d_model) for d_model in widths)] for line, row in best.items()]
    return _grid(["best loss so far", *(f"d = {d_model}" for d_model in widths)], rows, most, width)


def _cells(running: Sequence[_Running], most: int, width: int) -> Table:
    rows = [
        [Text(cell.label), Text(f"{cell.step}/{cell.steps}"), Text("" if cell.loss is None else f"{cell.loss:.3f}")]
        for cell in running
    ]
    return _grid([f"{len(running)} running", "step", "loss"], rows, most, width)


def _grid(heading: Sequence[str], rows: Sequence[Sequence[Text]], most: int, width: int) -> Table:
    """The first `most` rows: a name, which is cut where the terminal's width is short, and numbers, which are not."""
    gap = 2
    columns = zip(heading, *rows, strict=True)
    numbers = [max(map(len, column)) for column in columns][1:]
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim")
    table.add_column(heading[0], no_wrap=True, max_width=max(1, width - sum(numbers) - gap * len(heading)))
    for name in heading[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:most]:
        table.add_row(*row)
    if len(rows) > most:
        table.add_row(f"and {len(rows) - most} more")
    return table

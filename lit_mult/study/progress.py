"""What a sweep shows while it runs: cells done, time left, and the loss of every cell under way."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PLAIN_EVERY_SECONDS = 15.0


class SweepProgress:
    """A live display on a terminal, a plain line now and then elsewhere."""

    def __init__(self, cells: int, done: int, cost: float, steps: int, console: Console | None = None) -> None:
        """`cost` is the estimated cost of the cells to come, in any unit; `done` cells are there already."""
        self.console = console or Console(stderr=True)
        self.cells, self.done, self.steps = cells, done, steps
        self.diverged = self.failed = 0
        self._cost, self._cost_done = cost, 0.0
        self._running: dict[str, tuple[float, int, float | None]] = {}
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

    def started(self, label: str, cost: float) -> None:
        self._running[label] = (cost, 0, None)

    def stepped(self, label: str, step: int, loss: float) -> None:
        self._running[label] = (self._running[label][0], step, loss)
        self._tick()

    def ended(self, label: str, *, diverged: bool = False, failed: bool = False, retry: bool = False) -> None:
        cost, _, _ = self._running.pop(label)
        if not retry:
            self._cost_done += cost
            self.done += 1
            self.diverged += diverged
            self.failed += failed
        self._tick()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(Text(line))

    def seconds_left(self) -> float | None:
        """Time to the end at the pace so far; None before there is a pace."""
        under_way = sum(cost * step / self.steps for cost, step, _ in self._running.values())
        spent = self._cost_done + under_way
        elapsed = time.monotonic() - self.start
        return elapsed * (self._cost - spent) / spent if spent > 0 else None

    def _headline(self) -> str:
        left = self.seconds_left()
        parts = [f"{self.done}/{self.cells} cells", f"{_clock(time.monotonic() - self.start)} elapsed"]
        if self.done < self.cells:
            parts.append(f"ETA {_clock(left)}" if left is not None else "ETA unknown yet")
        parts += [f"{self.diverged} diverged"] * bool(self.diverged) + [f"{self.failed} failed"] * bool(self.failed)
        return " · ".join(parts)

    def render(self) -> RenderableType:
        """The display as it stands: headline, bar, and a line for each cell under way."""
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(no_wrap=True)
        for label, (_, step, loss) in self._running.items():
            table.add_row(label, f"step {step}/{self.steps}", "" if loss is None else f"loss {loss:.3f}")
        display = Table.grid()  # not a Group: a bar does not end its line
        for part in (Text(self._headline()), ProgressBar(total=self.cells, completed=self.done, width=40), table):
            display.add_row(part)
        return display

    def _tick(self) -> None:
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_plain < _PLAIN_EVERY_SECONDS:
            return
        self._last_plain = now
        losses = [(label, step, loss) for label, (_, step, loss) in self._running.items() if loss is not None]
        running = ", ".join(f"{label} step {step} loss {loss:.3f}" for label, step, loss in losses)
        print(f"{self._headline()} · {running}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

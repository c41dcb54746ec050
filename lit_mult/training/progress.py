"""Progress on stderr: a live display on a terminal, a plain line from time to time elsewhere; that of one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lit_mult.training.history import History

_PLAIN_EVERY_SECONDS = 15.0


class Display:
    """What is under way, on a terminal; elsewhere (a file, a pipe, a notebook's log) a plain line every 15 s."""

    def __init__(
        self, render: Callable[[], RenderableType], line: Callable[[], str], console: Console | None = None
    ) -> None:
        """`render()` is shown on a terminal, `line()` elsewhere."""
        self.console = console or Console(stderr=True, highlight=False, force_jupyter=False)
        self._render, self._line = render, line
        self._live: Live | None = None
        self._last_plain = time.monotonic()

    def start(self) -> None:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Something has changed. A terminal is redrawn by itself."""
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_plain >= _PLAIN_EVERY_SECONDS:
            self._last_plain = now
            self.print(self._line())

    def print(self, line: str, style: str = "") -> None:
        """Print a permanent line, above what is shown."""
        self.console.print(Text(line, style), soft_wrap=True)


class RunProgress(Callback):
    """The progress of one run, or of the members of a stack together: steps, rate, time left, last losses."""

    def __init__(self, history: History, console: Console | None = None) -> None:
        """`history`: of the run; must come before this callback in the Trainer's list."""
        self.history, self.steps = history, history.config.steps
        self.display = Display(self.render, self.line, console)
        self.step = self._first_step = 0
        self._start = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.display.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = self._first_step = trainer.global_step  # of a resumed run, that of its checkpoint
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step = trainer.global_step
        if trainer.is_global_zero:
            self.display.tick()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.display.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.display.stop()

    def line(self) -> str:
        """`step 120/300 · 0:00:15 elapsed · 8.1 steps/s · ETA 0:00:22 · training loss 3.41 · validation loss 3.52`."""
        return " · ".join([self._headline(), *self._losses()])

    def render(self) -> RenderableType:
        """The same, with a bar."""
        display = bar_below(self._headline(), self.step, self.steps)
        display.add_row(" · ".join(self._losses()))
        return display

    def _headline(self) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"step {self.step:,}/{self.steps:,}", f"{clock(seconds)} elapsed"]
        if done := self.step - self._first_step:
            parts += [f"{rate(done / seconds)} steps/s", f"ETA {clock(seconds * (self.steps - self.step) / done)}"]
        return " · ".join(parts)

    def _losses(self) -> list[str]:
        losses = zip(("training", "validation"), self.history.last_losses(), strict=True)
        return [f"{of} loss {loss:.3f}" for of, loss in losses if loss is not None]


def bar_below(headline: str, completed: float, total: float) -> Table:
    """A headline and, below it, a bar; rows can be added."""
    display = Table.grid()  # not a Group: ProgressBar prints no newline
    display.add_row(Text(headline, "bold"))
    display.add_row(ProgressBar(total=total, completed=completed, width=40))
    return display


def clock(seconds: float) -> str:
    """A duration as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def rate(per_unit: float) -> str:
    """A rate with two digits or more: 0.52, 8.1, 1,204."""
    return f"{per_unit:,.0f}" if per_unit >= 10 else f"{per_unit:.2g}"

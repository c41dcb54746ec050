"""Contestants that take turns, each in a process of its own, so that a machine whose speed drifts treats all alike.

A contestant is a function that calls `Turns.step_starts` before every step; the call waits while it is another's turn.
One process computes at a time. Ratios are taken within a round, and their median over rounds is reported.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

# Imported once, in the process that the contestants are forked from, where they are forked.
_IMPORTS = ["torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "lit_mult.training.run", "rivals"]


class Over(Exception):  # noqa: N818  # nothing went wrong
    """There are no more turns."""


class Turns:
    """A contestant's side: how many steps its turn has, and the seconds that they took."""

    def __init__(self, pipe: Connection) -> None:
        self.seconds_a_step: float | None = None
        """Set in a turn by a contestant that times its steps itself."""
        self._pipe = pipe
        self._steps = self._left = 0
        self._start: float | None = None

    def step_starts(self) -> None:
        """Before every step: hand over when the turn has had its steps, and wait for the next turn.

        Raises:
            Over: there is none.
        """
        if self._left == 0:
            if self._start is not None:
                settle()
                took = (time.perf_counter() - self._start) / self._steps
                self._pipe.send(self.seconds_a_step or took)
                self.seconds_a_step = None
            self._steps = self._left = self._pipe.recv()
            if self._left == 0:
                raise Over
            self._start = time.perf_counter()
        self._left -= 1


@dataclass
class Timing:
    """What a contestant's steps took, in seconds."""

    first: float = 0.0
    """The first step of all: with torch.compile, that of the compilation."""
    steps: list[float] = field(default_factory=list)
    """A step, mean of a turn, by round."""

    @property
    def step(self) -> float:
        """A step, median over rounds."""
        return statistics.median(self.steps)


Contestant = Callable[[Turns], None]
"""Trains until `Over`; must be picklable (a function of a module, or a partial of one)."""


def take_turns(contestants: Mapping[str, Contestant], rounds: int, seconds: float) -> dict[str, Timing]:
    """Timings of all contestants over as many rounds of turns, each of about so many seconds (a step at least)."""
    # A process that has so much as asked for a GPU must not fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(_IMPORTS)  # of no effect otherwise
    timings, pipes, processes = {}, {}, []
    try:
        for name, contestant in contestants.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(contestant, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            timings[name] = Timing(first=_turn(name, pipes[name], 1))  # which waits: one sets up at a time
        steps = {name: max(1, round(seconds / _turn(name, pipe, 1))) for name, pipe in pipes.items()}
        for number in range(rounds + 1):  # the first to warm up
            order = list(pipes.items())
            for name, pipe in order if number % 2 else reversed(order):
                took = _turn(name, pipe, steps[name])
                if number:
                    timings[name].steps.append(took)
        for pipe in pipes.values():
            pipe.send(0)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return timings


def ratio(of: Timing, to: Timing) -> float:
    """Median over rounds of the ratio of two contestants' seconds a step."""
    return statistics.median(a / b for a, b in zip(of.steps, to.steps, strict=True))


def settle() -> None:
    """Wait for the device, if it computes on its own."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _turn(name: str, pipe: Connection, steps: int) -> float:
    """Seconds a step of a turn."""
    try:
        pipe.send(steps)
        answer: Any = pipe.recv()
    except (EOFError, ConnectionError):
        answer = "its process ended"
    if isinstance(answer, str):
        raise SystemExit(f"{name}: {answer}")
    return float(answer)


def _serve(contestant: Contestant, pipe: Connection) -> None:
    try:
        contestant(Turns(pipe))
    except Over:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())

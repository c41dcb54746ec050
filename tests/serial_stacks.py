"""A stand-in for the training of stacks, which trains the members one after the other and notes what it was given."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_mult.schema import RunRecord
from lit_mult.stacked.run import Member
from lit_mult.study.executors import local, ray
from lit_mult.training import run

MODULE = "lit_mult.stacked.run"


class SerialStacks:
    """Takes the place of the module: `run_stack` trains member by member, so that results are those of single runs."""

    def __init__(self) -> None:
        self.stacks: list[list[str]] = []
        """The cells of every stack that was run."""
        self.before: Callable[[list[str], int], None] = lambda cells, index: None
        """Called before every member."""

    def module(self) -> ModuleType:
        module = ModuleType(MODULE)
        module.Member, module.run_stack = Member, self.run_stack  # type: ignore[attr-defined]
        return module

    def run_stack(
        self,
        members: Sequence[Member],
        *,
        on_progress: Any = None,
        prune: Any = None,
        on_record: Any = None,
        should_stop: Any = None,
    ) -> list[RunRecord]:
        cells = [member.cell.cell for member in members if member.cell]
        self.stacks.append(cells)
        records = []
        for index, member in enumerate(members):
            self.before(cells, index)
            record = run.run(
                member.config,
                member.out,
                cell=member.cell,
                record_path=member.record_path,
                keep_checkpoint=member.keep_checkpoint,
                on_progress=on_progress and partial(on_progress, index),
                prune=prune and partial(prune, index),
                should_stop=should_stop,
            )
            records.append(record)
            on_record(index, record)
        return records


def serve_and_die_once(connection: Any, slot: Any) -> None:
    """A worker process with the stand-in, which the first stack of more than one kills at its third member."""

    def die(cells: list[str], index: int) -> None:
        marker = Path(os.environ["STACK_DIED"])
        if index == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    stacks = SerialStacks()
    stacks.before = die
    sys.modules[MODULE] = stacks.module()
    _SERVE(connection, slot)


_SERVE = local._serve  # before a test puts the other in its place


class SerialCells(ray._Cells):
    """A Ray actor with the stand-in, which leaves the size of every stack on file."""

    def __init__(self, folder: str, on_gpus: bool) -> None:
        stacks = SerialStacks()
        log = Path(os.environ["STACK_SIZES"])
        stacks.before = lambda cells, index: index or log.write_text(f"{log.read_text()}{len(cells)} ")  # type: ignore
        sys.modules[MODULE] = stacks.module()
        super().__init__(folder, on_gpus)

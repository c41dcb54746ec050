"""Made-up studies that add seeds: losses by hand, and the cells that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from record_data import make_record

from lit_mult.schema import RunRecord
from lit_mult.study.cells import StudyCells
from lit_mult.study.folder import StudyFolder
from lit_mult.study.queue import CellQueue
from lit_mult.study.spec import Cell, StudySpec
from lit_mult.study.storage import open_storage

Loss = Callable[[Cell], float | None]
Records = dict[str, RunRecord]


def curve(cell: Cell, best: float = -6) -> float:
    """A parabola in log2 lr."""
    return 3 + 0.1 * (math.log2(cell.config.optim.lr) - best) ** 2


def alternating(cell: Cell) -> float:
    """`curve`, with vectors 0.01 above muP on even seeds, and as much below on odd ones, at every rate."""
    sign = 1 if cell.config.seed % 2 == 0 else -1
    return curve(cell) + (sign * 0.01 if cell.point.arm == "vectors" else 0)


def record(cell: Cell, loss: Loss) -> RunRecord:
    return make_record(cell.config, loss(cell), cell=cell.info)


def known(spec: StudySpec, records: Records) -> dict[str, Cell]:
    """The cells that a reader of these records derives, by id."""
    cells = StudyCells(spec, StudyFolder(Path("nowhere")))
    cells.refresh(records)
    return {name: cell for point in cells.points for name, cell in point.cells.items()}


def rounds(spec: StudySpec, loss: Loss) -> Iterator[dict[str, Cell]]:
    """The cells of each round, the planned ones first, when all of them are run."""
    records = Records()
    while new := {name: cell for name, cell in known(spec, records).items() if name not in records}:
        yield new
        records |= {name: record(cell, loss) for name, cell in new.items()}


def first_round(spec: StudySpec, loss: Loss) -> dict[str, Cell]:
    """The cells of the round behind the planned ones."""
    _planned, first = islice(rounds(spec, loss), 2)
    return first


def queue(spec: StudySpec, folder: StudyFolder, name: str) -> CellQueue:
    """The queue of a sweep of this name."""
    return CellQueue(spec, folder, open_storage(folder.journal), "the folder", name, retries=3)

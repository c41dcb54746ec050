"""The slots of a sampled search: numbered files with the parameters of one cell each.

The sweep that creates the file has sampled the cell, and any sweep may run it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lit_mult import atomic
from lit_mult.errors import ConfigError, UserError
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import Cell, Point


class SampledCells:
    """The cells of a point that have been sampled so far."""

    def __init__(self, point: Point, folder: StudyFolder) -> None:
        self.point, self.folder = point, folder
        self.cells: dict[str, Cell] = {}
        self._taken: set[int] = set()

    @property
    def n_cells(self) -> int:
        return len(self.cells) + self.to_sample

    @property
    def to_sample(self) -> int:
        """Cells that remain to be sampled."""
        return max(0, self.point.n_cells - len(self.cells))

    @property
    def next_slot(self) -> int:
        """Number of the next slot to create."""
        return max(self._taken, default=-1) + 1

    def refresh(self, records: Mapping[str, RunRecord] | None = None) -> None:
        """Read the slots that other sweeps have created; a damaged one counts as taken, and holds no cell."""
        for path in self.folder.trials_folder.glob(f"{self.point.name}.*.json"):
            match = re.fullmatch(rf"{re.escape(self.point.name)}\.(\d+)\.json", path.name)
            if match and (number := int(match[1])) not in self._taken:
                self._taken.add(number)
                with suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
                    self._add(cell_of(self.point, json.loads(path.read_text())))

    def create(self, cell: Cell, number: int) -> bool:
        """Write the slot of a sampled cell; False when another sweep has taken this number.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.folder.trial(self.point.name, number)
        try:
            atomic.write_text(path, json.dumps(parameters_of(cell)), overwrite=False)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._taken.add(number)
        self._add(cell)
        return True

    def next_start(self) -> dict[str, Any]:
        """The next of the point's start trials that no cell has; empty when there is none."""
        sampled = [cell.nuisance.items() for cell in self.cells.values()]
        return next((trial for trial in self.point.start() if not any(trial.items() <= cell for cell in sampled)), {})

    def untried(self) -> list[dict[str, Any]]:
        """Parameters of all cells of the nuisance lists that no slot has."""
        combinations = itertools.product(self.point.spec.seeds, self.point.grid())
        cells = [self.point.cell(nuisance, seed) for seed, nuisance in combinations]
        return [parameters_of(cell) for cell in cells if cell.id not in self.cells]

    def _add(self, cell: Cell) -> None:
        self.cells[cell.id] = cell


def parameters_of(cell: Cell) -> dict[str, Any]:
    """The nuisance factors and the seed."""
    return {**cell.nuisance, "seed": cell.config.seed}


def cell_of(point: Point, parameters: Mapping[str, Any]) -> Cell:
    """The cell with these parameters. Raises: KeyError when one is missing; ConfigError when one is not allowed."""
    return point.cell({name: parameters[name] for name in point.nuisance}, parameters["seed"])

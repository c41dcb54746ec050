"""The cells of a study, as its folder's records and slots decide them: the same for whoever reads the folder."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping

from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import grid_values, next_rate, rates_between
from lit_mult.study.precision import further_cells, mean_losses
from lit_mult.study.slots import SampledCells, Trial
from lit_mult.study.spec import Point, StudySpec


class StudyCells:
    """The cells of all points of a study."""

    def __init__(self, spec: StudySpec, folder: StudyFolder) -> None:
        self.spec = spec
        points = spec.points()
        self.points = [GridCells(point) if point.is_grid else SampledCells(point, folder) for point in points]

    @property
    def n_cells(self) -> int:
        """All cells: those that remain to be sampled, and those that records have added, too."""
        return sum(cells.n_cells for cells in self.points)

    def refresh(self, records: Mapping[str, RunRecord]) -> None:
        """Take in the records so far (cell -> record), and the slots of other sweeps."""
        for cells in self.points:
            cells.refresh(records)
        if self.spec.precision is not None and all(cells.cells.keys() <= records.keys() for cells in self.points):
            self._add_seeds(records)

    def _add_seeds(self, records: Mapping[str, RunRecord]) -> None:
        grids = {cells.point.name: cells for cells in self.points if isinstance(cells, GridCells)}
        planned = {name: cell for cells in grids.values() for name, cell in cells.planned.items()}
        for cell in further_cells(self.spec, planned, records).values():
            grids[cell.point.name].cells[cell.id] = cell


class GridCells:
    """The cells of a grid: planned ones, those of rates added at its optimum, and of further seeds."""

    to_sample = startable = 0

    def __init__(self, point: Point) -> None:
        self.point = point
        planned = itertools.product(point.spec.seeds, point.grid())
        self.planned = {cell.id: cell for seed, nuisance in planned for cell in [point.cell(nuisance, seed)]}
        """Those of the planned seeds."""
        self.cells = dict(self.planned)
        self._judges = len(point.spec.judge_seeds)

    @property
    def n_cells(self) -> int:
        """All cells, those of seeds that are yet to judge, too."""
        return len(self.cells) + (self._judges if len(self.cells) == len(self.planned) else 0)

    @property
    def trials(self) -> dict[str, Trial]:
        return {name: Trial.of_cell(cell) for name, cell in self.cells.items()}

    def refresh(self, records: Mapping[str, RunRecord]) -> None:
        """When all planned seeds are done, add the rates that `_rates_to_add` asks for; then, the seeds that judge."""
        self._add_rates(records)
        judges = self.point.spec.judge_seeds
        if judges and self.planned.keys() <= records.keys():
            mean, best = min(mean_losses(self.planned.values(), records), key=lambda rate: rate[0])
            if not math.isfinite(mean):  # each value diverged on some seed: nothing to judge
                self._judges, judges = 0, []
            for seed in judges:
                cell = self.point.cell(best, seed, judged=True)
                self.cells[cell.id] = cell

    def _add_rates(self, records: Mapping[str, RunRecord]) -> None:
        point, grid = self.point, self.point.nuisance.get("optim.lr")
        if grid is None or not (point.spec.follow_optimum or point.spec.refine_optimum):
            return
        rates = sorted(grid_values(grid))
        while self.planned.keys() <= records.keys():
            if not (added := self._rates_to_add(rates, self._losses_by_rate(records))):
                return
            for rate, nuisance, seed in itertools.product(added, point.grid(), point.spec.seeds):
                if nuisance["optim.lr"] == rates[0]:
                    cell = point.cell({**nuisance, "optim.lr": rate}, seed, added=True)
                    self.planned[cell.id] = self.cells[cell.id] = cell

    def _rates_to_add(self, planned: list[float], losses: Mapping[float, float]) -> list[float]:
        """One beyond the edge at which the optimum lies; else those midway between it and its neighbours."""
        spec = self.point.spec
        beyond = [rate for rate in losses if not planned[0] <= rate <= planned[-1]]
        if len(beyond) < spec.follow_optimum and (rate := next_rate([*planned, *beyond], losses)) is not None:
            return [rate]
        if not spec.refine_optimum:
            return []
        closest = min(high / low for low, high in itertools.pairwise(planned))
        return rates_between(losses, closest ** (1 / 2**spec.refine_optimum))

    def _losses_by_rate(self, records: Mapping[str, RunRecord]) -> dict[float, float]:
        """Learning rate -> mean over seeds of the best loss; infinite when all runs of a seed diverged."""
        losses: dict[float, dict[int, float]] = defaultdict(lambda: defaultdict(lambda: math.inf))
        for cell in self.planned.values():
            by_seed, loss = losses[float(cell.nuisance["optim.lr"])], records[cell.id].final_loss
            by_seed[cell.config.seed] = min(by_seed[cell.config.seed], math.inf if loss is None else loss)
        return {rate: sum(by_seed.values()) / len(by_seed) for rate, by_seed in losses.items()}

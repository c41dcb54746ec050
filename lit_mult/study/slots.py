"""The trials of a sampled search and the cells that run them.

A trial's parameters are a numbered file, its slot. The sweep that creates the file has sampled the trial, and any sweep
may run its cells.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

from lit_mult import atomic
from lit_mult.errors import ConfigError, UserError
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import Cell, Point


@dataclass(frozen=True)
class Trial:
    """Values of the nuisance factors, and the cells that run them: one for each of its seeds."""

    parameters: dict[str, Any]
    """The nuisance factors; the seed, too, where each trial has one of its own."""
    cells: tuple[Cell, ...]
    number: int = 0
    """Of its slot."""

    @classmethod
    def of_cell(cls, cell: Cell) -> Self:
        """The trial of a single cell."""
        return cls({**cell.nuisance, "seed": cell.config.seed}, (cell,))

    @classmethod
    def sampled(cls, point: Point, values: Mapping[str, Any], number: int = 0) -> Self:
        """The trial of a sampled search with these values of the nuisance factors and, if it has its own, the seed.

        Raises:
            KeyError: a value is missing.
            ConfigError: one is not allowed.
        """
        nuisance = {name: values[name] for name in point.nuisance}
        seeds = point.spec.trial_seeds or [values["seed"]]
        own = {} if point.spec.trial_seeds else {"seed": values["seed"]}
        return cls(nuisance | own, tuple(point.cell(nuisance, seed) for seed in seeds), number)

    @property
    def id(self) -> str:
        """The id of its first cell."""
        return self.cells[0].id

    @property
    def nuisance(self) -> dict[str, Any]:
        return self.cells[0].nuisance

    def runs(self, records: Mapping[str, RunRecord]) -> list[RunRecord]:
        """The records of its cells once it has ended, else none. A trial whose first run was pruned ends with it."""
        first = records.get(self.id)
        if first is not None and first.status == "pruned":
            return [first]
        found = [records[cell.id] for cell in self.cells if cell.id in records]
        return found if len(found) == len(self.cells) else []


class SampledCells:
    """The cells of a sampled search: those of its trials so far, and those that run the best of them again."""

    def __init__(self, point: Point, folder: StudyFolder) -> None:
        self.point, self.folder = point, folder
        self.trials: dict[str, Trial] = {}
        self.cells: dict[str, Cell] = {}
        """Cells that may run now, or have run."""
        self._later = 0
        """Cells that depend on others which have not ended."""
        self._taken: set[int] = set()
        self._records: Mapping[str, RunRecord] = {}
        self._arrange()

    @property
    def n_cells(self) -> int:
        """All cells, as far as it is known: those that remain to be sampled and depend on others, too."""
        return len(self.cells) + self._later + self.to_sample * self.point.spec.budget.seeds_per_trial

    @property
    def to_sample(self) -> int:
        """Trials that remain to be sampled."""
        return max(0, (self.point.spec.budget.trials or 0) - len(self.trials))

    @property
    def startable(self) -> int:
        """Cells that may run as soon as they are sampled."""
        spec = self.point.spec
        return self.to_sample * (1 if spec.pruner else spec.budget.seeds_per_trial)

    @property
    def next_slot(self) -> int:
        """Number of the next slot to create."""
        return max(self._taken, default=-1) + 1

    def refresh(self, records: Mapping[str, RunRecord]) -> None:
        """Take in the records so far (cell -> record), and the slots of other sweeps."""
        self._records = records
        self.read_slots()
        self._arrange()

    def read_slots(self) -> None:
        """Read the slots that other sweeps have created; a damaged one counts as taken, and holds no trial."""
        for path in self.folder.trials_folder.glob(f"{self.point.name}.*.json"):
            match = re.fullmatch(rf"{re.escape(self.point.name)}\.(\d+)\.json", path.name)
            if match and (number := int(match[1])) not in self._taken:
                self._taken.add(number)
                with suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
                    self._add(Trial.sampled(self.point, json.loads(path.read_text()), number))
        self._arrange()

    def create(self, parameters: Mapping[str, Any], number: int) -> bool:
        """Write the slot of a sampled trial; False when another sweep has taken this number.

        Raises:
            UserError: the folder cannot be written.
        """
        path, trial = self.folder.trial(self.point.name, number), Trial.sampled(self.point, parameters, number)
        try:
            atomic.write_text(path, json.dumps(trial.parameters), overwrite=False)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._taken.add(number)
        self._add(trial)
        self._arrange()
        return True

    def next_start(self) -> dict[str, Any]:
        """The next of the point's start trials that is in no slot; empty when there is none."""
        sampled = [trial.nuisance.items() for trial in self.trials.values()]
        return next((start for start in self.point.start() if not any(start.items() <= trial for trial in sampled)), {})

    def untried(self) -> list[dict[str, Any]]:
        """Parameters of all trials that the nuisance lists make and no slot has."""
        spec = self.point.spec
        seeds: list[dict[str, Any]] = [{}] if spec.trial_seeds else [{"seed": seed} for seed in spec.seeds]
        every = ({**nuisance, **seed} for seed, nuisance in itertools.product(seeds, self.point.grid()))
        return [values for values in every if Trial.sampled(self.point, values).id not in self.trials]

    def _add(self, trial: Trial) -> None:
        self.trials.setdefault(trial.id, trial)

    def _arrange(self) -> None:
        """Tell the cells that may run from those that depend on others."""
        spec = self.point.spec
        trials = sorted(self.trials.values(), key=lambda trial: trial.number)
        runs = {trial.id: trial.runs(self._records) for trial in trials}
        self.cells, self._later = {}, 0
        for trial in trials:
            cells = trial.cells
            if spec.pruner and trial.id not in self._records:  # it may be pruned, and then the others are not run
                self._later += len(cells) - 1
                cells = cells[:1]
            elif any(run.status == "pruned" for run in runs[trial.id]):
                cells = cells[:1]
            self.cells |= {cell.id: cell for cell in cells}
        if spec.rerank is None:
            return
        if self.to_sample or not all(runs.values()):
            self._later += spec.rerank.best * len(spec.rerank.seeds)
            return
        for trial, seed in itertools.product(self._best(runs, spec.rerank.best), spec.rerank.seeds):
            cell = self.point.cell(trial.nuisance, seed)
            self.cells[cell.id] = cell

    def _best(self, runs: Mapping[str, Sequence[RunRecord]], number: int) -> list[Trial]:
        """So many trials of lowest mean loss, and further ones whose multipliers are untuned.

        Trials with a pruned or diverged run are left out; of equal means, the earlier one is better.
        """
        means = {trial.id: mean for trial in self.trials.values() if (mean := mean_loss(runs[trial.id])) is not None}
        ranked = sorted((self.trials[name] for name in means), key=lambda trial: (means[trial.id], trial.number))
        untuned = (trial for trial in ranked[number:] if self.point.is_untuned(trial.nuisance))
        return [*ranked[:number], *untuned]


def mean_loss(runs: Iterable[RunRecord]) -> float | None:
    """Mean final loss, nats per token; None when a run was pruned or diverged."""
    losses = [run.final_loss for run in runs]
    finite = [loss for loss in losses if loss is not None]
    return fmean(finite) if finite and len(finite) == len(losses) else None

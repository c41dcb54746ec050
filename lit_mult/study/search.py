"""The cells of one point of a study, and the Optuna study that mirrors them.

Records and leases define which cells are done or running; Optuna samples and prunes, and serves dashboards. The cells
of a grid are known in advance. A sampled search has numbered slots: files with the parameters of one cell each. The
sweep that creates the file has sampled the cell, and any sweep may run it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from lit_mult import atomic
from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, UserError
from lit_mult.schema import RunRecord
from lit_mult.stacked.key import always_stackable, stack_key
from lit_mult.study.fields import Pruner
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import Distribution, Grid, grid_values, next_rate
from lit_mult.study.spec import Cell, Point, StudySpec


@dataclass(frozen=True)
class Ticket:
    """A cell to run now and, in a sampled search, its running trial."""

    cell: Cell
    search: PointSearch
    trial: optuna.Trial | None = None
    reported: set[int] = field(default_factory=set)

    def should_prune(self, curve: list[tuple[int, float]]) -> bool:
        """Report the validation losses so far to Optuna; True if the pruner would stop the cell."""
        assert self.trial is not None
        for step, loss in curve:  # a resumed attempt has the losses of earlier attempts too
            if step not in self.reported:
                self.trial.report(loss, step)
                self.reported.add(step)
        return self.trial.should_prune()


class PointSearch:
    """The cells of a point: all of a grid, or those sampled so far."""

    def __init__(
        self, point: Point, folder: StudyFolder, storage: BaseStorage, pruner: BasePruner, identity: str, sweep: str
    ) -> None:
        """Open or create the Optuna study. Call while the folder is locked.

        Raises:
            UserError: the storage belongs to another results folder.
        """
        self.point, self.folder, self.sweep = point, folder, sweep
        config = point.first_cell().config
        self.cost = cost(config)
        self.stack_key = stack_key(config) if always_stackable(point.nuisance) else None
        """None when its cells cannot be stacked."""
        self.cells: dict[str, Cell] = {}
        self._slots: set[int] = set()
        if point.is_grid:
            for seed, nuisance in itertools.product(point.spec.seeds, point.grid()):
                self._add(point.cell(nuisance, seed))
        name = f"{point.spec.name}/{point.name}"
        self.study = optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)
        attributes = self.study.user_attrs
        if "folder" not in attributes and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("folder", identity)
        elif attributes.get("folder", identity) != identity:
            raise UserError(f"--storage: holds {name} of another results folder; name another, or that --out")

    @property
    def n_cells(self) -> int:
        """All cells: also those that remain to be sampled, or were added to a grid."""
        return max(self.point.n_cells, len(self.cells))

    def refresh(self, records: Mapping[str, RunRecord]) -> None:
        """Read the cells that other sweeps have sampled, or extend a grid whose optimum lies at an edge."""
        if self.point.is_grid:
            self._follow_optimum(records)
        else:
            self._read_slots()

    def ticket(self, cell: Cell) -> Ticket:
        trial = None if self.point.is_grid else self._ask(_parameters(cell), slot=0)[0]
        return Ticket(cell, self, trial)

    def sample(self) -> Ticket | None:
        """Sample a new cell; None when the search has all of its cells.

        Call while the folder is locked. Where the lock has no effect, exclusive creation of the slot file decides.
        """
        self._read_slots()
        while len(self.cells) < self.n_cells:
            slot = max(self._slots, default=-1) + 1
            fixed = self._next_start() | {"seed": self.point.spec.seeds[slot % len(self.point.spec.seeds)]}
            for number in itertools.count(slot, self.point.n_cells):
                trial, cell = self._ask(fixed, number)
                if cell.id not in self.cells:
                    break
                self.close(trial)
                if self.point.n_possible is not None:  # over lists, a sampler might repeat itself forever
                    fixed = random.Random(number).choice(self._untried())
            if self._create_slot(cell, slot):
                return Ticket(cell, self, trial)
            self.close(trial)
            self._read_slots()
        return None

    def adopt(self, records: Iterable[RunRecord], attempted: Iterable[str]) -> None:
        """Give slots to the finished and interrupted cells that earlier versions of this package sampled."""
        if self.point.is_grid:
            return
        sampled = [self.point.cell(record.cell.nuisance, record.seed) for record in records if record.cell]
        of_the_point = {cell for cell in attempted if cell.startswith(f"{self.point.name}-s")}
        if interrupted := of_the_point - self.cells.keys() - {cell.id for cell in sampled}:
            for trial in self.study.get_trials(deepcopy=False):
                parameters = {**trial.user_attrs.get("enqueued", {}), **trial.params}
                if parameters.keys() == distributions(self.point).keys():
                    sampled += [cell for cell in [_cell(self.point, parameters)] if cell.id in interrupted]
        for cell in sampled:
            if cell.id not in self.cells and len(self.cells) < self.n_cells:
                self._create_slot(cell, max(self._slots, default=-1) + 1)

    def publish(self, records: Mapping[str, RunRecord]) -> None:
        """Add missing finished cells to Optuna, and close the trials of dead sweeps. Call while locked."""
        known, running = set(), {path.stem for path in self.folder.running_sweeps()} | {self.sweep}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING:  # enqueued by an earlier version: `ask` takes it
                self.close(self.study.ask())
            elif trial.state == TrialState.RUNNING and trial.user_attrs.get("sweep") not in running:
                self.close(trial.number)
            elif trial.state != TrialState.FAIL:
                known.add(trial.user_attrs.get("cell"))
        for cell in self.cells.values():
            if (record := records.get(cell.id)) is not None and cell.id not in known:
                state = _state(record)
                ended = optuna.trial.create_trial(
                    state=state,
                    value=record.best_loss if state == TrialState.PRUNED else _loss(record),
                    params=_parameters(cell),
                    distributions=distributions(self.point),
                    user_attrs={"cell": cell.id},
                )
                self.study.add_trial(ended)

    def close(self, trial: optuna.Trial | int, record: RunRecord | None = None) -> None:
        """End a running trial: with its record or, when its cell has none, as failed."""
        state = _state(record) if record else TrialState.FAIL
        value = _loss(record) if record and state == TrialState.COMPLETE else None
        with suppress(UpdateFinishedTrialError, ValueError):  # closed by another sweep after this lease expired
            self.study.tell(trial, value, state=state)

    def _add(self, cell: Cell) -> None:
        self.cells[cell.id] = cell

    def _ask(self, fixed: Mapping[str, Any], slot: int) -> tuple[optuna.Trial, Cell]:
        """A new running trial with some parameters fixed and the others sampled."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.sampler = PartialFixedSampler(dict(fixed), make_sampler(self.point.spec, slot))
        trial = self.study.ask()
        trial.set_user_attr("sweep", self.sweep)
        for name, distribution in distributions(self.point).items():
            if isinstance(distribution, FloatDistribution):
                trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
            elif isinstance(distribution, CategoricalDistribution):
                trial.suggest_categorical(name, distribution.choices)
        cell = _cell(self.point, trial.params)
        trial.set_user_attr("cell", cell.id)
        return trial, cell

    def _next_start(self) -> dict[str, Any]:
        """The next of the point's start trials that no cell has; empty when there is none."""
        sampled = [cell.nuisance.items() for cell in self.cells.values()]
        return next((trial for trial in self.point.start() if not any(trial.items() <= cell for cell in sampled)), {})

    def _untried(self) -> list[dict[str, Any]]:
        """Parameters of all cells of the nuisance lists that no slot has."""
        combinations = itertools.product(self.point.spec.seeds, self.point.grid())
        cells = [self.point.cell(nuisance, seed) for seed, nuisance in combinations]
        return [_parameters(cell) for cell in cells if cell.id not in self.cells]

    def _read_slots(self) -> None:
        for path in self.folder.trials_folder.glob(f"{self.point.name}.*.json"):
            match = re.fullmatch(rf"{re.escape(self.point.name)}\.(\d+)\.json", path.name)
            if match and (number := int(match[1])) not in self._slots:
                self._slots.add(number)
                try:
                    self._add(_cell(self.point, json.loads(path.read_text())))
                except (OSError, ValueError, KeyError, TypeError, ConfigError):
                    path.replace(path.with_name(f"{path.name}.damaged"))

    def _create_slot(self, cell: Cell, number: int) -> bool:
        """Record a sampled cell; False when another sweep has taken this slot."""
        path = self.folder.trial(self.point.name, number)
        try:
            atomic.write_text(path, json.dumps(_parameters(cell)), overwrite=False)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._slots.add(number)
        self._add(cell)
        return True

    def _follow_optimum(self, records: Mapping[str, RunRecord]) -> None:
        """While all cells of a grid are done and its optimum lies at an edge, add a learning rate there."""
        point, grid = self.point, self.point.nuisance.get("optim.lr")
        if not point.spec.follow_optimum or grid is None:
            return
        planned = grid_values(grid)
        while self.cells.keys() <= records.keys():
            losses = self._losses_by_rate(records)
            rate = next_rate(list(losses), losses)
            if rate is None or len(losses) >= len(planned) + point.spec.follow_optimum:
                return
            for nuisance, seed in itertools.product(point.grid(), point.spec.seeds):
                if nuisance["optim.lr"] == planned[0]:
                    self._add(point.cell({**nuisance, "optim.lr": rate}, seed, added=True))

    def _losses_by_rate(self, records: Mapping[str, RunRecord]) -> dict[float, float]:
        """Learning rate -> mean over seeds of the best loss; infinite when all runs of a seed diverged."""
        losses: dict[float, dict[int, float]] = defaultdict(lambda: defaultdict(lambda: math.inf))
        for cell in self.cells.values():
            by_seed, loss = losses[float(cell.nuisance["optim.lr"])], records[cell.id].final_loss
            by_seed[cell.config.seed] = min(by_seed[cell.config.seed], math.inf if loss is None else loss)
        return {rate: sum(by_seed.values()) / len(by_seed) for rate, by_seed in losses.items()}


def make_pruner(pruner: Pruner | None) -> BasePruner:
    """The Optuna pruner of a study. Raises: ConfigError when it does not take these options."""
    if pruner is None:
        return optuna.pruners.NopPruner()
    name = pruner.name.title().replace("_", "") + "Pruner"
    try:
        made: BasePruner = getattr(optuna.pruners, name)(**pruner.options)
    except (TypeError, ValueError) as error:
        raise ConfigError("pruner.options", pruner.options, " ".join(str(error).split())) from None
    return made


def make_sampler(spec: StudySpec, slot: int) -> BaseSampler:
    """The sampler for one slot.

    Its seed is the same at every point, so that all arms get the same values until TPE models results. It differs
    between slots, or two sweeps, and a sweep before and after a restart, would sample the same values.
    """
    seed = spec.seeds[0] + 1_000_003 * slot
    return TPESampler(seed=seed) if spec.sampler == "tpe" else RandomSampler(seed=seed)


def distributions(point: Point) -> dict[str, BaseDistribution]:
    """Parameters of a point's trials: the nuisance factors and the seed."""
    by_name = {name: _distribution(grid, point) for name, grid in point.nuisance.items()}
    if point.spec.follow_optimum and isinstance(planned := by_name.get("optim.lr"), FloatDistribution):
        rates = sorted(grid_values(point.nuisance["optim.lr"]))
        growth = (rates[1] / rates[0]) ** point.spec.follow_optimum
        by_name["optim.lr"] = FloatDistribution(planned.low / growth, planned.high * growth, log=True)
    return by_name | {"seed": CategoricalDistribution(point.spec.seeds)}


def _distribution(grid: Grid, point: Point) -> BaseDistribution:
    if isinstance(grid, Distribution):
        return FloatDistribution(grid.low, grid.high, log=grid.log)
    values = grid_values(grid)
    if point.is_grid and all(isinstance(value, float) for value in values):
        # A range gives Optuna's plots a numeric axis. Nothing is sampled from it.
        return FloatDistribution(min(values), max(values), log=min(values) > 0)
    return CategoricalDistribution(values)


def cost(config: RunConfig) -> float:
    """Rough relative time of a run: multiply-adds, plus a term for operations that scale less with width."""
    model = config.model
    matrices = model.n_layers * model.d_model * (4 * model.d_model + 3 * model.d_ff)
    elementwise = model.n_layers * 2000 * model.d_model
    return config.train.steps * config.train.batch_size * config.data.seq_len * float(matrices + elementwise)


def _state(record: RunRecord) -> TrialState:
    return TrialState.PRUNED if record.status == "pruned" else TrialState.COMPLETE


def _loss(record: RunRecord) -> float:
    """Value of a trial: a diverged run counts as the loss at initialization (arXiv:2309.14322 sec. 2.2)."""
    losses = [loss for loss in (record.final_loss, record.initial_loss) if loss is not None]
    return min(losses, default=math.inf)


def _parameters(cell: Cell) -> dict[str, Any]:
    return {**cell.nuisance, "seed": cell.config.seed}


def _cell(point: Point, parameters: Mapping[str, Any]) -> Cell:
    return point.cell({name: parameters[name] for name in point.nuisance}, parameters["seed"])

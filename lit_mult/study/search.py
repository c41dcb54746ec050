"""The search at one point of a study, and the Optuna study that mirrors it.

Records, slots and leases define which cells there are and which are done or running; Optuna samples and prunes, and
serves dashboards.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
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

from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, UserError
from lit_mult.schema import RunRecord
from lit_mult.stacked.key import always_stackable, stack_key
from lit_mult.study.cells import GridCells
from lit_mult.study.fields import Pruner
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import Distribution, Grid, grid_values
from lit_mult.study.slots import SampledCells, cell_of, parameters_of
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
    """The cells of a point, and their Optuna trials."""

    def __init__(
        self,
        known: GridCells | SampledCells,
        folder: StudyFolder,
        storage: BaseStorage,
        pruner: BasePruner,
        identity: str,
        sweep: str,
    ) -> None:
        """Open or create the Optuna study. Call while the folder is locked.

        Raises:
            UserError: the storage belongs to another results folder.
        """
        self.known, self.point, self.folder, self.sweep = known, known.point, folder, sweep
        point = self.point
        config = point.first_cell().config
        self.cost = cost(config)
        self.stack_key = stack_key(config) if always_stackable(point.nuisance) else None
        """None when its cells cannot be stacked."""
        name = f"{point.spec.name}/{point.name}"
        self.study = optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)
        attributes = self.study.user_attrs
        if "folder" not in attributes and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("folder", identity)
        elif attributes.get("folder", identity) != identity:
            raise UserError(f"--storage: holds {name} of another results folder; name another, or that --out")

    @property
    def cells(self) -> Mapping[str, Cell]:
        """The cells that are known so far."""
        return self.known.cells

    def ticket(self, cell: Cell) -> Ticket:
        trial = None if self.point.is_grid else self._ask(parameters_of(cell), slot=0)[0]
        return Ticket(cell, self, trial)

    def sample(self) -> Ticket | None:
        """Sample a new cell; None when the search has all of its cells.

        Call while the folder is locked. Where the lock has no effect, exclusive creation of the slot file decides.
        """
        known, spec = self.known, self.point.spec
        if isinstance(known, GridCells):
            return None
        known.refresh()
        while known.to_sample:
            slot = known.next_slot
            fixed = known.next_start() | {"seed": spec.seeds[slot % len(spec.seeds)]}
            for number in itertools.count(slot, self.point.n_cells):
                trial, cell = self._ask(fixed, number)
                if cell.id not in self.cells:
                    break
                self.close(trial)
                if self.point.n_possible is not None:  # over lists, a sampler might repeat itself forever
                    fixed = random.Random(number).choice(known.untried())
            if known.create(cell, slot):
                return Ticket(cell, self, trial)
            self.close(trial)
            known.refresh()
        return None

    def adopt(self, records: Iterable[RunRecord], attempted: Iterable[str]) -> None:
        """Give slots to the finished and interrupted cells that earlier versions of this package sampled."""
        known = self.known
        if isinstance(known, GridCells):
            return
        sampled = [self.point.cell(record.cell.nuisance, record.seed) for record in records if record.cell]
        of_the_point = {cell for cell in attempted if cell.startswith(f"{self.point.name}-s")}
        if interrupted := of_the_point - self.cells.keys() - {cell.id for cell in sampled}:
            for trial in self.study.get_trials(deepcopy=False):
                parameters = {**trial.user_attrs.get("enqueued", {}), **trial.params}
                if parameters.keys() == distributions(self.point).keys():
                    sampled += [cell for cell in [cell_of(self.point, parameters)] if cell.id in interrupted]
        for cell in sampled:
            if cell.id not in self.cells and known.to_sample:
                known.create(cell, known.next_slot)

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
                    params=parameters_of(cell),
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
        cell = cell_of(self.point, trial.params)
        trial.set_user_attr("cell", cell.id)
        return trial, cell


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
    return by_name | {"seed": CategoricalDistribution(point.spec.all_seeds)}


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

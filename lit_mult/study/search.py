"""The search at one point of a study, and the Optuna study that mirrors it.

Records, slots and leases define which cells there are and which are done or running; Optuna samples and prunes, and
serves dashboards.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
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
from lit_mult.study.slots import SampledCells, Trial
from lit_mult.study.spec import Cell, Point, StudySpec


@dataclass(frozen=True)
class Ticket:
    """A cell to run now and, if it is the first of a sampled trial, that running trial."""

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
        self._running: dict[str, optuna.Trial] = {}
        """Trial -> its running trial in Optuna, of the trials that this sweep has begun."""
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
        trial = None if self.point.is_grid else self.known.trials.get(cell.id)
        if trial is None:  # a further seed of a trial, or nothing to learn from
            return Ticket(cell, self)
        self._running[trial.id], _ = self._ask(trial.parameters, slot=0)
        return Ticket(cell, self, self._running[trial.id])

    def sample(self) -> Ticket | None:
        """Sample a new trial, and take its first cell; None when the search has all of its trials.

        Call while the folder is locked. Where the lock has no effect, exclusive creation of the slot file decides.
        """
        known, spec = self.known, self.point.spec
        if isinstance(known, GridCells):
            return None
        known.read_slots()
        while known.to_sample:
            slot = known.next_slot
            own = {} if spec.trial_seeds else {"seed": spec.seeds[slot % len(spec.seeds)]}
            fixed = known.next_start() | own
            for number in itertools.count(slot, spec.budget.trials or 1):
                running, trial = self._ask(fixed, number)
                if trial.id not in known.trials:
                    break
                self._tell(running)
                if self.point.n_possible is not None:  # over lists, a sampler might repeat itself forever
                    fixed = random.Random(number).choice(known.untried())
            if known.create(trial.parameters, slot):
                self._running[trial.id] = running
                return Ticket(trial.cells[0], self, running)
            self._tell(running)
            known.read_slots()
        return None

    def adopt(self, records: Iterable[RunRecord], attempted: Iterable[str]) -> None:
        """Give slots to the finished and interrupted trials that earlier versions of this package sampled."""
        known, rerank = self.known, self.point.spec.rerank
        if isinstance(known, GridCells):
            return
        fresh = rerank.seeds if rerank else []
        found = [record for record in records if record.cell and record.seed not in fresh]
        sampled = [{**record.cell.nuisance, "seed": record.seed} for record in found if record.cell]
        trials = [Trial.sampled(self.point, values) for values in sampled]
        of_the_point = {cell for cell in attempted if cell.startswith(f"{self.point.name}-s")}
        if interrupted := of_the_point - self.cells.keys() - {cell.id for trial in trials for cell in trial.cells}:
            for mirrored in self.study.get_trials(deepcopy=False):
                parameters = {**mirrored.user_attrs.get("enqueued", {}), **mirrored.params}
                if parameters.keys() == distributions(self.point).keys():
                    trial = Trial.sampled(self.point, parameters)
                    trials += [trial] if any(cell.id in interrupted for cell in trial.cells) else []
        for trial in trials:
            if trial.id not in known.trials and known.to_sample:
                known.create(trial.parameters, known.next_slot)

    def publish(self, records: Mapping[str, RunRecord]) -> None:
        """Tell Optuna of the trials that have ended, and close those of dead sweeps. Call while locked."""
        sweeps = {path.stem for path in self.folder.running_sweeps()} | {self.sweep}
        ended, running = set[str | None](), set[str | None]()
        for mirrored in self.study.get_trials(deepcopy=False):
            if mirrored.state == TrialState.WAITING:  # enqueued by an earlier version: `ask` takes it
                self._tell(self.study.ask())
            elif mirrored.state == TrialState.RUNNING and mirrored.user_attrs.get("sweep") not in sweeps:
                self._tell(mirrored.number)
            elif mirrored.state != TrialState.FAIL:
                (running if mirrored.state == TrialState.RUNNING else ended).add(mirrored.user_attrs.get("cell"))
        for trial in self.known.trials.values():
            if not (runs := trial.runs(records)):
                continue
            open_here = self._running.pop(trial.id, None)
            if open_here is not None and trial.id in ended | running:  # ended: by another sweep that ran it, too
                self._tell(open_here, [] if trial.id in ended else runs)
            elif trial.id not in ended | running:
                state = _state(runs)
                mirror = optuna.trial.create_trial(
                    state=state,
                    value=runs[0].best_loss if state == TrialState.PRUNED else _loss(runs),
                    params=trial.parameters,
                    distributions=distributions(self.point),
                    user_attrs={"cell": trial.id},
                )
                self.study.add_trial(mirror)

    def release(self, ticket: Ticket) -> None:
        """A cell ended without a record: close its trial. It has a new one in Optuna when it is taken again."""
        if ticket.trial is not None and self._running.get(ticket.cell.id) is ticket.trial:
            self._tell(self._running.pop(ticket.cell.id))

    def close(self) -> None:
        """Close the trials of this sweep that have not ended."""
        while self._running:
            self._tell(self._running.popitem()[1])

    def _tell(self, running: optuna.Trial | int, runs: Sequence[RunRecord] = ()) -> None:
        """End a running trial: with its runs or, when it has none, as failed."""
        state = _state(runs) if runs else TrialState.FAIL
        value = _loss(runs) if state == TrialState.COMPLETE else None
        with suppress(UpdateFinishedTrialError, ValueError):  # closed by another sweep after this lease expired
            self.study.tell(running, value, state=state)

    def _ask(self, fixed: Mapping[str, Any], slot: int) -> tuple[optuna.Trial, Trial]:
        """A new running trial with some parameters fixed and the others sampled."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.sampler = PartialFixedSampler(dict(fixed), make_sampler(self.point.spec, slot))
        running = self.study.ask()
        running.set_user_attr("sweep", self.sweep)
        for name, distribution in distributions(self.point).items():
            if isinstance(distribution, FloatDistribution):
                running.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
            elif isinstance(distribution, CategoricalDistribution):
                running.suggest_categorical(name, distribution.choices)
        trial = Trial.sampled(self.point, running.params)
        running.set_user_attr("cell", trial.id)
        return running, trial


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


_ROUNDING = 1 + 1e-9  # of the rates that are added one step at a time


def distributions(point: Point) -> dict[str, BaseDistribution]:
    """Parameters of a point's trials: the nuisance factors and, unless a trial runs on several, the seed."""
    by_name = {name: _distribution(grid, point) for name, grid in point.nuisance.items()}
    if point.spec.follow_optimum and isinstance(planned := by_name.get("optim.lr"), FloatDistribution):
        rates = sorted(grid_values(point.nuisance["optim.lr"]))
        growth = (rates[1] / rates[0]) ** point.spec.follow_optimum * _ROUNDING
        by_name["optim.lr"] = FloatDistribution(planned.low / growth, planned.high * growth, log=True)
    if point.spec.trial_seeds and not point.is_grid:
        return by_name
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


def _state(runs: Sequence[RunRecord]) -> TrialState:
    return TrialState.PRUNED if runs[0].status == "pruned" else TrialState.COMPLETE


def _loss(runs: Iterable[RunRecord]) -> float:
    """Value of a trial: the mean over its seeds of the final loss, or of the initial one where that is lower.

    If a run diverged, that of the initial loss (arXiv:2309.14322 sec. 2.2): a trial is as good as its worst seed.
    """
    diverged = any(run.status == "diverged" for run in runs)
    losses = ((run.initial_loss,) if diverged else (run.final_loss, run.initial_loss) for run in runs)
    return fmean(min((loss for loss in some if loss is not None), default=math.inf) for some in losses)

"""The cells of a study as Optuna trials: what is waiting, what to run next, what came of it.

Any number of sweeps may share the storage. Records are the truth and leases say who lives; the trials follow. So
whatever a killed process left undone in the storage can be set right by whoever comes next, and a cell that two trials
stand for is still run once.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.schema import RunRecord
from lit_mult.stacked.key import always_stackable, stack_key
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import grid_values, next_rate
from lit_mult.study.lease import LEASE_SECONDS, is_alive
from lit_mult.study.sampling import distributions, make_pruner, make_sampler, suggest
from lit_mult.study.spec import Cell, Point, StudySpec

# What a trial was enqueued with, the sweep that took it, its cell, and whether the cell is outside the planned grid:
# user attributes, which can be read in every state of a trial.
_ENQUEUED, _SWEEP, _CELL, _ADDED, _FOLDER = "enqueued", "sweep", "cell", "added", "folder"
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class Counts:
    """Cells of a study by where they stand, and the estimated cost of those to come (in the unit of `cost`)."""

    cells: int = 0
    """All, those added to the plan included."""
    waiting: int = 0
    elsewhere: int = 0
    """Under way in other sweeps."""
    failed: int = 0
    cost_waiting: float = 0.0
    cost_elsewhere: float = 0.0


@dataclass
class _Search:
    """The Optuna study of one point."""

    point: Point
    study: optuna.Study
    cost: float
    key: str | None
    """The `stack_key` of all of its cells; None when they are run by themselves."""
    waiting: int = 0
    elsewhere: int = 0
    cells: int = 0
    candidates: list[FrozenTrial] = field(default_factory=list)
    """Trials that were waiting when last looked, the next one last."""
    losses: dict[str, float] = field(default_factory=dict)
    """Cell -> final loss, infinite when diverged, as far as the grid's growth has needed it."""

    def enqueue(self, parameters: Mapping[str, Any], *, added: bool = False) -> None:
        attributes = {_ENQUEUED: dict(parameters), _ADDED: added}
        self.study.enqueue_trial(dict(parameters), user_attrs=attributes)
        self.waiting += 1

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)


@dataclass(frozen=True)
class Ticket:
    """A cell that was handed out, and the trial that waits for its outcome."""

    cell: Cell
    search: _Search
    trial: optuna.Trial
    reported: set[int] = field(default_factory=set)

    def should_prune(self, curve: list[tuple[int, float]]) -> bool:
        """Tell Optuna the validation losses so far, by optimizer step; whether its pruner would end the cell here."""
        for step, loss in curve:  # an attempt that goes on from a checkpoint brings those of the attempts before it
            if step not in self.reported:
                self.trial.report(loss, step)
                self.reported.add(step)
        return self.trial.should_prune()


class CellQueue:
    """Hands out the cells of a study that have no record yet.

    Every point has an Optuna study of its own, so that a sampler learns from the trials of its point only. All trials
    are enqueued beforehand: a grid with all parameters, a sampled search with the seed alone, the rest being suggested
    when the cell is handed out.
    """

    def __init__(
        self, spec: StudySpec, folder: StudyFolder, storage: BaseStorage, identity: str, sweep: str, retries: int
    ) -> None:
        """Open or create the trials, and set right what killed sweeps have left; to be called while `folder.locked`.

        Args:
            spec: the study.
            folder: its results.
            storage: its trials.
            identity: of the folder, from `folder.claim`.
            sweep: name of this sweep's lease.
            retries: deaths without progress that a cell is forgiven.

        Raises:
            UserError: the storage belongs to another results folder.
        """
        self.folder, self.sweep, self.retries = folder, sweep, retries
        self.failures: dict[str, str] = {}
        """Cell -> reason, of the cells that were given up."""
        self._storage = storage
        self._mine: set[int] = set()
        self._ownerless: dict[int, float] = {}
        for cell in list(folder.attempts.cells()):
            if folder.finished(cell) is not None:
                folder.clear(cell)
        self._given_up = self._find_given_up()
        pruner = make_pruner(spec.pruner)
        self._searches = []
        for point in spec.points():
            name = f"{spec.name}/{point.name}"
            study = optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)
            trials = study.get_trials(deepcopy=False)
            if not trials and _FOLDER not in study.user_attrs:
                study.set_user_attr(_FOLDER, identity)
            elif study.user_attrs.get(_FOLDER, identity) != identity:
                raise UserError(f"--storage: holds {name} of another results folder; name another, or that --out")
            config = point.first_cell().config
            search = _Search(
                point, study, cost(config), stack_key(config) if always_stackable(point.nuisance) else None
            )
            self._reconcile(search)
            self._searches.append(search)
        # The most expensive cells first, so that no long one is left over at the end.
        self._searches.sort(key=lambda search: search.cost, reverse=True)

    def counts(self) -> Counts:
        """How far the study is, as of the last `tend`."""
        counts = Counts(failed=len(self.failures))
        for search in self._searches:
            counts.cells += search.cells
            counts.waiting += search.waiting
            counts.elsewhere += search.elsewhere
            counts.cost_waiting += search.waiting * search.cost
            counts.cost_elsewhere += search.elsewhere * search.cost
        return counts

    def next(self) -> Ticket | None:
        """The next cell to run; None when no cell waits. Cells that have a record are closed on the way."""
        return next(self._from(self._searches), None)

    def fitting(self, ticket: Ticket) -> Iterator[Ticket]:
        """Further cells, as they are asked for, that may be trained together with one that was handed out."""
        return self._from(self._like(ticket))

    def waiting_like(self, ticket: Ticket) -> int:
        """How many cells wait that may be trained together with one that was handed out, as of the last `tend`."""
        return sum(search.waiting for search in self._like(ticket))

    def _like(self, ticket: Ticket) -> list[_Search]:
        key = ticket.search.key
        return [search for search in self._searches if search.key == key] if key else []

    def _from(self, searches: list[_Search]) -> Iterator[Ticket]:
        """Hand out the cells of these points."""
        for search in searches:
            while search.waiting:
                trial = self._take(search)
                if trial is None:
                    search.waiting = 0
                    break
                search.waiting -= 1
                self._mine.add(trial._trial_id)
                trial.set_user_attr(_SWEEP, self.sweep)  # first: who has it is all that a successor must know
                parameters = suggest(trial, search.point)
                nuisance = {name: parameters[name] for name in search.point.nuisance}
                added = bool(trial.user_attrs.get(_ADDED))
                ticket = Ticket(search.point.cell(nuisance, parameters["seed"], added=added), search, trial)
                trial.set_user_attr(_CELL, ticket.cell.id)
                record = self.folder.finished(ticket.cell.id)
                if record is None:
                    assert search.key is None or search.key == stack_key(ticket.cell.config)
                    yield ticket
                else:
                    self.complete(ticket, record)

    def complete(self, ticket: Ticket, record: RunRecord) -> None:
        """Tell Optuna what came of a cell."""
        self._mine.discard(ticket.trial._trial_id)
        self._tell(ticket.search, ticket.trial.number, record)

    def fail(self, ticket: Ticket, reason: str, *, final: bool) -> None:
        """Close the trial without a loss; unless `final`, its cell waits again."""
        self._mine.discard(ticket.trial._trial_id)
        ticket.trial.set_user_attr("failed", reason)
        if self._close(ticket.search, ticket.trial.number) and not final:
            ticket.search.enqueue(ticket.trial.params, added=ticket.cell.added)
        if final:
            self.failures[ticket.cell.id] = reason

    def tend(self) -> None:
        """Look after what other sweeps do: count it, take over from dead ones, and let grids follow their optima."""
        for search in self._searches:
            self._recount(search)
            self._follow(search)

    def settle(self) -> None:
        """See that every cell has its outcome, and enqueue those without; to be called while `folder.locked`.

        A sweep that is killed between closing a trial and enqueuing its cell again leaves such a cell to the others.
        """
        self._given_up = self._find_given_up()
        for search in self._searches:
            self._reconcile(search)

    def _find_given_up(self) -> dict[str, str]:
        attempts = self.folder.attempts
        return {cell: reason for cell in attempts.cells() if (reason := attempts.given_up(cell, self.retries))}

    def _take(self, search: _Search) -> optuna.Trial | None:
        """Mark a waiting trial as running; of several sweeps that want the same one, one succeeds."""
        # Listed anew only when the list is used up: with every cell it would cost the square of their number.
        search.candidates = search.candidates or search.trials(TrialState.WAITING)[::-1]
        while search.candidates:
            trial = search.candidates.pop()
            with suppress(UpdateFinishedTrialError):
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    search.study.sampler = make_sampler(search.point.spec, trial.number)
                    return optuna.Trial(search.study, trial._trial_id)
        return None

    def _recount(self, search: _Search) -> None:
        search.waiting = search.elsewhere = 0
        added = {_key(_parameters(trial)) for trial in search.trials() if trial.user_attrs.get(_ADDED)}
        search.cells = search.point.n_cells + len(added)
        for trial in search.trials(TrialState.WAITING, TrialState.RUNNING):
            if trial.state == TrialState.WAITING:
                search.waiting += 1
            elif trial._trial_id not in self._mine:
                if self._is_abandoned(trial):
                    self._reclaim(search, trial)
                else:
                    search.elsewhere += 1

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        """Whether nobody is left to end a running trial."""
        sweep, cell = trial.user_attrs.get(_SWEEP), trial.user_attrs.get(_CELL)
        if sweep is None:  # taken this moment, or by a sweep that was killed the moment after
            if {path.stem for path in self.folder.running_sweeps()} <= {self.sweep}:
                return True
            return time.monotonic() - self._ownerless.setdefault(trial._trial_id, time.monotonic()) > LEASE_SECONDS
        if is_alive(self.folder.sweep(sweep)):
            return False
        return cell is None or not self.folder.attempts.is_running(cell)

    def _reclaim(self, search: _Search, trial: FrozenTrial) -> None:
        """End a trial whose sweep is gone: with its record, or as failed, its cell waiting again."""
        cell = trial.user_attrs.get(_CELL)
        record = self.folder.finished(cell) if cell else None
        if record is not None:
            self._tell(search, trial.number, record)
            return
        if not self._close(search, trial.number):
            return
        reason = self.folder.attempts.given_up(cell, self.retries) if cell else None
        if reason:
            self.failures[str(cell)] = reason
        else:
            search.enqueue(_parameters(trial), added=bool(trial.user_attrs.get(_ADDED)))

    def _tell(self, search: _Search, number: int, record: RunRecord) -> None:
        if record.cell is not None:
            self.folder.clear(record.cell.cell)
        with suppress(UpdateFinishedTrialError, ValueError):  # closed by somebody who took this sweep for dead
            if record.status == "pruned":
                search.study.tell(number, state=TrialState.PRUNED)
            else:
                search.study.tell(number, _loss(record))

    def _close(self, search: _Search, number: int) -> bool:
        """Mark a running trial as failed; False when somebody else has closed it."""
        try:
            search.study.tell(number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            return False
        return True

    def _reconcile(self, search: _Search) -> None:
        """Make the trials agree with the records: whatever has neither an outcome nor a place in the queue gets one."""
        point = search.point
        self._restore(search)
        self._recount(search)
        done, to_come = [], []
        for trial in search.trials():
            cell, parameters = trial.user_attrs.get(_CELL), _parameters(trial)
            ended = trial.state in _ENDED and cell is not None and self.folder.finished(cell) is not None
            given_up = trial.state == TrialState.FAIL and self._note_given_up(cell)
            if ended or given_up:
                done.append(_key(parameters))
            elif not trial.state.is_finished():  # one that is still to be sampled stands for a cell of its own
                to_come.append(_key(parameters) if parameters.keys() >= point.nuisance.keys() else str(trial.number))
        settled = {*done, *to_come}
        if not point.is_grid:
            self._top_up(search, settled, repeats=len(set(done)) < len(done))
            return
        for seed, nuisance in itertools.product(point.spec.seeds, point.grid()):
            parameters = {**nuisance, "seed": seed}
            if _key(parameters) not in settled and not self._note_given_up(point.cell(nuisance, seed).id):
                search.enqueue(parameters)
        self._follow(search)

    def _restore(self, search: _Search) -> None:
        """Give the storage the ended trials that it lacks and of which there are records."""
        point = search.point
        known = {_key(_parameters(trial)) for trial in search.trials() if trial.state != TrialState.FAIL}
        for record in self._records:
            cell = record.cell
            if cell is None or (cell.arm, cell.factors) != (point.arm, point.factors):
                continue
            parameters = {**cell.nuisance, "seed": record.seed}
            if _key(parameters) in known:
                continue
            trial = optuna.trial.create_trial(
                state=TrialState.PRUNED if record.status == "pruned" else TrialState.COMPLETE,
                value=record.best_loss if record.status == "pruned" else _loss(record),
                params=parameters,
                distributions=distributions(point),
                user_attrs={_ENQUEUED: parameters, _CELL: cell.cell, _ADDED: cell.added},
            )
            search.study.add_trial(trial)

    @cached_property
    def _records(self) -> list[RunRecord]:
        paths = sorted((self.folder.path / "records").glob("*.json"))
        return [record for path in paths if (record := self.folder.finished(path.stem)) is not None]

    def _top_up(self, search: _Search, settled: set[str], *, repeats: bool) -> None:
        """Enqueue the trials that a sampled search lacks: lost ones, those it is to begin with, then free ones.

        A sampler that `repeats` itself over lists might do so for ever: what is left of them is drawn by lot instead.
        """
        point, trials = search.point, search.trials()
        seeds = point.spec.seeds
        lost = {_key(_parameters(trial)): _parameters(trial) for trial in trials if trial.params}
        again = [parameters for key, parameters in lost.items() if key not in settled]
        first = [one for one in point.start() if not any(one.items() <= _parameters(trial).items() for trial in trials)]
        if repeats and point.n_possible is not None and not (again or first):
            cells = [{**nuisance, "seed": seed} for seed, nuisance in itertools.product(seeds, point.grid())]
            untried = [one for one in cells if _key(one) not in settled]
            again = random.Random(seeds[0]).sample(untried, max(0, point.n_cells - len(settled)))
        for index in range(len(settled), point.n_cells):
            seed = {"seed": seeds[index % len(seeds)]}
            search.enqueue(again.pop() if again else {**first.pop(0), **seed} if first else seed)

    def _follow(self, search: _Search) -> None:
        """Enqueue a further learning rate where all cells of a point are done and its optimum lies at the edge."""
        point, grid = search.point, search.point.nuisance.get("optim.lr")
        if not point.spec.follow_optimum or grid is None:
            return
        rates = [float(rate) for rate in grid_values(grid)]
        for _ in range(point.spec.follow_optimum):
            if search.waiting or search.elsewhere:
                return
            losses = {rate: self._mean_loss(search, rate) for rate in rates}
            if any(loss is None for loss in losses.values()):  # cells under way here, or given up
                return
            rate = next_rate(rates, {rate: loss for rate, loss in losses.items() if loss is not None})
            if rate is None:
                return
            rates.append(rate)
            known = {_key(_parameters(trial)) for trial in search.trials() if trial.state != TrialState.FAIL}
            for nuisance, seed in _cells_at(point, rate):
                parameters = {**nuisance, "seed": seed}
                if _key(parameters) not in known and not self._note_given_up(point.cell(nuisance, seed).id):
                    search.enqueue(parameters, added=True)
                    search.cells += 1

    def _mean_loss(self, search: _Search, rate: float) -> float | None:
        """Mean over seeds of a rate's best loss, infinite when a seed's runs diverged; None while cells are missing."""
        by_seed = defaultdict(list)
        for nuisance, seed in _cells_at(search.point, rate):
            cell = search.point.cell(nuisance, seed).id
            if cell not in search.losses:
                record = self.folder.finished(cell)
                if record is None:
                    return None
                search.losses[cell] = math.inf if record.final_loss is None else record.final_loss
            by_seed[seed].append(search.losses[cell])
        return sum(min(losses) for losses in by_seed.values()) / len(by_seed)

    def _note_given_up(self, cell: str | None) -> bool:
        if cell in self._given_up:
            self.failures[str(cell)] = self._given_up[str(cell)]
        return cell in self._given_up


def cost(config: RunConfig) -> float:
    """Rough relative time of a run: multiply-adds, with a floor for what does not shrink with the width."""
    model = config.model
    matrices = model.n_layers * model.d_model * (4 * model.d_model + 3 * model.d_ff)
    elementwise = model.n_layers * 2000 * model.d_model
    return config.train.steps * config.train.batch_size * config.data.seq_len * float(matrices + elementwise)


def _loss(record: RunRecord) -> float:
    """What a trial is worth: a diverged run counts as the loss at initialization (arXiv:2309.14322 sec. 2.2)."""
    losses = [loss for loss in (record.final_loss, record.initial_loss) if loss is not None]
    return min(losses, default=math.inf)


def _cells_at(point: Point, rate: float) -> Iterator[tuple[dict[str, Any], int]]:
    """Nuisance factors and seed of the cells of a grid at one learning rate."""
    others = {json.dumps({**nuisance, "optim.lr": rate}) for nuisance in point.grid()}
    for nuisance in sorted(others):
        for seed in point.spec.seeds:
            yield json.loads(nuisance), seed


def _parameters(trial: FrozenTrial) -> dict[str, Any]:
    """All parameters of a trial that has been handed out; of one that waits, those it was enqueued with."""
    return {**trial.user_attrs.get(_ENQUEUED, {}), **trial.params}


def _key(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters), sort_keys=True)

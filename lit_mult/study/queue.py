"""The cells of a study as Optuna trials: what is waiting, what to run next, what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lit_mult.config import RunConfig
from lit_mult.record import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import Cell, Distribution, Grid, Point, StudySpec, grid_values

# What a trial was enqueued with, kept where it can be read while the trial waits.
_ENQUEUED = "enqueued"


@dataclass
class _Search:
    """The Optuna study of one point."""

    point: Point
    study: optuna.Study
    cost: float
    waiting: int = 0

    def enqueue(self, parameters: Mapping[str, Any]) -> None:
        self.study.enqueue_trial(dict(parameters), user_attrs={_ENQUEUED: dict(parameters)})
        self.waiting += 1


@dataclass(frozen=True)
class Ticket:
    """A cell that was handed out, and the trial that waits for its outcome."""

    cell: Cell
    search: _Search
    trial: optuna.Trial

    def complete(self, record: RunRecord) -> None:
        """Tell Optuna the loss; a diverged run counts as the loss at initialization (arXiv:2309.14322 sec. 2.2)."""
        self.trial.set_user_attr("status", record.status)
        losses = [loss for loss in (record.final_loss, record.initial_loss) if loss is not None]
        self.search.study.tell(self.trial, min(losses, default=math.inf))

    def fail(self, reason: str, *, retry: bool) -> None:
        """Close the trial without a loss; with `retry`, its cell waits again."""
        self.trial.set_user_attr("failed", reason)
        self.search.study.tell(self.trial, state=TrialState.FAIL)
        if retry:
            self.search.enqueue(self.trial.params)


class CellQueue:
    """Hands out the cells of a study that have no record yet; to be used by the one process that holds the folder.

    Every point has an Optuna study of its own, so that a sampler learns from the trials of its point only. All trials
    are enqueued beforehand: a grid with all parameters, a sampled search with the seed alone, the rest being suggested
    when the cell is handed out.
    """

    def __init__(self, spec: StudySpec, folder: StudyFolder) -> None:
        """Open or create the trials, and set right what a killed sweep has left running."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress display says what a line a trial would
        self.folder = folder
        storage = _open_journal(folder)
        self._searches = []
        for point in spec.points():
            study = optuna.create_study(
                storage=storage,
                study_name=f"{spec.name}/{point.name}",
                load_if_exists=True,
            )
            study.sampler = _sampler(spec, len(study.get_trials(deepcopy=False)))
            search = _Search(point, study, cost(point.first_cell().config))
            self._reconcile(search)
            self._searches.append(search)
        # The most expensive cells first, so that no long one is left over at the end.
        self._searches.sort(key=lambda search: search.cost, reverse=True)

    @property
    def n_waiting(self) -> int:
        """Cells that wait."""
        return sum(search.waiting for search in self._searches)

    def remaining_cost(self) -> float:
        """Estimated cost of the cells that wait, in the unit of `cost`."""
        return sum(search.waiting * search.cost for search in self._searches)

    def next(self) -> Ticket | None:
        """The next cell to run; None when no cell waits. Cells that have a record are closed on the way."""
        for search in self._searches:
            while search.waiting:
                trial = search.study.ask(_distributions(search.point))
                assert _ENQUEUED in trial.user_attrs, f"{search.point.name}: more cells than were planned"
                search.waiting -= 1
                nuisance = {name: trial.params[name] for name in search.point.nuisance}
                ticket = Ticket(search.point.cell(nuisance, trial.params["seed"]), search, trial)
                trial.set_user_attr("cell", ticket.cell.id)
                record = self.folder.record(ticket.cell.id)
                if not record.is_file():
                    return ticket
                ticket.complete(RunRecord.read(record))
        return None

    def _reconcile(self, search: _Search) -> None:
        """Make the trials agree with the records: whatever has neither an outcome nor a place in the queue gets one."""
        trials = search.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING:  # its process is gone: the folder was free
                search.study.tell(trial.number, state=TrialState.FAIL)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE and self._has_record(trial)]
        search.waiting = len(waiting)
        settled = {_key(trial.user_attrs[_ENQUEUED]) for trial in waiting} | {_key(trial.params) for trial in done}
        point = search.point
        if point.is_grid:
            for seed in point.spec.seeds:
                for nuisance in point.grid():
                    if _key({**nuisance, "seed": seed}) not in settled:
                        search.enqueue({**nuisance, "seed": seed})
            return
        lost = [trial.params for trial in trials if trial.params and _key(trial.params) not in settled]
        for index in range(len(waiting) + len(done), point.n_cells):
            search.enqueue(lost.pop() if lost else {"seed": point.spec.seeds[index % len(point.spec.seeds)]})

    def _has_record(self, trial: FrozenTrial) -> bool:
        return self.folder.record(trial.user_attrs["cell"]).is_file()


def cost(config: RunConfig) -> float:
    """Rough relative time of a run: multiply-adds, with a floor for what does not shrink with the width."""
    model = config.model
    matrices = model.n_layers * model.d_model * (4 * model.d_model + 3 * model.d_ff)
    elementwise = model.n_layers * 2000 * model.d_model
    return config.train.steps * config.train.batch_size * config.data.seq_len * float(matrices + elementwise)


def _distributions(point: Point) -> dict[str, BaseDistribution]:
    nuisance = {name: _distribution(values) for name, values in point.nuisance.items()}
    return nuisance | {"seed": CategoricalDistribution(point.spec.seeds)}


def _distribution(values: Grid) -> BaseDistribution:
    if isinstance(values, Distribution):
        return FloatDistribution(values.low, values.high, log=values.log)
    grid = grid_values(values)
    if all(isinstance(value, float) for value in grid):
        # As a range, so that Optuna's plots have a numeric axis; the values of the grid are enqueued.
        return FloatDistribution(min(grid), max(grid), log=min(grid) > 0)
    return CategoricalDistribution(grid)


def _sampler(spec: StudySpec, trials_before: int) -> BaseSampler:
    # The same seed at every point: arms are offered the same values for as long as the sampler does not learn. Another
    # one when a sweep goes on, or the samples of its beginning would come again.
    seed = spec.seeds[0] + 1_000_003 * trials_before
    # A grid is enqueued whole and leaves nothing to sample.
    return TPESampler(seed=seed) if spec.sampler == "tpe" else RandomSampler(seed=seed)


def _open_journal(folder: StudyFolder) -> JournalStorage:
    """The journal; one that cannot be read is set aside, as the records say all that matters."""
    try:
        storage = JournalStorage(JournalFileBackend(str(folder.journal)))
        storage.get_all_studies()
    except (ValueError, KeyError, TypeError):  # what a torn or foreign line makes of Optuna's replay
        folder.journal.replace(folder.journal.with_suffix(".damaged"))
        return JournalStorage(JournalFileBackend(str(folder.journal)))
    return storage


def _key(parameters: Mapping[str, Any]) -> str:
    return json.dumps(dict(parameters), sort_keys=True)

"""Trials of a sampled search on several seeds, and the re-ranking of the best on fresh ones, by records made up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from growth_data import queue, record
from record_data import INITIAL_LOSS
from refusals import refusal

from lit_mult.errors import ConfigError
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.queue import CellQueue
from lit_mult.study.search import Ticket
from lit_mult.study.slots import SampledCells
from lit_mult.study.spec import Cell, StudySpec
from lit_mult.study.status import study_status
from lit_mult.study.storage import open_storage

MakeStudy = Callable[..., dict[str, Any]]
RATES = {"low": 2**-9, "high": 2**-3, "log": True}


@pytest.fixture
def search_dict(small_study_dict: MakeStudy) -> MakeStudy:
    """A random search of one arm: 3 trials on 2 of 3 seeds; with dotted overrides of its base, and parts replaced."""

    def make(overrides: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        study = small_study_dict(
            overrides,
            arms={"muP": {"multipliers": "fixed"}},
            nuisance={"optim.lr": RATES},
            sampler="random",
            seeds=[5, 6, 7],
            budget=budget(),
        )
        return study | changes

    return make


@pytest.fixture
def pruned_dict(search_dict: MakeStudy) -> MakeStudy:
    """The same with a pruner."""
    return lambda **changes: search_dict({"train.eval_every": 2}, pruner={"name": "median"}, **changes)


def budget(**changes: int) -> dict[str, int]:
    return {"steps": 6, "batch_size": 4, "trials": 3, "seeds_per_trial": 2, **changes}


def sampled(study: dict[str, Any], folder: Path) -> SampledCells:
    (point,) = StudySpec.from_dict(study).points()
    return SampledCells(point, StudyFolder(folder))


def trials_of(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="tiny/muP", storage=open_storage(folder.journal)).trials


def states_of(folder: StudyFolder) -> Counter[str]:
    return Counter(trial.state.name for trial in trials_of(folder))


def finish(sweep: CellQueue, ticket: Ticket, loss: float | None, **changes: Any) -> RunRecord:
    made = record(ticket.cell, lambda cell: loss).model_copy(update=changes)
    made.write(sweep.folder.record(ticket.cell.id))
    sweep.complete(ticket, made)
    return made


def take(sweep: CellQueue) -> Ticket:
    ticket = sweep.next()
    assert ticket is not None
    return ticket


def test_a_trial_runs_on_the_first_seeds(search_dict: MakeStudy, tmp_path: Path) -> None:
    cells = sampled(search_dict(), tmp_path)

    assert cells.create({"optim.lr": 0.01}, 0)

    assert [(cell.config.optim.lr, cell.config.seed) for cell in cells.cells.values()] == [(0.01, 5), (0.01, 6)]
    assert (cells.n_cells, cells.to_sample, cells.startable) == (6, 2, 4)
    assert cells.point.spec.n_cells == 6
    assert json.loads((tmp_path / "trials" / "muP.0.json").read_text()) == {"optim.lr": 0.01}
    other = sampled(search_dict(), tmp_path)
    other.read_slots()
    assert other.cells == cells.cells


def test_with_one_seed_a_trial_has_its_own(search_dict: MakeStudy, tmp_path: Path) -> None:
    cells = sampled(search_dict(budget=budget(seeds_per_trial=1)), tmp_path)

    assert cells.create({"optim.lr": 0.01, "seed": 7}, 0)

    assert [cell.config.seed for cell in cells.cells.values()] == [7]
    assert cells.n_cells == 3
    assert json.loads((tmp_path / "trials" / "muP.0.json").read_text()) == {"optim.lr": 0.01, "seed": 7}


def test_a_damaged_slot_is_taken_and_holds_no_trial(search_dict: MakeStudy, tmp_path: Path) -> None:
    cells = sampled(search_dict(), tmp_path)
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "muP.0.json").write_text('{"optim.l')

    cells.read_slots()

    assert (cells.trials, cells.to_sample, cells.next_slot) == ({}, 3, 1)


def test_optuna_is_told_the_mean_over_the_seeds(search_dict: MakeStudy, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    sweep = queue(StudySpec.from_dict(search_dict()), folder, "a")
    losses: list[float | None] = [2.0, 3.0, 2.5, None, 6.0, 2.0]
    taken = [take(sweep) for _ in losses]

    for ticket, loss in zip(taken, losses, strict=True):
        finish(sweep, ticket, loss)

    assert sweep.next() is None
    assert [ticket.cell.config.seed for ticket in taken] == [5, 6] * 3
    # A trial that diverged on a seed counts as the initial loss, as does a run that ends above it.
    assert sorted(trial.value for trial in trials_of(folder)) == [2.5, (INITIAL_LOSS + 2.0) / 2, INITIAL_LOSS]
    assert all(trial.params.keys() == {"optim.lr"} for trial in trials_of(folder))
    assert states_of(folder) == {"COMPLETE": 3}


def test_two_sweeps_run_the_seeds_of_one_trial(search_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(search_dict(budget=budget(trials=1))), StudyFolder(tmp_path)
    leases = [folder.join(), folder.join()]
    one, other = (queue(spec, folder, lease.path.stem) for lease in leases)
    first = take(one)
    assert folder.attempts.begin(first.cell.id, 0)
    other.refresh()
    second = take(other)

    assert (first.cell.config.seed, second.cell.config.seed) == (5, 6)
    finish(other, second, 3.0)
    finish(one, first, 2.0)
    for sweep in (one, other):
        sweep.refresh()
        sweep.publish()
        sweep.close()
        assert sweep.counts().waiting == 0

    for lease in leases:
        lease.close("done")
    assert {trial.state.name: trial.value for trial in trials_of(folder)} == {"COMPLETE": 2.5}


def test_a_trial_whose_sweep_was_killed_goes_on(search_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(search_dict(budget=budget(trials=1))), StudyFolder(tmp_path)
    killed = queue(spec, folder, "killed")
    finish(killed, take(killed), 2.0)
    take(killed)  # and then it is killed

    sweep = queue(spec, folder, "another")
    assert (sweep.counts().cells, sweep.counts().waiting) == (2, 1)
    left = take(sweep)
    assert left.cell.config.seed == 6
    finish(sweep, left, 3.0)

    assert sweep.next() is None
    assert states_of(folder) == {"COMPLETE": 1, "FAIL": 1}
    assert [trial.value for trial in trials_of(folder) if trial.state.name == "COMPLETE"] == [2.5]


def test_slots_that_are_lost_come_back_from_the_records(search_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(search_dict(rerank={"best": 1, "seeds": [9]})), StudyFolder(tmp_path)
    sweep = queue(spec, folder, "a")
    while (ticket := sweep.next()) is not None:
        finish(sweep, ticket, 2.0 + ticket.cell.config.optim.lr)
    assert len(folder.records()) == 3 * 2 + 1
    for path in folder.trials_folder.iterdir():
        path.unlink()

    again = queue(spec, folder, "b")

    assert (again.counts().cells, again.counts().waiting) == (7, 0)
    assert len(list(folder.trials_folder.iterdir())) == 3
    assert again.next() is None


def test_the_first_seed_alone_may_be_pruned(pruned_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(pruned_dict(budget=budget(trials=2))), StudyFolder(tmp_path)
    folder.claim(spec, ["corpus"])
    sweep = queue(spec, folder, "a")
    first, second = take(sweep), take(sweep)
    assert sweep.next() is None  # other seeds wait for the first one of their trial
    counts = sweep.counts()
    assert (counts.cells, counts.here, counts.waiting, counts.ready) == (4, 2, 2, 0)

    assert first.trial is not None
    first.trial.report(4.0, 2)
    finish(sweep, first, None, status="pruned", best_loss=4.0)
    assert sweep.next() is None
    assert (sweep.counts().cells, sweep.counts().waiting) == (3, 1)
    finish(sweep, second, 2.0)
    last = take(sweep)
    assert (last.cell.nuisance, last.cell.config.seed, last.trial) == (second.cell.nuisance, 6, None)
    finish(sweep, last, 3.0)

    assert sweep.next() is None
    assert (sweep.counts().cells, sweep.counts().waiting) == (3, 0)
    assert {trial.state.name: trial.value for trial in trials_of(folder)} == {"PRUNED": 4.0, "COMPLETE": 2.5}
    assert (study_status(tmp_path, retries=3).cells, study_status(tmp_path, retries=3).waiting) == (3, 0)


def test_a_failed_first_seed_ends_the_sweep(pruned_dict: MakeStudy, tmp_path: Path) -> None:
    spec = StudySpec.from_dict(pruned_dict(budget=budget(trials=1), rerank={"best": 1, "seeds": [9]}))
    sweep = queue(spec, StudyFolder(tmp_path), "a")

    sweep.release(take(sweep), failure="RuntimeError: out of luck")

    counts = sweep.counts()
    assert (counts.cells, counts.failed, counts.waiting, counts.ready) == (3, 1, 2, 0)
    assert sweep.next() is None


def test_the_best_trials_run_again_on_fresh_seeds(search_dict: MakeStudy, tmp_path: Path) -> None:
    study = search_dict(budget=budget(trials=5), rerank={"best": 2, "seeds": [20, 21]})
    cells, records = sampled(study, tmp_path), dict[str, RunRecord]()
    # The third has the luckiest seed, the fifth a seed that diverged; the first and fourth have the lowest means.
    losses: dict[float, list[float | None]] = {
        0.01: [2.5, 2.5],
        0.02: [2.8, 2.8],
        0.03: [1.0, 4.5],
        0.04: [2.4, 2.5],
        0.05: [1.0, None],
    }
    for number, rate in enumerate(losses):
        assert cells.create({"optim.lr": rate}, number)

    def loss(cell: Cell) -> float | None:
        return losses[cell.config.optim.lr][cell.config.seed - 5]

    assert cells.point.spec.n_cells == cells.n_cells == 5 * 2 + 2 * 2
    *others, last = cells.cells.values()
    records |= {cell.id: record(cell, loss) for cell in others}
    cells.refresh(records)
    assert (len(cells.cells), cells.n_cells) == (10, 14)  # not before all trials are done
    cells.refresh(records | {last.id: record(last, loss)})

    again = [(cell.config.optim.lr, cell.config.seed) for cell in list(cells.cells.values())[10:]]
    assert again == [(0.04, 20), (0.04, 21), (0.01, 20), (0.01, 21)]
    assert cells.n_cells == 14
    other = sampled(study, tmp_path)
    other.refresh(dict(reversed([*records.items(), (last.id, record(last, loss))])))
    assert other.cells.keys() == cells.cells.keys()


def test_trials_of_untuned_multipliers_run_again_too(search_dict: MakeStudy, tmp_path: Path) -> None:
    arms = {"muP": {"multipliers": "fixed", "parametrization.tier": "LR"}}
    study = search_dict(arms=arms, search_multipliers=True, rerank={"best": 1, "seeds": [20]})
    cells = sampled(study, tmp_path)
    untuned = dict.fromkeys(cells.point.nuisance, 1.0)
    tuned = dict.fromkeys(untuned, 2.0)
    for number, (values, rate) in enumerate([(untuned, 0.01), (untuned, 0.02), (tuned, 0.03)]):
        assert cells.create(values | {"optim.lr": rate}, number)

    def loss(cell: Cell) -> float | None:  # one of the untuned trials diverged
        return {0.01: 3.0, 0.02: None, 0.03: 2.0}[cell.config.optim.lr]

    cells.refresh({cell.id: record(cell, loss) for cell in cells.cells.values()})

    assert [cell.config.optim.lr for cell in cells.cells.values() if cell.config.seed == 20] == [0.03, 0.01]
    assert cells.n_cells == 6 + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": budget(seeds_per_trial=4)}, "budget.seeds_per_trial = 4: must be at most 3"),
        ({"budget": budget(seeds_per_trial=0)}, "budget.seeds_per_trial = 0"),
        ({"rerank": {"best": 4, "seeds": [9]}}, "rerank.best = 4: must be at most 3"),
        ({"rerank": {"best": 1, "seeds": [9, 6]}}, "rerank.seeds = [9, 6]: must be fresh; [6] are"),
        ({"rerank": {"best": 1, "seeds": [9, 9]}}, "rerank.seeds = [9, 9]: must not repeat"),
        ({"rerank": {"best": 1, "seeds": []}}, "rerank.seeds = []"),
        (
            {"nuisance": {"optim.lr": [0.1, 0.2]}},
            "budget.trials = 3: the lists of arm muP make 2 trials; sampler: grid runs them all",
        ),
    ],
)
def test_bad_seeds_of_trials_are_refused(search_dict: MakeStudy, changes: dict[str, Any], said: str) -> None:
    with refusal(said, kind=ConfigError):
        StudySpec.from_dict(search_dict(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rerank": {"best": 1, "seeds": [9]}}, "needs sampler: random or tpe"),
        ({"budget": {"steps": 6, "batch_size": 4, "seeds_per_trial": 2}}, "budget.seeds_per_trial = 2: needs sampler"),
    ],
)
def test_grids_have_no_trials(small_study_dict: MakeStudy, changes: dict[str, Any], said: str) -> None:
    with refusal(said, kind=ConfigError):
        StudySpec.from_dict(small_study_dict(seeds=[0, 1], **changes))

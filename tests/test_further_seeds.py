"""Seeds that a study adds until the intervals of its questions are narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from growth_data import alternating, curve, first_round, known, queue, record, rounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal

from lit_mult.errors import ConfigError
from lit_mult.study.folder import StudyFolder
from lit_mult.study.precision import rates_around_optimum, seeds_needed
from lit_mult.study.spec import Cell, StudySpec
from lit_mult.study.status import study_status

MakeStudy = Callable[..., dict[str, Any]]


def seeds_of(cells: Iterable[Cell]) -> set[int]:
    return {cell.config.seed for cell in cells}


def rates_of(cells: Iterable[Cell]) -> set[float]:
    return {math.log2(cell.config.optim.lr) for cell in cells}


def test_a_round_has_the_seeds_at_which_the_interval_would_be_narrow_enough() -> None:
    half = 0.01 * math.sqrt(3) / 2
    four = [half, half, -half, -half]  # standard deviation 0.01, half width 3.182 * 0.01 / 2 = 0.0159

    assert seeds_needed(four, 4, precision=0.016, most=40) == 4
    # t(0.975, n - 1) * 0.01 / sqrt(n) is 0.0124 for five seeds, 0.0105 for six and 0.0092 for seven.
    assert seeds_needed(four, 4, precision=0.0125, most=40) == 5
    assert seeds_needed(four, 4, precision=0.01, most=40) == 7
    assert seeds_needed(four, 4, precision=0.001, most=40) == 8  # at most twice as many
    assert seeds_needed(four, 4, precision=0.01, most=6) == 6
    assert seeds_needed(four, 4, precision=0.01, most=4) == 4
    assert seeds_needed([0.1], 1, precision=0.01, most=40) == 2  # one seed has no deviation
    assert seeds_needed([], 4, precision=0.01, most=40) == 4  # a side that diverged on every seed


def test_rounds_by_hand(precise_dict: MakeStudy) -> None:
    """Differences of ±0.01: the deviation over n seeds is 0.01 sqrt(n / (n - 1)), and the half width is

    12.7 * 0.0141 / sqrt(2) = 0.127 for 2 seeds, 0.018 for 4, 0.0089 for 8 and 0.0075 for 10. From 8 seeds on, with
    their deviation of 0.0107, 9 seeds would have 0.0082 and 10 have 0.0077.
    """
    planned, *further = rounds(StudySpec.from_dict(precise_dict()), alternating)

    assert len(planned) == 20
    assert [seeds_of(cells.values()) for cells in further] == [{2, 3}, {4, 5, 6, 7}, {8, 9}]
    for cells in further:
        assert {cell.point.arm for cell in cells.values()} == {"muP", "vectors"}
        assert rates_of(cells.values()) == {-7, -6, -5}
        assert len(cells) == 2 * 3 * len(seeds_of(cells.values()))
        assert all(cell.info.refines and not cell.info.added for cell in cells.values())
    assert not any(cell.info.refines for cell in planned.values())


def test_a_grid_that_is_narrow_enough_gets_no_seeds(precise_dict: MakeStudy) -> None:
    assert len(list(rounds(StudySpec.from_dict(precise_dict(precision=0.13)), alternating))) == 1


def test_the_budget_of_seeds_ends_the_rounds(precise_dict: MakeStudy) -> None:
    spec = StudySpec.from_dict(precise_dict(budget={"steps": 6, "batch_size": 4, "seeds": 7}, seeds=[4, 3]))
    assert spec.all_seeds == [4, 3, 5, 6, 7, 8, 9]

    assert [seeds_of(cells.values()) for cells in rounds(spec, alternating)] == [{4, 3}, {5, 6}, {7, 8, 9}]


@pytest.fixture
def every(precise_dict: MakeStudy) -> list[dict[str, Cell]]:
    """All rounds of a study, the planned cells first."""
    return list(rounds(StudySpec.from_dict(precise_dict()), alternating))


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whoever_reads_the_folder_derives_the_same_cells(every: list[dict[str, Cell]], data: st.DataObject) -> None:
    spec = next(iter(every[0].values())).point.spec
    cells = {name: cell for some in every for name, cell in some.items()}
    records = {name: record(cell, alternating) for name, cell in cells.items()}
    lost = data.draw(st.sets(st.sampled_from(sorted(cells)), max_size=3))
    left = data.draw(st.permutations([name for name in cells if name not in lost]))

    found = known(spec, {name: records[name] for name in left})

    # The rounds up to the first one that lacks a record, whatever later ones have.
    whole = next((number for number, some in enumerate(every) if some.keys() & lost), len(every) - 1)
    assert found.keys() == {name for some in every[: whole + 1] for name in some}
    assert all(found[name].info == cells[name].info for name in found)


@pytest.mark.parametrize(("best", "rates"), [(-8, {-8, -7}), (-4, {-5, -4}), (-7, {-8, -7, -6})])
def test_an_optimum_at_an_edge_has_one_neighbour(precise_dict: MakeStudy, best: int, rates: set[int]) -> None:
    def loss(cell: Cell) -> float:
        return alternating(cell) - curve(cell) + curve(cell, best)

    assert rates_of(first_round(StudySpec.from_dict(precise_dict()), loss).values()) == rates


def test_neighbours_have_the_best_of_the_other_nuisance_factors(precise_dict: MakeStudy) -> None:
    nuisance = {"optim.lr": {"log2": [-8, -7, -6, -5, -4]}, "optim.weight_decay": [0.0, 0.1, 0.2]}
    point = next(StudySpec.from_dict(precise_dict(nuisance=nuisance)).points())
    cells = [point.cell(values, seed) for values in point.grid() for seed in (0, 1)]

    def loss(cell: Cell) -> float:
        decay = cell.config.optim.weight_decay
        if decay == 0.2 and cell.config.seed == 1:
            return 9.0  # a lucky seed 0 does not make it the best
        return curve(cell) - {0.0: 0.0, 0.1: 0.05, 0.2: 1.0}[decay]

    found = rates_around_optimum(cells, {cell.id: record(cell, loss) for cell in cells})

    assert found == [{"optim.lr": 2.0**rate, "optim.weight_decay": 0.1} for rate in (-7, -6, -5)]


def test_a_rate_added_at_an_edge_may_be_the_optimum(precise_dict: MakeStudy) -> None:
    """Seeds come after the added rates, and do not move them, though seed 2 likes a higher rate still."""

    def loss(cell: Cell) -> float:
        lucky = cell.config.seed >= 2 and cell.config.optim.lr == 2**-3
        return alternating(cell) - curve(cell) + curve(cell, -3) - (0.5 if lucky else 0)

    spec = StudySpec.from_dict(precise_dict(follow_optimum=3))
    _planned, first_added, second_added, *further = rounds(spec, loss)

    assert (rates_of(first_added.values()), rates_of(second_added.values())) == ({-3}, {-2})
    assert all(cell.info.added for cell in [*first_added.values(), *second_added.values()])
    assert seeds_of(further[0].values()) == {2, 3}
    for cells in further:
        assert rates_of(cells.values()) == {-4, -3, -2}
        assert all(cell.info.refines and not cell.info.added for cell in cells.values())


@pytest.mark.parametrize("measure", ["sensitivity", "mean_loss"])
def test_a_question_about_all_rates_gets_its_seeds_at_all_of_them(precise_dict: MakeStudy, measure: str) -> None:
    questions = [{"of": "vectors", "against": "muP", "measure": measure}]

    def loss(cell: Cell) -> float:  # vectors are flatter on even seeds
        flatter = cell.point.arm == "vectors" and cell.config.seed % 2 == 0
        return 3 + (curve(cell) - 3) * (0.9 if flatter else 1)

    further = first_round(StudySpec.from_dict(precise_dict(questions=questions)), loss)

    assert rates_of(further.values()) == {-8, -7, -6, -5, -4}
    assert seeds_of(further.values()) == {2, 3}


def test_an_arm_with_one_rate_takes_part(precise_dict: MakeStudy) -> None:
    arms = {"muP": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector", "optim.lr": 2**-6}}

    further = first_round(StudySpec.from_dict(precise_dict(arms=arms)), alternating).values()

    by_arm = {arm: [cell for cell in further if cell.point.arm == arm] for arm in arms}
    assert (rates_of(by_arm["muP"]), rates_of(by_arm["vectors"])) == ({-7, -6, -5}, {-6})


def test_only_the_lines_of_an_open_question_get_seeds(precise_dict: MakeStudy) -> None:
    """The question leaves the optimizer open, so it is one for each; under AdamW all seeds agree."""
    study = precise_dict(factors={"optimizer": ["adamw", "muon"], "model.d_model": [8, 16]})

    def loss(cell: Cell) -> float:
        return curve(cell) if cell.config.optimizer == "adamw" else alternating(cell)

    planned, *further = rounds(StudySpec.from_dict(study), loss)

    assert len(planned) == 2 * 2 * 20
    assert [seeds_of(cells.values()) for cells in further] == [{2, 3}, {4, 5, 6, 7}, {8, 9}]
    for cells in further:  # at both widths, over which a seed's difference is averaged
        points = {cell.point.name for cell in cells.values()}
        assert points == {"muP-muon-8", "muP-muon-16", "vectors-muon-8", "vectors-muon-16"}


def test_a_width_that_one_side_lacks_gets_no_seeds(precise_dict: MakeStudy) -> None:
    arms = {"muP": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector", "model.d_model": 8}}
    study = precise_dict(arms=arms, factors={"model.d_model": [8, 16]})

    further = first_round(StudySpec.from_dict(study), alternating)

    assert {cell.point.name for cell in further.values()} == {"muP-8", "vectors-8"}


def test_a_side_that_diverges_gets_no_seeds(precise_dict: MakeStudy) -> None:
    def loss(cell: Cell) -> float | None:
        return None if cell.point.arm == "vectors" else curve(cell)

    assert len(list(rounds(StudySpec.from_dict(precise_dict()), loss))) == 1


def test_a_sweep_that_is_killed_in_a_round_is_taken_over(precise_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(precise_dict()), StudyFolder(tmp_path)
    planned, first, second, _ = rounds(spec, alternating)
    folder.claim(spec, ["corpus"])
    for cell in planned.values():
        record(cell, alternating).write(folder.record(cell.id))
    one, other = queue(spec, folder, "one"), queue(spec, folder, "other")
    assert (one.counts().cells, one.counts().waiting) == (20 + 12, 12)
    assert study_status(tmp_path, retries=3).cells == 20 + 12

    taken = [one.next() for _ in range(5)]  # and then it is killed
    assert {ticket.cell.id for ticket in taken if ticket} < first.keys()
    while (ticket := other.next()) is not None:
        made = record(ticket.cell, alternating)
        made.write(folder.record(ticket.cell.id))
        other.complete(ticket, made)

    assert {path.stem for path in folder.records()} == planned.keys() | first.keys()
    other.refresh()
    for sweep in (other, queue(spec, folder, "third")):
        assert (sweep.counts().cells, sweep.counts().waiting) == (20 + 12 + 24, 24)
        ticket = sweep.next()
        assert ticket is not None
        assert ticket.cell.id in second
    status = study_status(tmp_path, retries=3)
    assert (status.cells, status.waiting) == (20 + 12 + 24, 24)


def test_no_seeds_are_added_past_a_failed_cell(precise_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(precise_dict()), StudyFolder(tmp_path)
    failed, *others = next(rounds(spec, alternating)).values()
    for cell in others:
        record(cell, alternating).write(folder.record(cell.id))
    attempt = folder.attempts.begin(failed.id, 0)
    assert attempt is not None
    attempt.close("failed", "RuntimeError: out of luck")

    sweep = queue(spec, folder, "one")

    counts = sweep.counts()
    assert (counts.cells, counts.failed, counts.waiting) == (20, 1, 0)
    assert sweep.next() is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": 0}, "precision = 0"),
        ({"precision": None}, "budget.seeds = 40: needs precision"),
        ({"questions": []}, "precision = 0.008: needs questions"),
        ({"budget": {"steps": 6, "batch_size": 4}}, "budget.seeds = None: must be above 2"),
        ({"budget": {"steps": 6, "batch_size": 4, "seeds": 2}}, "budget.seeds = 2: must be above 2"),
        (
            {"sampler": "tpe", "budget": {"steps": 6, "batch_size": 4, "seeds": 40, "trials": 2}},
            "precision = 0.008: needs sampler: grid",
        ),
    ],
)
def test_a_bad_precision_is_refused_in_one_line(precise_dict: MakeStudy, changes: dict[str, Any], said: str) -> None:
    with refusal(said, kind=ConfigError):
        StudySpec.from_dict(precise_dict(**changes))

"""Sweeps that add seeds: counts, status, and what is left of one that was killed."""

from __future__ import annotations

from pathlib import Path

from growth_data import alternating, record, rounds
from study_data import queues, states
from tiny_runs import MakeStudy

from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import StudySpec
from lit_mult.study.status import study_status
from lit_mult.study.sweep import sweep


def test_a_sweep_that_is_killed_in_a_round_is_taken_over(precise_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(precise_dict()), StudyFolder(tmp_path)
    planned, first, second, _ = rounds(spec, alternating)
    for cell in planned.values():
        record(cell, alternating).write(folder.record(cell.id))
    one, other = queues(spec, folder, "one", "other")
    assert (one.counts().cells, one.counts().waiting) == (20 + 12, 12)
    assert study_status(tmp_path, retries=3).cells == 20 + 12

    taken = [one.next() for _ in range(5)]  # and then it is killed
    assert {ticket.cell.id for ticket in taken if ticket} < first.keys()
    while (ticket := other.next()) is not None:
        made = record(ticket.cell, alternating)
        made.write(folder.record(ticket.cell.id))
        other.complete(ticket, made)

    assert {path.stem for path in folder.records()} == planned.keys() | first.keys()
    assert states(folder.journal) == {"COMPLETE": 20 + 12}
    other.refresh()
    (third,) = queues(spec, folder, "third")
    for queue in (other, third):
        assert (queue.counts().cells, queue.counts().waiting) == (20 + 12 + 24, 24)
        ticket = queue.next()
        assert ticket is not None
        assert ticket.cell.id in second
    status = study_status(tmp_path, retries=3)
    assert (status.cells, status.waiting) == (20 + 12 + 24, 24)


def test_no_seeds_are_added_past_a_failed_cell(precise_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(precise_dict()), StudyFolder(tmp_path)
    failed, *others = rounds(spec, alternating)[0].values()
    for cell in others:
        record(cell, alternating).write(folder.record(cell.id))
    attempt = folder.attempts.begin(failed.id, 0)
    assert attempt is not None
    attempt.close("failed", "RuntimeError: out of luck")

    (queue,) = queues(spec, folder, "one")

    counts = queue.counts()
    assert (counts.cells, counts.failed, counts.waiting) == (20, 1, 0)
    assert queue.next() is None


def test_a_sweep_adds_seeds_and_is_resumed_for_free(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        seeds=[0, 1],
        questions=[{"of": "vectors", "against": "muP"}],
        precision=1e-9,
        budget={"steps": 2, "batch_size": 4, "seeds": 3},
    )
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path, workers=0)

    # 2 arms x 2 rates x 2 seeds, and a third seed at both rates of both arms.
    assert (result.ran, result.cells, result.failures) == (12, 12, {})
    cells = [made.cell for made in map(RunRecord.read, find_records(tmp_path)) if made.cell]
    assert sum(cell.refines for cell in cells) == 4
    assert states(tmp_path / "optuna.journal") == {"COMPLETE": 12}
    lost = next(path for path in find_records(tmp_path) if RunRecord.read(path).seed == 2)
    before = RunRecord.read(lost)
    lost.unlink()
    assert sweep(spec, tmp_path, workers=0).ran == 1
    assert (RunRecord.read(lost).cell, RunRecord.read(lost).final_loss) == (before.cell, before.final_loss)

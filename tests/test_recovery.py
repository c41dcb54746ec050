"""A study outlives kills, stops, damaged files and full disks, with the records that an undisturbed one has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from study_data import assert_undisturbed, outcomes, queues, states
from tiny_runs import MakeStudy

from lit_mult.errors import Interrupted, UserError
from lit_mult.layout import find_records
from lit_mult.study import lease as leases
from lit_mult.study import stack as stacks
from lit_mult.study import sweep as sweeping
from lit_mult.study.folder import StudyFolder
from lit_mult.study.job import AlreadyClaimed, Failed, Job, run_job
from lit_mult.study.lease import machine
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training import run


@pytest.fixture
def study_dict(small_study_dict: MakeStudy) -> MakeStudy:
    """A study of 2 arms x 2 rates: 4 cells of 12 steps, with a checkpoint every 4."""
    return partial(small_study_dict, {"train.checkpoint_every": 4}, budget={"steps": 12, "batch_size": 4})


def stop_in_the_third(spec: StudySpec, out: Path, monkeypatch: pytest.MonkeyPatch, step: int = 6) -> Path:
    """Sweep until the third cell has done so many steps, and return the work folder of that cell."""
    jobs: list[Job] = []

    def stop_there(job: Job, post: Any, stop: Any) -> Any:
        jobs.append(job)
        steps = iter(range(1, 100))
        return run_job(job, post, lambda: len(jobs) == 3 and next(steps) == step)

    with monkeypatch.context() as patch:
        patch.setattr(stacks, "run_job", stop_there)
        with pytest.raises(Interrupted):
            sweep(spec, out, workers=0)
    assert [path.stem for path in (jobs[2].work / "checkpoints").iterdir()] == [f"step={step}"]
    return jobs[2].work


# Damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _mark_a_weight_as_a_folder(path: Path) -> None:
    """Flip the one bit in the directory at the end of the archive for which torch reads a tensor of random memory."""
    content = bytearray(path.read_bytes())
    part = content.rindex(b"PK\x01\x02", 0, content.index(b"data/1", content.index(b"PK\x01\x02")))
    content[part + 38] ^= 16
    path.write_bytes(content)


def _encrypt(path: Path) -> None:
    """Flip the bit for which Python's zip reader asks for a password."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip_a_weight, _mark_a_weight_as_a_folder, _encrypt])
def test_a_damaged_checkpoint_is_set_aside_and_its_cell_run_again(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    work = stop_in_the_third(spec, tmp_path / "out", monkeypatch)
    damage(work / "checkpoints" / "step=6.ckpt")
    with pytest.warns(UserWarning, match=r"step=6\.ckpt: damaged, renamed"):
        result = sweep(spec, tmp_path / "out", workers=0)

    assert (result.ran, result.failures) == (2, {})
    assert_undisturbed(spec, tmp_path / "out")


def test_a_torn_checkpoint_is_passed_over(spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = stop_in_the_third(spec, tmp_path / "out", monkeypatch)
    shutil.copy(work / "checkpoints" / "step=6.ckpt", work / "checkpoints" / "step=8.ckpt")
    _truncate(work / "checkpoints" / "step=8.ckpt")

    with pytest.warns(UserWarning, match=r"step=8\.ckpt: damaged, renamed"):
        assert sweep(spec, tmp_path / "out", workers=0).ran == 2

    assert_undisturbed(spec, tmp_path / "out")


@pytest.mark.parametrize("content", ["", '{"schema_version": 1, "status": "comp', "\x00" * 50])
def test_a_damaged_record_is_set_aside_and_its_cell_run_again(spec: StudySpec, tmp_path: Path, content: str) -> None:
    sweep(spec, tmp_path / "out", workers=0)
    before = outcomes(tmp_path / "out")
    victim = find_records(tmp_path / "out")[1]
    victim.write_text(content)

    assert sweep(spec, tmp_path / "out", workers=0).ran == 1

    assert victim.with_name(f"{victim.name}.damaged").read_text() == content
    assert outcomes(tmp_path / "out") == before


def test_an_empty_attempt_is_one_that_died(spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = stop_in_the_third(spec, tmp_path / "out", monkeypatch)
    (attempt,) = (tmp_path / "out" / "attempts").iterdir()
    attempt.write_text("")

    assert sweep(spec, tmp_path / "out", workers=0).ran == 2

    assert not list((tmp_path / "out" / "attempts").iterdir())
    assert not work.exists()
    assert_undisturbed(spec, tmp_path / "out")


def test_a_torn_end_of_the_journal_is_cut_off(spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_the_third(spec, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out" / "optuna.journal"
    journal.write_bytes(journal.read_bytes()[:-20])

    assert sweep(spec, tmp_path / "out", workers=0).ran == 2

    assert [json.loads(line) for line in journal.read_text().splitlines()]
    assert states(journal) == {"COMPLETE": 4}


@pytest.mark.parametrize("line", [0, 4, -1])
def test_a_journal_with_a_bad_line_is_set_aside(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: int
) -> None:
    stop_in_the_third(spec, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out" / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b":", b";", 1)
    journal.write_bytes(b"".join(lines))

    assert sweep(spec, tmp_path / "out", workers=0).ran == 2

    assert journal.with_name("optuna.journal.damaged").read_bytes() == b"".join(lines)
    assert states(journal) == {"COMPLETE": 4}


# Deaths at the worst moment


def test_what_a_worker_leaves_that_dies_right_after_its_record(spec: StudySpec, tmp_path: Path) -> None:
    sweep(spec, tmp_path / "out", workers=0)
    folder = StudyFolder(tmp_path / "out")
    victim = find_records(tmp_path / "out")[2].stem
    folder.cell(victim).path.mkdir()
    (folder.cell(victim).path / "config.json").write_text("{}")
    (tmp_path / "out" / "attempts" / f"{victim}.1.json").write_text(json.dumps({"machine": machine(), "pid": 1}))
    folder.journal.unlink()  # its trial was not told, either

    assert sweep(spec, tmp_path / "out", workers=0).ran == 0
    assert not list((tmp_path / "out" / "attempts").iterdir())
    assert not list((tmp_path / "out" / "cells").iterdir())


def test_a_worker_that_dies_with_its_record_written_has_not_failed(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish_and_die(job: Job, post: Any, stop: Any) -> Failed:
        run_job(job, post)
        (job.attempts / f"{job.id}.1.json").touch()
        return Failed("its worker process died (killed by SIGKILL)", died=True)

    monkeypatch.setattr(stacks, "run_job", finish_and_die)
    result = sweep(spec, tmp_path / "out", workers=0, retries=0)

    assert (result.ran, result.failures) == (4, {})
    assert not list((tmp_path / "out" / "attempts").iterdir())


def test_workers_that_die_as_they_start_end_the_sweep(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = Failed("its worker process died (exit code 1)", died=True)
    monkeypatch.setattr(stacks, "run_job", lambda job, post, stop: died)

    with pytest.raises(UserError, match=r"died before it began a cell: its worker process died \(exit code 1\)"):
        sweep(spec, tmp_path / "out", workers=0)

    monkeypatch.undo()
    assert sweep(spec, tmp_path / "out", workers=0).ran == 4


def test_a_cell_that_was_sampled_by_a_sweep_that_was_killed_is_run_by_another(
    study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"low": 1e-3, "high": 1e-1, "log": True}
    budget = {"steps": 2, "batch_size": 4, "trials": 3}
    study = study_dict(arms={"muP": {}}, nuisance={"optim.lr": rates}, sampler="tpe", budget=budget)
    spec = StudySpec.from_dict(study)
    folder = StudyFolder(tmp_path / "out")
    sampled: list[str] = []

    def sample_one_elsewhere(job: Job, post: Any, stop: Any) -> Any:
        outcome = run_job(job, post)
        if not sampled:
            (killed,) = queues(spec, folder, "killed")
            ticket = killed.next()
            assert ticket is not None
            sampled.append(ticket.cell.id)
        return outcome

    monkeypatch.setattr(stacks, "run_job", sample_one_elsewhere)
    assert sweep(spec, tmp_path / "out", workers=0).ran == 3

    assert sampled[0] in {path.stem for path in find_records(tmp_path / "out")}
    assert states(folder.journal) == {"COMPLETE": 3, "FAIL": 1}


def test_an_overtaken_cell_is_left_to_its_new_holder_until_that_dies(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[leases.Lease] = []
    ends: list[Any] = []

    def overtake(message: Any) -> bool:
        """Another machine has taken this process for dead; it writes its lease, and is never heard of again."""
        lease = held[0]
        if not ends and not lease.lost:
            assert lease.successor is not None
            lease.successor.write_text(json.dumps({"machine": "elsewhere/12345678", "pid": 1}))
            deadline = time.monotonic() + 10
            while not lease.lost and time.monotonic() < deadline:
                time.sleep(0.01)
        return False

    def hold(job: Job, post: Any, stop: Any) -> Any:
        ends.append(run_job(job, post if ends else overtake))
        return ends[-1]

    class Held(leases.Lease):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            held.append(self)

    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(sweeping, "_REFRESH_SECONDS", 0.1)
    monkeypatch.setattr("lit_mult.study.attempts.Lease", Held)
    monkeypatch.setattr(stacks, "run_job", hold)
    result = sweep(spec, tmp_path / "out", workers=0)

    assert isinstance(ends[0], AlreadyClaimed)
    assert (result.ran, result.failures) == (4, {})
    assert states(tmp_path / "out" / "optuna.journal") == {"COMPLETE": 4}
    assert_undisturbed(spec, tmp_path / "out")


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_the_last_validation_is_a_stop_on_request(
    tiny: Callable[..., Any], tmp_path: Path, number: signal.Signals, end: type[BaseException]
) -> None:
    """Where Lightning alone listens, which makes an exit of the process of either."""

    class Kill(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.state.fn == TrainerFn.VALIDATING:
                os.kill(os.getpid(), number)

    config = tiny({"train.eval_every": 5, "data.val_windows": 64})
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(end):
            run.run(config, tmp_path / "out", callbacks=[Kill()])
    finally:
        signal.signal(signal.SIGINT, previous)

    again = run.run(config, tmp_path / "out")
    assert again.val_curve == run.run(config, tmp_path / "whole").val_curve

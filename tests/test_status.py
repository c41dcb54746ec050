"""`lit-mult status` and `lit-mult preset`: what a folder says of its study."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import MakeStudy

from lit_mult.cli import main
from lit_mult.errors import Interrupted, UserError
from lit_mult.study import stack as stacks
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import StudySpec
from lit_mult.study.status import study_status
from lit_mult.study.sweep import sweep


def test_the_status_of_a_study_under_way(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [cell.id for point in spec.points() for n in point.grid() for cell in [point.cell(n, 0)]]
    real = stacks.run_job

    def stop_after_two(job: Any, post: Any, stop: Any) -> Any:
        if len(list((tmp_path / "records").glob("*.json"))) == 2:
            raise Interrupted
        return real(job, post, stop)

    monkeypatch.setattr(stacks, "run_job", stop_after_two)
    with pytest.raises(Interrupted):
        sweep(spec, tmp_path, workers=0)
    folder = StudyFolder(tmp_path)
    left = [cell for cell in ids if folder.finished(cell) is None]
    for outcome, cell in zip(("failed", "stopped"), left, strict=False):
        lease = folder.attempts.begin(cell, 0)
        assert lease is not None
        lease.close(outcome, "RuntimeError: out of luck")
    checkpoints = folder.cell(left[1]).path / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step=4.ckpt").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty zip archive
    running = folder.attempts.begin(left[2], 0)
    assert running is not None
    me = folder.join()

    status = study_status(tmp_path, retries=3)

    assert (status.cells, status.ended, status.waiting) == (10, {"completed": 2}, 6)
    assert status.failed == {left[0]: "RuntimeError: out of luck"}
    assert status.interrupted == {left[1]: 4}
    assert [attempt.cell for attempt in status.running] == [left[2]]
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("tiny: 10 cells: 6 waiting, 1 running, 2 completed, 1 failed\n  sweep on ")
    assert f"failed {left[0]}: RuntimeError: out of luck" in printed
    assert f"waiting {left[1]}: interrupted, resumes from step 4" in printed
    assert main(["status", str(tmp_path), "--json"]) == 0
    for_programs = json.loads(capsys.readouterr().out)
    (attempt,), (by,) = for_programs.pop("running"), for_programs.pop("sweeps")
    assert for_programs == {
        "study": "tiny",
        "cells": 10,
        "waiting": 6,
        "ended": {"completed": 2},
        "interrupted": {left[1]: 4},
        "failed": {left[0]: "RuntimeError: out of luck"},
        "damaged": [],
    }
    assert attempt == {name: getattr(status.running[0], name) for name in attempt}
    assert (attempt["cell"], attempt["pid"], by["pid"]) == (left[2], os.getpid(), os.getpid())
    running.close("stopped")
    me.close("done")
    torn = folder.record(left[0])
    torn.write_text("{")
    status = study_status(tmp_path, retries=3)
    assert (status.running, status.ended["damaged"], status.damaged) == ([], 1, [torn])
    assert f"  damaged {torn}: the next sweep sets it aside and trains the cell anew" in status.lines()
    with pytest.raises(UserError, match="holds no study"):
        study_status(tmp_path / "records", retries=3)


def test_a_tuned_preset_goes_from_study_to_study(
    study_dict: MakeStudy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tuning = study_dict(
        name="tuning",
        arms={"muP": {"multipliers": "fixed"}},
        factors={"model.d_model": [8]},
        nuisance={"optim.lr": {"low": 2**-9, "high": 2**-3, "log": True}},
        search_multipliers=True,
        sampler="tpe",
        start=[{"optim.lr": 2**-6}],
        seeds=[100],
        budget={"steps": 6, "batch_size": 4, "trials": 4},
    )
    compare = study_dict(
        arms={"muP": {"multipliers": "fixed"}, "tuned": {"multipliers": "fixed", "parametrization.preset": "tuned"}},
        presets={"tuned": None},
        seeds=[0, 1],
    )
    Path("tuning.yaml").write_text(yaml.safe_dump(tuning))
    Path("compare.yaml").write_text(yaml.safe_dump(compare))

    assert main(["sweep", "tuning.yaml", "--workers", "0"]) == 0
    assert main(["preset", "results/tuning", "-o", "tuned.yaml"]) == 0
    assert "nats per token (default preset" in capsys.readouterr().out
    assert "must be given with --preset" in refused("sweep", "compare.yaml", "--workers", "0")
    assert main(["sweep", "compare.yaml", "--preset", "tuned.yaml", "--workers", "0"]) == 0

    report = Path("results/tiny/report.md").read_text()
    assert "## Cost" in report
    assert Path("results/tiny/figures/loss_vs_compute.png").is_file()
    refused("preset", "results/tiny", "-o", "again.yaml")
    assert not Path("again.yaml").exists()


def test_a_run_is_stopped_by_a_callable_and_goes_on(tiny: Any, tmp_path: Path) -> None:
    from lit_mult.training.run import run

    config = tiny()
    steps: list[int] = []
    with pytest.raises(Interrupted):
        run(config, tmp_path / "a", on_progress=lambda *at: steps.append(at[0]), should_stop=lambda: len(steps) > 1)

    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step=4.ckpt"]
    assert run(config, tmp_path / "a").final_loss == run(config, tmp_path / "b").final_loss

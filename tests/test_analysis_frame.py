"""Loading of run records, and the helper that makes synthetic ones for the other analysis tests."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from record_data import INITIAL_LOSS, make_record
from refusals import refusal

from lit_mult.analysis.frame import load_curves, load_records
from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.layout import StudyPaths
from lit_mult.schema import CellInfo, StudyPlan, Tuning

ARM_KINDS = {"muP": "none", "scalars": "scalar", "vectors": "vector"} | dict.fromkeys(
    ("untuned", "muP-tuned", "fixed"), "fixed"
)


def write_run(
    folder: Path,
    loss: float | None,
    *,
    arm: str = "muP",
    optimizer: str | None = "adamw",
    width: int = 64,
    lr: float = 2**-6,
    seed: int = 0,
    cell: str | None = None,
    factors: dict[str, Any] | None = None,
    nuisance: dict[str, Any] | None = None,
    sampler: str = "grid",
    added: bool = False,
    refines: bool = False,
    **changes: Any,
) -> Path:
    """Write one record of a study; loss None: diverged, or pruned with `status="pruned"`."""
    factors = {"model.d_model": width, **({"optimizer": optimizer} if optimizer else {}), **(factors or {})}
    nuisance = {"optim.lr": lr, "seed": seed, **(nuisance or {})}
    config = RunConfig(multipliers=ARM_KINDS[arm]).with_overrides(factors | nuisance)
    cell = cell or f"{arm}-{optimizer}-{width}-{lr:g}-{seed}"
    where = {"arm": arm, "sampler": sampler, "factors": factors, "nuisance": nuisance, "added": added}
    where["refines"] = refines
    path = folder / "records" / f"{cell}.json"
    make_record(config, loss, **{"cell": CellInfo(study="demo", cell=cell, **where), **changes}).write(path)
    return path


def write_study(
    folder: Path, cells: int, title: str = "A demonstration", spec: Mapping[str, Any] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"name": "demo", "title": title, "cells": cells, "more": [1, 2], **({"spec": spec} if spec else {})}
    (folder / "study.json").write_text(json.dumps(plan))


def tuning(**changes: Any) -> dict[str, Any]:
    """What a tuning study leaves in a preset."""
    return {
        "study": "tune", "trials": 60, "completed": 40, "pruned": 15, "diverged": 5, "tokens": 50_000, "flops": 1e8,
        "seconds": 40.0, "base_d_model": 64, "steps": 200, "batch_size": 8, "seq_len": 128, "lr": 0.01,
        "best_loss": 1.9, "default_loss": 2.0, "seeds": [0], "tier": "FULL", "git_commit": None, "corpus_hash": "abc",
        **changes,
    }  # fmt: skip


def tuned_spec(**tunings: dict[str, Any] | None) -> dict[str, Any]:
    """Part of a study's file: muP, the same with the preset `ours` (optimizer -> its tuning), and vectors."""
    ours = {
        "name": "ours",
        "optimizers": {name: {"lr": {"q_proj": 2.0}, "tuning": tuning} for name, tuning in tunings.items()},
    }
    return {
        "arms": {
            "muP": {"multipliers": "fixed"},
            "muP-tuned": {"multipliers": "fixed", "parametrization.preset": "ours"},
            "vectors": {"multipliers": "vector"},
        },
        "presets": {"ours": ours},
    }


def read_study(folder: Path) -> StudyPlan | None:
    return StudyPlan.read(StudyPaths(folder).plan)


def test_a_row_holds_the_scalars_and_the_factors_of_its_record(tmp_path: Path) -> None:
    write_study(tmp_path, cells=2)
    path = write_run(tmp_path, 2.5, arm="vectors", optimizer="muon", width=128, lr=0.01, seed=3)
    write_run(tmp_path, None, arm="muP", factors={"optim.weight_decay": 0.2}, nuisance={"optim.betas": [0.9, 0.98]})
    frame = load_records(tmp_path)
    assert read_study(tmp_path) == StudyPlan(name="demo", title="A demonstration", cells=2)
    plain, vectors = frame.to_dict("records")  # no multipliers come before vectors
    expected = {
        "label": "vectors · Muon", "setting": "Muon", "variant": "", "arm": "vectors", "optimizer": "muon",
        "d_model": 128, "model.d_model": 128, "lr": 0.01, "optim.lr": 0.01, "seed": 3, "status": "completed",
        "final_loss": 2.5, "initial_loss": INITIAL_LOSS, "planned_tokens": 300 * 16 * 128, "parameters_total": 1000,
        "corpus_hash": "abc", "git_commit": "c0ffee", "path": str(path), "versions": "python 3.11.7, torch 2.13.0",
    }  # fmt: skip
    assert {name: vectors[name] for name in expected} == expected
    assert plain["label"] == "muP · AdamW, weight_decay=0.2"
    assert plain["nuisance"] == "betas=[0.9, 0.98]"
    assert math.isnan(plain["final_loss"])
    assert not frame["reference"].any()  # every arm has one lr: none is the odd one out


def test_an_arm_at_one_lr_among_sweeps_is_a_reference_and_comes_first(tmp_path: Path) -> None:
    for lr in (0.01, 0.02):
        write_run(tmp_path, 2.0, lr=lr)
    write_run(tmp_path, 3.0, arm="untuned")
    assert load_records(tmp_path)[["arm", "reference"]].to_numpy().tolist() == [
        ["untuned", True], ["muP", False], ["muP", False],
    ]  # fmt: skip


def test_a_pruned_run_has_no_final_loss(tmp_path: Path) -> None:
    write_run(tmp_path, None, status="pruned", steps=20)
    row = load_records(tmp_path).to_dict("records")[0]
    assert (row["status"], row["steps"]) == ("pruned", 20)
    assert math.isnan(row["final_loss"])
    assert math.isnan(row["final_bits_per_byte"])


def test_added_runs_are_marked_and_make_no_reference_a_sweep(tmp_path: Path) -> None:
    for lr in (0.01, 0.02):
        write_run(tmp_path, 2.0, lr=lr)
    write_run(tmp_path, 3.0, arm="untuned", lr=0.01)
    write_run(tmp_path, 3.0, arm="untuned", lr=0.02, added=True)
    old = json.loads((path := write_run(tmp_path, 2.0, lr=0.04)).read_text())
    del old["cell"]["added"]  # a record from before there were added runs
    path.write_text(json.dumps(old))
    assert load_records(tmp_path)[["arm", "lr", "added", "reference"]].to_numpy().tolist() == [
        ["untuned", 0.01, False, True], ["untuned", 0.02, True, True],
        ["muP", 0.01, False, False], ["muP", 0.02, False, False], ["muP", 0.04, False, False],
    ]  # fmt: skip


def test_nuisance_factors_of_one_last_part_are_told_apart(tmp_path: Path) -> None:
    multipliers = {"parametrization.lr.q_proj": 2.0, "parametrization.forward.q_proj": 0.5, "optim.weight_decay": 0.2}
    write_run(tmp_path, 2.0, nuisance=multipliers)
    assert load_records(tmp_path)["nuisance"].tolist() == ["weight_decay=0.2, forward.q_proj=0.5, lr.q_proj=2.0"]


def test_a_study_knows_its_arms_and_how_their_presets_were_tuned(tmp_path: Path) -> None:
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning(seeds=[0, 1]), muon=None))
    study = read_study(tmp_path)
    assert study is not None
    assert study.arms["muP-tuned"] == {"multipliers": "fixed", "parametrization.preset": "ours"}
    assert study.arms["muP"]["parametrization.preset"] == "neutral"
    assert study.tuning == {"ours": {"adamw": Tuning(**tuning(seeds=[0, 1], d_model=64))}}
    # The width of the trials may be another than the base width of their rule; a base may set the preset of all arms.
    spec = tuned_spec(adamw=tuning(d_model=128)) | {"base": {"parametrization": {"preset": "theirs"}}}
    write_study(tmp_path, cells=1, spec=spec)
    study = read_study(tmp_path)
    assert study is not None
    assert study.tuning["ours"]["adamw"].d_model == 128
    assert [fields["parametrization.preset"] for fields in study.arms.values()] == ["theirs", "ours", "theirs"]


def test_a_lone_run_is_its_own_line(tmp_path: Path) -> None:
    path = write_run(tmp_path, 2.0, cell="x")
    record = json.loads(path.read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"cell": None}))
    assert load_records(tmp_path / "run")["label"].tolist() == ["none · AdamW"]
    assert read_study(tmp_path / "run") is None


def test_curves_are_read_only_for_the_runs_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0, seed=0)
    write_run(tmp_path, 2.5, seed=1)
    frame = load_records(tmp_path)
    assert "val_curve" not in frame
    curves = load_curves(frame[frame["seed"] == 1])
    assert curves[["seed", "split", "step", "loss"]].to_numpy().tolist() == [
        [1, "train", 10, 5.0], [1, "train", 20, 4.0], [1, "val", 0, 5.5], [1, "val", 20, 2.5],
    ]  # fmt: skip
    assert load_curves(frame[:0]).empty


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run records here; give the folder"):
        load_records(tmp_path)
    with pytest.raises(UserError, match="no run records here"):
        load_records(tmp_path / "missing")


def test_two_records_of_a_cell_are_refused_by_name(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 2.0, cell="same")
    second = write_run(tmp_path / "b", 2.1, cell="same")
    with refusal(str(first), str(second)):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text[:-20], "; run the sweep again, which sets the file aside and trains the cell anew"),
        (lambda text: "[1]", "not a JSON object"),
        (lambda text: "{}", "schema_version: None"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema_version: 9"),
        (lambda text: text.replace('"initial_loss"', '"start"'), "lacks 'initial_loss'"),
        (lambda text: text.replace('"final_loss": 2.0', '"final_loss": null'), "damaged run record"),
        (lambda text: text.replace('"completed"', '"running"'), "status 'running'"),
    ],
)
def test_a_damaged_record_is_named_with_its_problem(tmp_path: Path, damage: Any, problem: str) -> None:
    path = write_run(tmp_path, 2.0)
    path.write_text(damage(path.read_text()))
    with refusal(str(path), problem):
        load_records(tmp_path)


def test_a_torn_record_of_a_single_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"status"')
    with refusal(f"{path}: damaged, not JSON (", "; delete it and train the run again"):
        load_records(tmp_path)


def test_a_torn_record_is_named_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "record.json").write_text('{"status"')
    monkeypatch.chdir(tmp_path)
    with refusal("record.json: damaged, not JSON (", "; delete it and train the run again"):
        load_records(".")


def test_a_damaged_study_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"name": "x", "title": "y"}')
    with pytest.raises(UserError, match=r"study\.json: damaged study file \(cells: Field required\)"):
        read_study(tmp_path)
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw={"study": "tune"}))
    with pytest.raises(UserError, match=r"study\.json: damaged study file \(spec\..*\.adamw\.tuning\.trials: Field"):
        read_study(tmp_path)
    write_study(tmp_path, cells=1, spec={"arms": ["muP"]})
    with pytest.raises(UserError, match=r"study\.json: damaged study file"):
        read_study(tmp_path)


def test_the_analysis_needs_neither_torch_nor_a_display() -> None:
    code = (
        "import sys, lit_mult.analysis.report, lit_mult.analysis.plots\n"
        "bad = {'torch', 'lightning', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

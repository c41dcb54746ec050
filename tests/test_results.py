"""The committed results: complete, and their numbers recomputed from the records by code that shares nothing."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_mult.study.files import load_study
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import canonical

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "reference"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((FOLDER / "records").glob("*.json"))]


def test_the_study_is_complete_and_is_the_one_that_ships(records: list[dict[str, Any]]) -> None:
    spec = load_study("reference")

    assert canonical(StudyFolder(FOLDER).spec()) == canonical(spec)
    assert len(records) == spec.n_cells
    assert len({record["cell"]["cell"] for record in records}) == spec.n_cells
    # Quick is the same study on its first seed.
    quick = yaml.safe_load((ROOT / "sweeps" / "quick.yaml").read_text())
    reference = yaml.safe_load((ROOT / "sweeps" / "reference.yaml").read_text())
    assert reference == quick | {"name": "reference", "seeds": [0, 1, 2]}


def test_every_record_says_where_it_comes_from(records: list[dict[str, Any]]) -> None:
    assert len({record["corpus_hash"] for record in records}) == 1
    assert len({record["git_commit"] for record in records}) == 1
    assert all(len(record["git_commit"]) == 40 for record in records)  # and not +dirty


def test_sensitivities_agree_with_a_recomputation_to_1e_9(records: list[dict[str, Any]]) -> None:
    curves: dict[tuple[str, str, int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for record in records:
        config = record["config"]
        key = (record["cell"]["arm"], config["optimizer"], config["model"]["d_model"], record["seed"])
        loss = math.inf if record["final_loss"] is None else record["final_loss"]
        curves[key].append((config["optim"]["lr"], loss, record["initial_loss"]))
    recomputed = {}
    for key, curve in curves.items():
        losses = [min(loss, initial) for _, loss, initial in curve]
        recomputed[key] = sum(losses) / len(losses) - min(losses)

    compared = 0
    with (FOLDER / "tables" / "points.csv").open() as file:
        for row in csv.DictReader(file):
            key = (row["arm"], row["optimizer"], int(row["d_model"]), int(row["seed"]))
            assert float(row["best_loss"]) == min(loss for _, loss, _ in curves[key])
            if row["sensitivity"]:
                assert float(row["sensitivity"]) == pytest.approx(recomputed[key], abs=1e-9)
                compared += 1
    assert compared == 2 * 2 * 3 * 3  # arms x optimizers x widths x seeds; the reference arm has one rate


def test_tuned_arms_beat_the_untuned_standard_one(records: list[dict[str, Any]]) -> None:
    best: dict[tuple[str, str, int, int], float] = defaultdict(lambda: math.inf)
    for record in records:
        config = record["config"]
        key = (record["cell"]["arm"], config["optimizer"], config["model"]["d_model"], record["seed"])
        best[key] = min(best[key], record["final_loss"])
    for (arm, *place), loss in best.items():
        if arm != "standard":
            assert loss < best["standard", *place], (arm, *place)

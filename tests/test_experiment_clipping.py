"""Clipping: planted norms and losses, the gain that is lost or kept, and runs that lack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from experiment_data import evidence

from lit_mult.analysis import style
from lit_mult.analysis.experiments import clipping
from lit_mult.analysis.experiments.evidence import Evidence
from lit_mult.analysis.findings import Findings

LOSSES = {"none": 3.0, "excluded": 2.8, "included": 2.98}


def study(
    folder: Path, losses: Mapping[str, float] = LOSSES, norms: tuple[float, float] = (8.0, 2.0), seeds: int = 3
) -> Evidence:
    """Losses that all seeds shift alike; norms with and without multipliers, a tenth of it after the first steps."""
    cells = []
    for optimizer in ("adamw", "muon"):
        for arm, loss in losses.items():
            for seed in range(seeds):
                path = folder / f"{optimizer}-{arm}-{seed}.json"
                final = loss + seed / 10 + seed * (arm == "included") / 1000
                curve = [(0, 6.0), (50, final + 0.5), (100, final)]
                path.write_text(json.dumps({"schema_version": 1, "train_curve": [], "val_curve": curve}))
                run = {
                    "arm": arm,
                    "optimizer": optimizer,
                    "seed": seed,
                    "final_loss": final,
                    "path": str(path),
                    "label": arm,
                }
                readings = [
                    (step, f"gradient_norm_{what}_multipliers", "model", norm * (1 if step <= 10 else 0.1))
                    for step in range(0, 101, 10)
                    for what, norm in zip(
                        ("with", "without"), (norms[0] if arm != "none" else norms[1], norms[1]), strict=True
                    )
                ]
                cells.append((run, readings))
    return evidence(cells)


def outcomes(found: Findings) -> list[str]:
    return list(found.csvs["verdicts"]["outcome"])


def test_a_lost_gain_is_found(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path))
    assert outcomes(found) == ["reproduced"] * 10
    assert list(found.csvs["verdicts"]["value"][:5]) == pytest.approx([0.181, -0.2, -0.019 + 0.1, 8, 4])
    gain = found.shown["losses_minus_those_of_none"]
    assert gain[["optimizer", "arm", "final loss"]].to_numpy().tolist() == [
        ["AdamW", "excluded", "-0.2000"], ["AdamW", "included", "-0.0190"],
        ["Muon", "excluded", "-0.2000"], ["Muon", "included", "-0.0190"],
    ]  # fmt: skip
    shown = found.shown["early_gradient_norms"].query("optimizer == 'Muon' and norm == 'ratio'")
    assert dict(zip(shown["arm"], shown["geometric mean"], strict=True)) == {
        "none": "1.0000", "excluded": "4.0000", "included": "4.0000",
    }  # fmt: skip
    assert style.save(found.figures["clipping"])["png"][:4] == b"\x89PNG"


def test_a_kept_gain_and_small_norms_contradict(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path, {"none": 3.0, "excluded": 3.1, "included": 2.9}, norms=(1.1, 1.0)))
    assert outcomes(found) == ["contradicted"] * 10


def test_arms_that_are_equal_to_the_bit_reproduce_no_difference(tmp_path: Path) -> None:
    made = study(tmp_path)
    made.runs["final_loss"] = 3.0
    assert outcomes(clipping.findings(made))[:3] == ["contradicted"] * 3


def test_what_lacks_is_no_crash(tmp_path: Path) -> None:
    alone = clipping.findings(study(tmp_path, {"none": 3.0}, seeds=1))
    assert set(outcomes(alone)) == {"undecided"}
    assert "png" in style.save(alone.figures["clipping"])
    diverged = study(tmp_path, LOSSES | {"included": float("nan")})
    diverged.runs.loc[diverged.runs["final_loss"].isna(), "status"] = "diverged"
    found = clipping.findings(diverged)
    assert outcomes(found)[:5] == ["undecided", "reproduced", "undecided", "reproduced", "reproduced"]
    assert "6 of 18 runs diverged or were pruned" in found.warnings[0]

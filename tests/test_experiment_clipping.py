"""Clipping: planted norms and losses, the gain that is lost or kept, and runs that lack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from experiment_data import evidence, outcomes, saved
from test_analysis_frame import write_run

from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.experiments import clipping
from lit_mult.errors import UserError

LOSSES = {"none": 3.0, "excluded": 2.8, "included": 2.98}


def study(
    folder: Path,
    losses: Mapping[str, float] = LOSSES,
    norms: tuple[float, float] = (8.0, 2.0),
    seeds: int = 3,
    clip: float | None = 1.0,
) -> Evidence:
    """Losses that all seeds shift alike; norms with and without multipliers, a tenth of it after the first steps."""
    cells = []
    for optimizer in ("adamw", "muon"):
        for arm, loss in losses.items():
            for seed in range(seeds):
                final = loss + seed / 10 + seed * (arm == "included") / 1000
                lost = math.isnan(final)
                curve = [(0, 6.0)] if lost else [(0, 6.0), (50, final + 0.5), (100, final)]
                nuisance, cell = {"optim.clip": clip}, f"{optimizer}-{arm}-{seed}"
                path = write_run(
                    folder, None if lost else final, arm="muP", cell=cell, nuisance=nuisance, val_curve=curve
                )
                run = {"arm": arm, "optimizer": optimizer, "seed": seed, "path": str(path), "label": arm}
                readings = [
                    (step, f"gradient_norm_{what}_multipliers", "model", norm * (1 if step <= 10 else 0.1))
                    for step in range(0, 101, 10)
                    for what, norm in zip(
                        ("with", "without"), (norms[0] if arm != "none" else norms[1], norms[1]), strict=True
                    )
                ]
                cells.append((run | {"final_loss": final}, readings))
    return evidence(cells)


def test_a_lost_gain_is_found(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path))
    assert outcomes(found) == ["reproduced"] * 10
    assert list(found.tables["verdicts"]["value"][:5]) == pytest.approx([0.181, -0.2, -0.019 + 0.1, 8, 4])
    gain = found.display_tables["losses_minus_those_of_none"]
    assert gain[["optimizer", "arm", "final loss"]].to_numpy().tolist() == [
        ["AdamW", "excluded", "-0.2000"], ["AdamW", "included", "-0.0190"],
        ["Muon", "excluded", "-0.2000"], ["Muon", "included", "-0.0190"],
    ]  # fmt: skip
    shown = found.display_tables["early_gradient_norms"].query("optimizer == 'Muon' and norm == 'ratio'")
    assert dict(zip(shown["arm"], shown["geometric mean"], strict=True)) == {
        "none": "1.0000", "excluded": "4.0000", "included": "4.0000",
    }  # fmt: skip
    # Early the factors are 1/8 and 1/2, on 2 of 11 steps, and 1 on the others, where the norm is 0.8 or 0.2.
    clipped = found.display_tables["clipping"].query("optimizer == 'Muon' and arm == 'included'")
    assert list(clipped["mean"]) == [f"{2 / 11:.4f}", f"{2 / 11 * math.log(4):.4f}"]
    assert list(found.figures) == ["clipping"]
    saved(found)


def test_clip_factors_that_hardly_differ_say_nothing_of_the_losses(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path, norms=(8.0, 7.9)))
    assert outcomes(found)[:5] == ["not at this scale", "reproduced", "not at this scale", "reproduced", "contradicted"]
    assert "which these runs do not test" in found.text


def test_the_level_is_that_of_the_runs(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path, clip=16.0))
    assert list(found.tables["verdicts"]["value"][3:5]) == pytest.approx([0.5, 4])
    assert outcomes(found)[:5] == ["not at this scale", "reproduced", "not at this scale", "contradicted", "reproduced"]


def test_runs_that_are_not_clipped_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.clip: must be one number"):
        clipping.findings(study(tmp_path, clip=None))


def test_a_kept_gain_and_small_norms_contradict(tmp_path: Path) -> None:
    found = clipping.findings(study(tmp_path, {"none": 3.0, "excluded": 3.1, "included": 2.9}))
    assert outcomes(found)[:3] == ["contradicted"] * 3
    small = clipping.findings(study(tmp_path / "small", norms=(1.1, 1.0)))
    assert outcomes(small)[3:5] == ["contradicted"] * 2


def test_arms_that_are_equal_to_the_bit_reproduce_no_difference(tmp_path: Path) -> None:
    made = study(tmp_path)
    made.runs["final_loss"] = 3.0
    assert outcomes(clipping.findings(made))[:3] == ["contradicted"] * 3


def test_what_lacks_is_no_crash(tmp_path: Path) -> None:
    alone = clipping.findings(study(tmp_path, {"none": 3.0}, seeds=1))
    assert set(outcomes(alone)) == {"undecided"}
    saved(alone)
    diverged = study(tmp_path / "diverged", LOSSES | {"included": float("nan")})
    diverged.runs.loc[diverged.runs["final_loss"].isna(), "status"] = "diverged"
    found = clipping.findings(diverged)
    assert outcomes(found)[:5] == ["undecided", "reproduced", "undecided", "reproduced", "reproduced"]
    assert "6 of 18 runs diverged or were pruned" in found.warnings[0]

"""Tiers of tuned multipliers with vectors and without: planted losses at their best rates, and gaps along training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from experiment_data import outcomes, saved
from test_analysis_frame import write_run

from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.experiments import ablation
from lit_mult.analysis.frame import load_records
from lit_mult.errors import UserError

TIERS = ("NONE", "LR", "LRWD", "FULL")
FIXED = (2.2, 2.1, 2.05, 2.0)
VECTORS = (2.001, 1.95, 1.94, 1.93)
GAP = {0: 0.0, 50: -0.5, 100: -0.02, 150: -0.05, 200: -0.08, 250: -0.2, 300: None}
"""Step -> vectors - fixed; at the last step that of the final losses. The rate decays from step 250 on."""


def study(
    folder: Path,
    fixed: Sequence[float] = FIXED,
    vectors: Sequence[float] = VECTORS,
    optimizers: Sequence[str] = ("adamw", "muon"),
    tiers: Sequence[str] = TIERS,
    seeds: int = 3,
    best: float = 2**-6,
) -> Evidence:
    """Arms that are best at one rate, with final losses by tier."""
    for optimizer in optimizers:
        for tier in tiers:
            base = fixed[TIERS.index(tier)]
            for arm, losses in (("fixed", fixed), ("vectors", vectors)):
                for seed in range(seeds):
                    for lr in (2**-7, 2**-6, 2**-5):
                        final = losses[TIERS.index(tier)] + seed / 1000 * (arm == "vectors") + (lr != best) / 2
                        curve = [
                            (step, final if step == 300 else 4 + base - step / 100 + (gap or 0) * (arm == "vectors"))
                            for step, gap in GAP.items()
                        ]
                        name = f"{optimizer}-{tier}-{arm}-{seed}-{lr}"
                        where = {"factors": {"parametrization.tier": tier}, "val_curve": curve, "cell": name}
                        write_run(folder, final, arm=arm, optimizer=optimizer, lr=lr, seed=seed, **where)
    return Evidence(folder, load_records(folder))


def test_what_the_paper_saw_is_found(tmp_path: Path) -> None:
    found = ablation.findings(study(tmp_path))
    assert outcomes(found) == ["reproduced"] * 16
    assert list(found.tables["verdicts"]["value"][:8]) == pytest.approx(
        [-0.198, -0.149, -0.109, -0.069, 0.002, -0.051, -0.18, -0.13125 + 0.2]
    )
    assert "at step 250 - at step 100" in found.tables["verdicts"]["statistic"][6]
    shown = found.display_tables["vectors_minus_fixed"]
    assert shown[["optimizer", "tier", "final loss"]].to_numpy().tolist()[:4] == [
        ["AdamW", "NONE", "-0.1980"], ["AdamW", "LR", "-0.1490"], ["AdamW", "LRWD", "-0.1090"],
        ["AdamW", "FULL", "-0.0690"],
    ]  # fmt: skip
    assert list(found.display_tables["best_losses"]["lr"].unique()) == ["2^-6.00"]
    assert not found.warnings
    assert set(found.figures) == {"tiers", "gap"}
    saved(found)


def test_the_opposite_contradicts(tmp_path: Path) -> None:
    found = ablation.findings(study(tmp_path, vectors=(2.4, 2.45, 2.4, 2.3), optimizers=["muon"]))
    assert outcomes(found)[:6] == ["contradicted"] * 6


def test_a_difference_of_more_than_1_percent_of_the_perplexity_is_not_equal(tmp_path: Path) -> None:
    found = ablation.findings(study(tmp_path, vectors=(2.014, 1.95, 1.94, 1.93), optimizers=["muon"]))
    verdict = found.tables["verdicts"].iloc[4]
    assert verdict["statistic"].endswith("(1 % of the perplexity counts as equal)")
    assert (verdict["value"], verdict["outcome"]) == (pytest.approx(0.015), "contradicted")  # 0.014, 0.015, 0.016


def test_a_best_rate_at_the_edge_is_a_warning(tmp_path: Path) -> None:
    found = ablation.findings(study(tmp_path, best=2**-5, optimizers=["adamw"], tiers=["NONE"]))
    assert found.warnings == [
        f"best learning rate 2^-5.00 at the edge of those tried: {arm} · AdamW, tier=NONE"
        for arm in ("fixed", "vectors")
    ]


def test_what_lacks_is_no_crash(tmp_path: Path) -> None:
    single = ablation.findings(study(tmp_path, tiers=["LR"], seeds=1, optimizers=["adamw"]))
    assert set(outcomes(single)) == {"undecided"}
    write_run(tmp_path / "one", 2.0, arm="fixed", factors={"parametrization.tier": "NONE"})
    write_run(tmp_path / "one", None, arm="vectors", factors={"parametrization.tier": "NONE"})
    alone = ablation.findings(Evidence(tmp_path / "one", load_records(tmp_path / "one")))
    assert set(outcomes(alone)) == {"undecided"}
    assert "1 of 2 runs diverged or were pruned" in alone.warnings[0]
    for found in (single, alone):
        saved(found)


def test_a_study_of_several_widths_is_refused(tmp_path: Path) -> None:
    for width in (32, 64):
        write_run(tmp_path, 2.0, arm="fixed", width=width, factors={"parametrization.tier": "NONE"})
    with pytest.raises(UserError, match=r"does not vary model\.d_model"):
        ablation.findings(Evidence(tmp_path, load_records(tmp_path)))

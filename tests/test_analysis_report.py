"""The report: complete, the same bytes each time, and honest about what it cannot say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from test_analysis_frame import write_run, write_study

from lit_mult.analysis import tables
from lit_mult.analysis.report import write_report
from lit_mult.errors import UserError

LRS = [2**-8, 2**-6, 2**-4]


def small_study(folder: Path, seeds: int, better: float = 0.1) -> None:
    for arm, gain in (("muP", 0.0), ("vectors", better)):
        for optimizer in ("adamw", "muon"):
            for width in (32, 64):
                for seed in range(seeds):
                    for lr, loss in zip(LRS, [3.0, 2.0, None if arm == "muP" else 2.6], strict=True):
                        shifted = None if loss is None else loss - gain + seed / 100
                        write_run(folder, shifted, arm=arm, optimizer=optimizer, width=width, lr=lr, seed=seed)
    write_study(folder, cells=24 * seeds)


def contents(paths: tuple[Path, ...]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def test_a_report_twice_is_the_same_bytes(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=2)
    first = write_report(tmp_path)
    before = contents(first.paths)
    second = write_report(tmp_path)
    assert contents(second.paths) == before
    assert (first.text, first.warnings) == (second.text, second.warnings)
    figures = ("loss_vs_lr", "sensitivity", "adam_vs_muon", "optimum_drift")
    assert {f"{name}.{ending}" for name in figures for ending in ("png", "svg")} < set(before)
    assert not list(tmp_path.rglob(".*"))  # no scratch files left
    page = before["report.md"].decode()
    assert all(f"](figures/{name}.png)" in page for name in figures)
    assert str(tmp_path) not in page


def test_the_report_ranks_by_intervals(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=2)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert (
        "Best loss, vectors - muP (AdamW, all widths, 2 seeds): -0.1000, [-0.1000, -0.1000]: **vectors is better**"
        in page
    )
    assert "weak evidence" in page
    assert "Best loss, Muon - AdamW (muP, all widths, 2 seeds): +0.0000, [0.0000, 0.0000]: no difference shown." in page
    assert report.warnings == (
        "8 of 48 runs diverged; they count as their initial loss in the sensitivity",
        "2 seeds: intervals over fewer than 5 are too narrow (see How to read it)",
    )


def test_one_seed_ranks_nothing(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=1)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert "1 seed: no interval can be given" in report.warnings
    assert "is better" not in page.split("## Warnings")[0]
    assert "they rank nothing" in page


def test_a_single_width_optimizer_arm_and_run_make_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0)
    names = [path.name for path in write_report(str(tmp_path)).paths]
    assert "adam_vs_muon.png" not in names
    assert "optimum_drift.png" not in names
    assert "loss_vs_lr.svg" in names


def test_a_study_in_which_everything_diverged_makes_a_report(tmp_path: Path) -> None:
    for lr in LRS:
        write_run(tmp_path, None, lr=lr)
    report = write_report(tmp_path)
    assert (
        "doubtful or no sensitivity (no run ended below the initial loss): muP · AdamW, d = 64, seed 0"
        in report.warnings
    )


def test_what_stands_against_the_results_is_said(tmp_path: Path) -> None:
    write_study(tmp_path, cells=7)
    for lr, loss in zip(LRS, [3.0, 2.0, 1.9], strict=True):
        write_run(tmp_path, loss, lr=lr)
    write_run(tmp_path, 2.0, seed=1, lr=LRS[0], corpus_hash="xyz", git_commit="beef+dirty")
    write_run(tmp_path, 2.0, seed=1, lr=LRS[1], nuisance={"train.steps": 7}, cell="short")
    warnings = "\n".join(write_report(tmp_path).warnings)
    for expected in (
        "5 of 7 planned runs",
        "optimum at the edge of the learning rates, so it may lie outside: muP · AdamW, d = 64, seed 0",
        "incomplete, no sensitivity (2 of 4 runs): muP · AdamW, d = 64, seed 1",
        "unequal corpora between runs to compare (AdamW): abc, xyz",
        "unequal token budgets",
        "runs of 2 git commits: beef+dirty, c0ffee",
        "tree with changes",
    ):
        assert expected in warnings


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [0.1 + 0.2, 1 / 3], "y": ["a,b", ""]})
    (tmp_path / "t.csv").write_text(tables.to_csv(table))
    assert pd.read_csv(tmp_path / "t.csv")["x"].tolist() == table["x"].tolist()


def test_markdown_and_text_tables() -> None:
    table = pd.DataFrame({"a": ["1", "22"], "b|c": ["x", "y|z"]})
    assert tables.to_markdown(table) == "| a | b\\|c |\n| --- | --- |\n| 1 | x |\n| 22 | y\\|z |\n"
    assert tables.to_text(table) == "a   b|c\n1   x\n22  y|z\n"
    assert tables.interval(float("nan"), float("nan"), 1) == "1 seed: no interval"


def test_an_unwritable_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0)
    (tmp_path / "tables").write_text("in the way")
    with pytest.raises(UserError, match="cannot write it"):
        write_report(tmp_path)


def test_the_report_says_what_sets_the_arms_apart(tmp_path: Path) -> None:
    for arm in ("muP", "vectors"):
        for lr in (2**-7, 2**-6, 2**-5):
            write_run(tmp_path, 2.0, arm=arm, lr=lr)

    text = next(path for path in write_report(tmp_path).paths if path.name == "report.md").read_text()

    assert "Arms differ in: `multipliers` (muP: none, vectors: vector); all else is the same" in text

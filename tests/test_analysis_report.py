"""The report: complete, the same bytes each time, and honest about what it cannot say."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
from test_analysis_frame import tuned_spec, tuning, write_run, write_study

from lit_mult.analysis import tables
from lit_mult.analysis.report import write_report
from lit_mult.cli import main
from lit_mult.config import Experiment
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


def test_a_style_changes_the_figures_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_study(tmp_path, seeds=2)
    before = contents(write_report(tmp_path).paths)
    assert main(["report", str(tmp_path), "--style", "talk", "--width", "column"]) == 0
    after = {name: (next(tmp_path.rglob(name))).read_bytes() for name in before}
    assert {Path(name).suffix for name in before if after[name] != before[name]} == {".png", ".svg"}
    assert main(["report", str(tmp_path), "--style", "slides"]) == 2
    assert "style" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_on_arms_without_decay_that_all_diverged_or_are_of_two_versions(tmp_path: Path) -> None:
    for arm in ("muP", "vectors"):
        for lr in LRS:
            for decay in (0.0, 0.1):
                factors = {"optim.weight_decay": decay}
                name = f"{arm}-{lr:g}-{decay}"
                path = write_run(tmp_path, None, arm=arm, lr=lr, factors=factors, cell=name)
                if arm == "muP":  # as before the config had this field
                    record = json.loads(path.read_text())
                    del record["config"]["parametrization"]["depth_rule"]
                    path.write_text(json.dumps(record))
    questions = {"questions": [{"of": "vectors", "against": "muP"}]}
    write_study(tmp_path, cells=12, spec={"arms": {"muP": {}, "vectors": {}}, **questions})
    made = write_report(tmp_path)
    assert "12 of 12 runs diverged; they count as their initial loss in the sensitivity" in made.warnings
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", get_args(Experiment))
def test_what_is_in_the_folder_of_experiments_is_one(name: str) -> None:
    assert callable(import_module(f"lit_mult.analysis.experiments.{name}").findings)


def test_a_study_of_no_known_experiment_names_those_that_are(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0)
    (tmp_path / "study.json").write_text('{"name": "x", "title": "", "cells": 1, "experiment": "magic"}')
    with pytest.raises(UserError, match="experiment magic: must be one of ablation, arena, brownian_overlay, "):
        write_report(tmp_path)


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
    assert {name.removesuffix(".md") for name in before if name.endswith(".md")} - {"report"} == {
        name.removesuffix(".tex") for name in before if name.endswith(".tex")
    }
    assert (
        before["summary.tex"]
        .decode()
        .startswith(f"% lit-mult report {tmp_path.name}\n% Git commits of the runs: c0ffee\n\\begin{{tabular}}")
    )
    assert str(tmp_path) not in page


def test_the_report_ranks_by_intervals(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=2)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert "Best loss, vectors - muP (AdamW, all widths, 2 seeds): -0.1000, [-0.1000, -0.1000]: vectors lower." in page
    assert "Best loss, Muon - AdamW (muP, all widths, 2 seeds): +0.0000, [0.0000, 0.0000]: no difference shown" in page
    assert "Lr sensitivity, Muon - AdamW (muP, all widths, 2 seeds): +0.0000, [0.0000, 0.0000]: not compared" in page
    assert "Answers to the declared questions" not in page
    assert report.warnings[0] == ("8 of 48 runs diverged; they count as their initial loss in the sensitivity")


def test_declared_questions_are_answered_first(tmp_path: Path) -> None:
    small_study(tmp_path, seeds=2)
    plan = json.loads((tmp_path / "study.json").read_text())
    plan["spec"] = {"questions": [{"of": "vectors", "against": "muP"}], "arms": {"muP": {}, "vectors": {}}}
    (tmp_path / "study.json").write_text(json.dumps(plan))
    report = write_report(tmp_path)
    answers = report.paths[-1].read_text().split("## ")[1]
    assert answers.startswith("Answers to the declared questions")
    sentence = (
        "- With vectors in place of muP (AdamW; widths 32, 64) the best loss is 0.1000 nats lower: 95 % interval "
    )
    assert sentence + "[-0.1000, -0.1000], 2 seeds, p < 0.0001 after Holm's correction." in answers
    assert "| vectors - muP | best loss | Muon; widths 32, 64 | 2 | -0.1000 |" in report.paths[-1].read_text()
    assert len(report.answers) == 2
    assert f"- {report.answers[0]}" in answers


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
        "best rate at the edge of the learning rates, so a better one may lie outside: muP · AdamW, d = 64, seed 0",
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


def test_the_report_of_a_tuning_study_is_sensible(tmp_path: Path) -> None:
    # 24 multipliers and a learning rate, sampled: 60 trials of each optimizer, of which 15 are pruned and 3 diverge.
    roles = ("embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"parametrization.{part}.{role}" for part in ("forward", "lr", "weight_decay") for role in roles]
    for optimizer in ("adamw", "muon"):
        for trial in range(60):
            status = {"status": "pruned"} if trial % 4 == 3 else {}
            loss = None if status or trial % 20 == 0 else 2 + (trial * 7 % 60) / 100
            nuisance = {name: 2 ** ((trial * 11 + place * 7) % 13 / 3 - 2) for place, name in enumerate(names)}
            where = {"optimizer": optimizer, "lr": 2 ** (-9 + (trial * 17 % 60) / 10), "cell": f"{optimizer}-{trial}"}
            write_run(tmp_path, loss, arm="muP-tuned", sampler="tpe", nuisance=nuisance, **where, **status)
    write_study(tmp_path, cells=120)

    report = write_report(tmp_path)

    page = report.paths[-1].read_text()
    assert report.warnings[:4] == (
        "6 of 120 runs diverged; they count as their initial loss in the sensitivity",
        "doubtful or no sensitivity (15 of 60 runs pruned): muP-tuned · AdamW, d = 64, seed 0",
        "doubtful or no sensitivity (15 of 60 runs pruned): muP-tuned · Muon, d = 64, seed 0",
        "1 seed: no interval can be given",
    )
    # Of the lowest losses, 2.00 is trial 0, which diverged, and 2.01 trial 43 (7 * 43 = 301), which was pruned; 2.02 is
    # trial 26 (182), which completed. Its rate is 2^(-9 + (26 * 17 % 60) / 10) = 2^-6.8.
    row = "muP-tuned · AdamW | 64 | 1 | 2.0200 | 1 seed: no interval | n/a | n/a | 2^-6.80 | 3 of 60 | 15 runs pruned |"
    assert row in page
    assert "- 30 of 120 runs were pruned: ended early by the study's pruner" in page
    assert "- Records: 120 of 120 planned" in page
    assert "q_proj" not in page
    assert "q_proj" not in (tmp_path / "figures" / "loss_vs_lr.svg").read_text()


def test_added_runs_are_no_planned_ones(tmp_path: Path) -> None:
    for lr, loss in zip(LRS, [3.0, 2.5, 2.0], strict=True):
        write_run(tmp_path, loss, lr=lr)
    for lr, loss in ((2**-2, 1.9), (1.0, 2.0)):
        write_run(tmp_path, loss, lr=lr, added=True)
    write_study(tmp_path, cells=4)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert report.warnings[:2] == ("3 of 4 planned runs have a record", "1 seed: no interval can be given")
    added = "2 runs are at learning rates that were added beyond an edge of the grid, or around an optimum"
    assert f"- Records: 3 of 4 planned\n- {added}\n" in page


def tuned_study(folder: Path) -> None:
    """Three arms, two widths, three seeds; muP-tuned uses a preset that was tuned for AdamW at width 64 on seed 0."""
    for arm, gain in (("muP", 0.0), ("muP-tuned", 0.2), ("vectors", 0.3)):
        for width in (32, 64):
            for seed in range(3):
                for lr, loss in zip(LRS, [3.0, 2.0, 2.6], strict=True):
                    shifted = loss - gain + seed / 100 - width / 1000
                    total = {"total": 20 * width, "non_embedding": 10 * width, "multipliers": 0}
                    write_run(folder, shifted, arm=arm, width=width, lr=lr, seed=seed, parameters=total)
    write_study(folder, cells=54, spec=tuned_spec(adamw=tuning()))


def test_a_study_with_a_tuned_preset_reports_what_it_cost(tmp_path: Path) -> None:
    tuned_study(tmp_path)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    names = {path.name for path in report.paths}
    assert {"loss_vs_compute.png", "loss_vs_compute.svg", "bill.csv", "bill.md"} < names
    assert "](figures/loss_vs_compute.png)" in page
    # A seed's search at width 64: 3 runs of 4096 tokens, 6 * 1280 * 3 * 4096 = 9.4e7 FLOPs.
    reached = "muP 1.9460 with 9.4e7 FLOPs, muP-tuned 1.7460 with 1.9e8 FLOPs (of it 1.0e8 tuning), vectors 1.6460 with"
    cost = page.split("## Cost")[1].split("## Warnings")[0]
    assert reached in cost
    assert "**the tuned preset beats the default preset by 0.2000, more than the seed noise**" in cost
    assert (
        "| muP-tuned · AdamW | 64 | 3 | 1.7460 | [1.7212, 1.7708] | 3.1e7 | 9.4e7 | 1.0e8 | 1.9e8 | 6.2e4 | 46 |"
        in page
    )
    for of, against in (("muP-tuned", "muP"), ("vectors", "muP"), ("vectors", "muP-tuned")):
        assert f"Best loss, {of} - {against} (AdamW, all widths, 3 seeds): -0." in page


def test_the_preset_of_an_arm_is_named_by_roles_where_it_is_written_into_the_config(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0)
    path = write_run(tmp_path, 2.0, arm="vectors")
    record = json.loads(path.read_text())
    record["config"]["parametrization"]["lr"] = {"q_proj": 2.0, "k_proj": 0.5}
    path.write_text(json.dumps(record))
    page = write_report(tmp_path).paths[-1].read_text()
    assert "`multipliers` (muP: none, vectors: vector), `parametrization.lr` (of q_proj, k_proj); all else" in page


def test_a_lone_run_has_no_bill(tmp_path: Path) -> None:
    record = json.loads(write_run(tmp_path / "study", 2.0).read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"cell": None}))
    report = write_report(tmp_path / "run")
    assert "bill.csv" not in {path.name for path in report.paths}
    assert "Cost" not in report.paths[-1].read_text()

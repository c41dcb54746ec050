"""Downstream scores: every number by hand or by brute force, and a report that says what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_analysis_frame import write_run, write_study

from lit_mult.analysis import scores
from lit_mult.analysis.bootstrap import crossed_bootstrap
from lit_mult.analysis.downstream import paper_table
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.report import write_report
from lit_mult.errors import UserError
from lit_mult.record import EVALUATIONS, EvaluationRecord, RunRecord, Score

SIDES = {"facts": "knowledge", "lines": "knowledge", "sums": "reasoning"}


def write_evaluation(
    folder: Path, run: Path, items: dict[str, Sequence[float]], *, step: int | None = None, **changes: Any
) -> Path:
    """Scores of a run that `write_run` wrote; at its last step unless another is given."""
    record = RunRecord.read(run)
    made = [
        Score(
            task=task,
            metric="acc",
            value=float(np.mean(values)),
            stderr=None,
            items=list(values),
            items_hash=f"{task}-{len(values)}",
            side=SIDES[task],  # type: ignore[arg-type]
            chance=0.25,
        )
        for task, values in items.items()
    ]
    last = step is None
    step = record.steps if step is None else step
    evaluation = EvaluationRecord(
        **{
            "suite": "mini",
            "config_hash": record.config_hash,
            "seed": record.seed,
            "cell": record.cell,
            "step": step,
            "last": last,
            "tokens": step * 10,
            "corpus_hash": "abc",
            "num_fewshot": None,
            "limit": None,
            "max_length": 128,
            "truncated": 0,
            "git_commit": None,
            "versions": {},
            "device": "cpu",
            "started_at": "2026-01-01T00:00:00+00:00",
            "wall_seconds": 1.0,
            "scores": made,
            "results": {},
            **changes,
        }
    )
    name = record.cell.cell if record.cell else "run"
    path = folder / EVALUATIONS / name / f"{evaluation.suite}-{evaluation.limit}-step={step}.json"
    evaluation.write(path)
    return path


def loaded(folder: Path) -> pd.DataFrame:
    return scores.load_scores(folder, load_records(folder))


def one(table: pd.DataFrame, **values: Any) -> Any:
    for name, value in values.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return next(table.itertuples())


def four_arms(folder: Path, seeds: int = 3, n: int = 40) -> None:
    """Vectors answer one item in four more than muP under AdamW, and Muon as many more than AdamW, of sums alone."""
    for arm in ("muP", "vectors"):
        for optimizer in ("adamw", "muon"):
            for seed in range(seeds):
                run = write_run(folder, 2.0, arm=arm, optimizer=optimizer, seed=seed)
                gain = n // 4 * ((arm == "vectors") + (optimizer == "muon"))
                right = n // 4 + gain
                sums = np.roll([1.0] * right + [0.0] * (n - right), seed)
                facts = np.roll([1.0] * (n // 2) + [0.0] * (n // 2), seed)
                write_evaluation(folder, run, {"facts": facts, "lines": facts, "sums": sums})
    write_study(folder, cells=4 * seeds)


def test_a_score_is_the_mean_over_seeds_and_items_and_means_over_tasks_are_plain(tmp_path: Path) -> None:
    for seed, (facts, sums) in enumerate([([1, 1, 0, 0], [1, 0]), ([1, 1, 1, 0], [1, 1])]):
        write_evaluation(tmp_path, write_run(tmp_path, 2.0, seed=seed), {"facts": facts, "lines": facts, "sums": sums})
    means = scores.means(loaded(tmp_path))
    # facts: (2/4 + 3/4) / 2 = 5/8; sums: (1/2 + 1) / 2 = 3/4; knowledge: 5/8; all: (5/8 + 5/8 + 3/4) / 3 = 2/3.
    expected = {"facts": 5 / 8, "lines": 5 / 8, "sums": 3 / 4, "knowledge": 5 / 8, "reasoning": 3 / 4, "average": 2 / 3}
    assert dict(zip(means["task"], means["value"], strict=True)) == pytest.approx(expected)
    assert set(means["seeds"]) == {2}
    assert dict(zip(means["task"], means["items"], strict=True))["average"] == 4 + 4 + 2
    assert (means["low"] <= means["value"]).all()
    assert (means["value"] <= means["high"]).all()


def test_differences_pair_seeds_and_items(tmp_path: Path) -> None:
    four_arms(tmp_path)
    compared = scores.differences(loaded(tmp_path))
    by_arm = one(compared, between="arm", within="AdamW", task="sums")
    assert (by_arm.of, by_arm.against, by_arm.seeds, by_arm.items) == ("vectors", "muP", 3, 40)
    assert by_arm.difference == pytest.approx(0.25)
    assert one(compared, between="optimizer", within="vectors", task="sums").difference == pytest.approx(0.25)
    # Answers to `facts` are the same item by item: not only the mean but every difference is 0.
    facts = one(compared, between="arm", within="AdamW", task="facts")
    assert (facts.difference, facts.low, facts.high, facts.items_variance) == (0, 0, 0, 0)
    assert one(compared, between="arm", within="AdamW", task="average").difference == pytest.approx(0.25 / 3)
    assert one(compared, between="arm", within="AdamW", task=scores.CONTRAST).difference == pytest.approx(0.25)


def test_only_seeds_that_both_sides_have_and_equal_items_pair(tmp_path: Path) -> None:
    for seed in range(3):
        write_evaluation(tmp_path, write_run(tmp_path, 2.0, seed=seed), {"sums": [0, 1, 0, 0]})
    for seed in (1, 2):
        items = [1, 1, 0, 0] if seed == 1 else [1, 1, 1, 0, 0]  # of seed 2 other items
        write_evaluation(tmp_path, write_run(tmp_path, 2.0, arm="vectors", seed=seed), {"sums": items})
    compared = scores.differences(loaded(tmp_path))
    assert one(compared, task="sums").seeds == 1
    assert one(compared, task="sums").difference == pytest.approx(0.25)
    assert math.isnan(one(compared, task="sums").seeds_variance)


def test_the_learning_rate_with_the_lowest_mean_loss_counts_whatever_the_scores(tmp_path: Path) -> None:
    for lr, losses, right in ((2**-6, (2.0, 2.2), 0.0), (2**-5, (1.9, 2.5), 1.0)):
        for seed, loss in enumerate(losses):
            write_evaluation(tmp_path, write_run(tmp_path, loss, lr=lr, seed=seed), {"sums": [right, 0.0]})
    best = scores.at_best_rates(loaded(tmp_path))
    assert set(best["lr"]) == {2**-6}  # mean 2.1 against 2.2, although the lowest single loss is at the other
    assert len(best) == 2


def test_power_is_made_of_the_variances_between_seeds_and_items() -> None:
    compared = pd.DataFrame(
        {"suite": "mini", "task": "sums", "seeds_variance": [0.02, 0.04, math.nan], "items_variance": [0.001, 0.003, 9]}
    )
    power = one(scores.power(compared), task="sums")
    assert power.comparisons == 2
    assert power.seeds_3 == pytest.approx(2.8 * math.sqrt(0.03 / 3 + 0.002))
    assert power.seeds_1 > power.seeds_3 > power.seeds_5 > power.seeds_10 > 2.8 * math.sqrt(0.002)


def test_the_variance_due_to_items_is_that_of_an_analysis_of_variance() -> None:
    # Two seeds, three items: item means 0.5, 0, 1 (variance 0.25); residuals +-0.5 on the first item and half of it,
    # with the other sign, on the others: 0.75 in all over 1 * 2 degrees of freedom.
    table = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    residuals = np.array([[1 / 3, -1 / 6, -1 / 6], [-1 / 3, 1 / 6, 1 / 6]])
    assert np.allclose(table - table.mean(0) - table.mean(1, keepdims=True) + table.mean(), residuals)
    noise = (residuals**2).sum() / 2
    assert scores._items_variance(table) == pytest.approx((0.25 - noise / 2) / 3)
    assert scores._items_variance(table[:1]) == pytest.approx(np.var([1, 0, 1], ddof=1) / 3)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=3))
def test_the_crossed_bootstrap_is_linear_and_holds_the_mean(rows: list[list[float]]) -> None:
    table = np.array(rows)
    low, high, stderr = crossed_bootstrap([table], [1.0])
    assert low - 1e-12 <= table.mean() <= high + 1e-12
    assert crossed_bootstrap([2 * table + 3], [1.0]) == pytest.approx((2 * low + 3, 2 * high + 3, 2 * stderr))
    assert crossed_bootstrap([table], [2.0]) == pytest.approx((2 * low, 2 * high, 2 * stderr))


def test_the_crossed_bootstrap_has_the_standard_errors_of_theory() -> None:
    random = np.random.default_rng(0)
    items = random.integers(0, 2, 500).astype(float)
    *_, of_items = crossed_bootstrap([items[None]], [1.0])
    assert of_items == pytest.approx(items.std() / math.sqrt(500), rel=0.05)  # one seed: over items alone
    seeds = np.repeat([[0.1], [0.2], [0.6]], 50, axis=1)
    *_, of_seeds = crossed_bootstrap([seeds], [1.0])
    assert of_seeds == pytest.approx(np.std([0.1, 0.2, 0.6]) / math.sqrt(3), rel=0.05)  # items all alike
    # Tables share their seeds: equal ones add up, and items of their own average out.
    *_, of_two = crossed_bootstrap([seeds, seeds], [0.5, 0.5])
    assert of_two == pytest.approx(of_seeds, rel=0.01)
    *_, of_two_items = crossed_bootstrap([items[None], items[None]], [0.5, 0.5])
    assert of_two_items == pytest.approx(of_items / math.sqrt(2), rel=0.05)


def test_a_single_value_has_no_interval() -> None:
    assert all(math.isnan(value) for value in crossed_bootstrap([np.ones((1, 1))], [1.0]))


def test_the_report_says_what_the_scores_show(tmp_path: Path) -> None:
    four_arms(tmp_path)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert "mini, reasoning, vectors - muP (AdamW, d = 64, 3 seeds): +25.0 points" in page
    assert "**vectors is better** (weak evidence: few seeds)" in page
    assert (
        "mini, knowledge, vectors - muP (AdamW, d = 64, 3 seeds): +0.0 points, [+0.0, +0.0]: no difference shown"
        in page
    )
    assert "**reasoning gains more from vectors**" in page
    assert "### Scores mini power" in page
    names = {path.name for path in report.paths}
    assert {"scores_mini.csv", "scores_mini.md", "scores_mini.png", "scores_mini_differences.csv"} <= names
    assert "scores_mini_along.png" not in names
    assert "facts" in report.text
    before = {path: path.read_bytes() for path in report.paths}
    assert {path: path.read_bytes() for path in write_report(tmp_path).paths} == before


def test_scores_along_training_are_shown_where_there_are_any(tmp_path: Path) -> None:
    run = write_run(tmp_path, 2.0)
    write_evaluation(tmp_path, run, {"facts": [1, 0], "sums": [1, 1]})
    write_evaluation(tmp_path, run, {"facts": [0, 0], "sums": [1, 0]}, step=100)
    means = scores.means(loaded(tmp_path))
    assert one(means, task="sums", step=100).value == pytest.approx(0.5)
    assert not one(means, task="sums", step=100).last
    names = {path.name for path in write_report(tmp_path).paths}
    assert "scores_mini_along.png" in names


def test_one_seed_ranks_two_models_but_no_arms(tmp_path: Path) -> None:
    four_arms(tmp_path, seeds=1)
    page = write_report(tmp_path).paths[-1].read_text()
    assert "vectors is better" not in page
    assert "which ranks these two models and not their arms" in page


def test_other_options_are_another_suite_and_cut_requests_a_warning(tmp_path: Path) -> None:
    run = write_run(tmp_path, 2.0)
    write_evaluation(tmp_path, run, {"facts": [1, 0]}, truncated=3)
    write_evaluation(tmp_path, run, {"facts": [1]}, limit=1)
    assert set(loaded(tmp_path)["suite"]) == {"mini", "mini, first 1 items"}
    assert any("up to 3 requests" in warning for warning in write_report(tmp_path).warnings)


def test_evaluations_of_no_known_run_and_damaged_ones_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, 2.0)
    path = write_evaluation(tmp_path, run, {"facts": [1, 0]}, config_hash="another")
    with pytest.raises(UserError, match="is of a run that has no record here"):
        loaded(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="not a version-1 evaluation record"):
        loaded(tmp_path)


def test_the_papers_averages_are_those_it_prints() -> None:
    averages = dict(zip(paper_table()["line"], paper_table()["average"], strict=True))
    assert averages == {"Adam": "30.80", "Adam + LRM": "32.01", "Muon": "31.88", "Muon + LRM": "32.98"}

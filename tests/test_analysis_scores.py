"""Downstream scores: every number by hand or by brute force, and a report that says what they show."""

from __future__ import annotations

import math
import secrets
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
from lit_mult.analysis.crossed import crossed, items_variance
from lit_mult.analysis.downstream import paper_rows
from lit_mult.analysis.frame import best_rates, load_records
from lit_mult.analysis.report import write_report
from lit_mult.analysis.seeds import t_quantile
from lit_mult.errors import UserError
from lit_mult.schema import EvaluationRecord, RunRecord, Score

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
            higher_is_better=True,
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
            "label": "mini",
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
    path = folder / "evaluations" / name / f"{secrets.token_hex(4)}-step={step}.json"
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
    table = loaded(tmp_path)
    best = table[table["best"]]
    assert set(best["lr"]) == {2**-6}  # mean 2.1 against 2.2, although the lowest single loss is at the other
    assert len(best) == 2
    assert any("scores of 2 runs are left out" in warning for warning in write_report(tmp_path).warnings)


@pytest.mark.parametrize("others", ["diverged", "missing"])
def test_no_learning_rate_is_best_for_the_luck_of_one_seed(tmp_path: Path, others: str) -> None:
    for seed, loss in enumerate((2.0, 2.2, 2.1)):
        write_run(tmp_path, loss, lr=2**-6, seed=seed)
    write_run(tmp_path, 1.5, lr=2**-5, seed=0)
    for seed in (1, 2) if others == "diverged" else ():
        write_run(tmp_path, None, lr=2**-5, seed=seed)
    best = best_rates(load_records(tmp_path))
    assert list(zip(best["lr"], best["seed"], strict=True)) == [(2**-6, 0), (2**-6, 1), (2**-6, 2)]


def test_where_every_rate_diverged_none_is_best(tmp_path: Path) -> None:
    run = write_run(tmp_path, None)
    assert best_rates(load_records(tmp_path)).empty
    write_evaluation(tmp_path, run, {"sums": [1.0]})
    write_report(tmp_path)


def test_the_newer_of_two_evaluations_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path, 2.0)
    write_evaluation(tmp_path, run, {"sums": [1, 1]}, started_at="2026-02-01T00:00:00+00:00")
    write_evaluation(tmp_path, run, {"sums": [0, 0]}, started_at="2026-01-01T00:00:00+00:00")
    assert list(loaded(tmp_path)["value"]) == [1.0]


def test_scores_that_are_no_shares_stay_out_of_the_means(tmp_path: Path) -> None:
    for arm, perplexity in (("muP", 30.0), ("vectors", 40.0)):
        items = {"facts": [1, 0], "sums": [1, 1], "lines": [perplexity]}
        write_evaluation(tmp_path, write_run(tmp_path, 2.0, arm=arm), items)
    means = scores.means(loaded(tmp_path))
    assert one(means, arm="muP", task="average").value == pytest.approx(0.75)
    assert not one(means, arm="muP", task="lines").share
    assert "30.0000" in write_report(tmp_path).text


def test_power_is_the_root_mean_square_over_comparisons_with_a_variance() -> None:
    detectable = {f"seeds_{n}": [3.0 / n, 4.0 / n, math.nan] for n in scores.SEEDS_PLANNED}
    compared = pd.DataFrame(
        {"suite": "mini", "task": "sums", "share": True, "seeds_variance": [0.02, 0.04, math.nan], **detectable}
    )
    power = one(scores.power(compared), task="sums")
    assert power.comparisons == 2
    assert power.seeds_3 == pytest.approx(math.sqrt((1 + 16 / 9) / 2))


def test_the_variance_due_to_items_is_that_of_an_analysis_of_variance() -> None:
    # Two seeds, three items: item means 0.5, 0, 1 (variance 0.25); residuals +-1/3 on the first item and half of it,
    # with the other sign, on the others, over 1 * 2 degrees of freedom.
    table = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    residuals = np.array([[1 / 3, -1 / 6, -1 / 6], [-1 / 3, 1 / 6, 1 / 6]])
    assert np.allclose(table - table.mean(0) - table.mean(1, keepdims=True) + table.mean(), residuals)
    noise = (residuals**2).sum() / 2
    assert items_variance(table) == pytest.approx((0.25 - noise / 2) / 3)
    assert items_variance(table[:1]) == pytest.approx(np.var([1, 0, 1], ddof=1) / 3)


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 10, 2.228), (0.8, 2, 1.061), (0.8, 30, 0.854), (0.975, 499, 1.965)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(level: float, freedom: float, expected: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(expected, abs=6e-4)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=3))
def test_an_estimate_is_linear_and_its_interval_holds_the_mean(rows: list[list[float]]) -> None:
    table = np.array(rows)
    found, doubled = crossed([table], np.array([1.0])), crossed([table], np.array([2.0]))
    low, high = found.interval
    assert low <= table.mean() <= high
    assert found.value == pytest.approx(table.mean())
    assert (doubled.value, *doubled.interval) == pytest.approx((2 * found.value, 2 * low, 2 * high))
    shifted = crossed([table + 3], np.array([1.0]))
    assert (shifted.value, shifted.stderr) == pytest.approx((found.value + 3, found.stderr), abs=1e-6)


def test_tables_share_their_seeds_and_not_their_items() -> None:
    seeds = np.repeat([[0.1], [0.2], [0.6]], 50, axis=1)
    alone = crossed([seeds], np.array([1.0]))
    assert alone.stderr == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3))
    assert alone.interval[1] - alone.value == pytest.approx(4.303 * alone.stderr, rel=1e-3)  # 2 degrees of freedom
    assert crossed([seeds, seeds], np.array([0.5, 0.5])).stderr == pytest.approx(alone.stderr)
    items = np.random.default_rng(0).integers(0, 2, (1, 500)).astype(float)
    of_items = crossed([items], np.array([1.0]))  # one seed: over items alone
    assert of_items.stderr == pytest.approx(items.std(ddof=1) / math.sqrt(500))
    assert crossed([items, items], np.array([0.5, 0.5])).stderr == pytest.approx(of_items.stderr / math.sqrt(2))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random, inside, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):  # three seeds, 200 items: both matter, and noise besides
        table = 0.03 * random.normal(size=(3, 1)) + 0.3 * random.normal(size=200) + 0.3 * random.normal(size=(3, 200))
        low, high = crossed([table], np.array([1.0])).interval
        inside += low <= 0 <= high
    assert 0.92 <= inside / trials <= 0.99


def test_what_is_detectable_is_found_four_times_in_five() -> None:
    random, trials = np.random.default_rng(1), 400
    tables = [0.05 * random.normal(size=(5, 1)) + 0.3 * random.normal(size=(5, 50)) for _ in range(trials)]
    size = float(np.mean([crossed([table], np.ones(1)).detectable(5) for table in tables]))
    found = sum(crossed([size + table], np.ones(1)).interval[0] > 0 for table in tables)
    assert 0.7 <= found / trials <= 0.95


def test_a_single_value_has_no_interval() -> None:
    found = crossed([np.ones((1, 1))], np.ones(1))
    assert all(math.isnan(value) for value in (*found.interval, found.stderr))


def test_the_report_says_what_the_scores_show(tmp_path: Path) -> None:
    four_arms(tmp_path)
    report = write_report(tmp_path)
    page = report.paths[-1].read_text()
    assert "mini, reasoning, vectors - muP (AdamW, d = 64, 3 seeds): +25.0 points" in page
    assert "**vectors is better**" in page
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
    write_evaluation(tmp_path, run, {"facts": [1]}, limit=1, label="mini, first 1 items")
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
    table = paper_rows(["hellaswag", "arc", "mmlu", "pro", "bbh", "gsm8k", "math", "average"])
    averages = list(table["average"])
    assert averages == ["30.80", "32.01", "31.88", "32.98"]
    assert list(table["bbh"]) == ["9.70", "12.03", "10.13", "13.52"]


def test_whether_multipliers_gain_what_muon_does_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    four_arms(tmp_path)
    compared = scores.differences(loaded(tmp_path))
    both = one(compared, between="both", task="sums")
    assert (both.of, both.against) == ("vectors · AdamW", "muP · Muon")
    assert both.difference == pytest.approx(0.0)

"""Verdicts: one rule from an interval to an outcome, and intervals that are Student's."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from experiment_data import evidence
from hypothesis import given
from hypothesis import strategies as st

from lit_mult.analysis.seeds import at_best, mean_interval, means_over_seeds, paired
from lit_mult.analysis.verdict import ABOVE_0, judge, verdicts_table
from lit_mult.errors import UserError
from lit_mult.schema import NEGLIGIBLE, Question


def test_the_interval_is_students() -> None:
    """Mean 2, standard deviation 1, t(0.975; 2) = 4.302653: 2 ± 4.302653 / sqrt(3)."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "within", "outcome"),
    [
        ([1.0, 1.01, 0.99], (0.9, 1.1), "reproduced"),
        ([1.0, 1.3, 0.7], (0.9, 1.1), "undecided"),  # the interval is wider than the range
        ([1.09, 1.1, 1.11], (0.9, 1.1), "undecided"),  # it straddles an end
        ([1.3, 1.31, 1.32], (0.9, 1.1), "contradicted"),
        ([0.1, 0.11, 0.12], ABOVE_0, "reproduced"),
        ([-0.1, -0.11, -0.12], ABOVE_0, "contradicted"),
        ([1.0], (0.9, 1.1), "undecided"),
        ([], (0.9, 1.1), "undecided"),
        ([1.0, 1.01, math.nan], (0.9, 1.1), "undecided"),
        ([1.0, 1.0, math.inf], ABOVE_0, "undecided"),
    ],
)
def test_outcomes(values: list[float], within: tuple[float, float], outcome: str) -> None:
    assert judge("a claim", "a statistic", values, within).outcome == outcome


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(-10, 10), st.floats(0, 10))
def test_a_claim_and_its_opposite_are_never_both_reproduced(values: list[float], low: float, size: float) -> None:
    inside = judge("", "", values, (low, low + size)).outcome
    above = judge("", "", values, (low + size + 1e-9, math.inf)).outcome
    assert not (inside == above == "reproduced")
    if inside == "reproduced":
        assert above == "contradicted"


def test_a_sentence_names_claim_statistic_interval_and_range() -> None:
    verdict = judge("norms follow S, as in fig. 1", "slope", [1.0, 1.02, 0.98], (0.9, 1.1))
    said = "**reproduced**: norms follow S, as in fig. 1. slope: 1 [0.95, 1.05], 3 seeds; judged: 0.9 to 1.1."
    assert verdict.sentence() == said
    assert "judged: above 0" in judge("c", "s", [1.0, 2.0], ABOVE_0).sentence()
    one = judge("c", "s", [1.0], ABOVE_0)
    assert "no interval, 1 seed;" in one.sentence()
    assert list(verdicts_table([verdict, one])["outcome"]) == ["reproduced", "undecided"]


def test_a_claim_whose_precondition_fails_is_not_decided_by_its_statistic() -> None:
    verdict = judge("c", "s", [1.0, 1.01, 1.02], ABOVE_0, tested=False)
    assert verdict.outcome == "not at this scale"
    assert verdict.sentence().endswith("which these runs do not test.")
    for values in ([1.0], [1.0, math.nan], [1.0, -1.0]):
        assert judge("c", "s", values, ABOVE_0, tested=False).outcome == "not at this scale"


@pytest.mark.parametrize(
    ("values", "end"),
    [
        # Mean 0, standard deviation 0.01 sqrt(2), t(0.975; 1) = 12.7062: ± 12.7062 * 0.01.
        ([-0.01, 0.01], "judged: above 0. Values from -0.127 to 0.127 remain possible, in the range and outside."),
        ([0.1], "judged: above 0. Fewer than two seeds leave any value possible."),
        ([], "judged: above 0. Fewer than two seeds leave any value possible."),
        (
            [0.1, math.nan],
            "judged: above 0. A seed without a value, as of a run that diverged, leaves any value possible.",
        ),
    ],
)
def test_an_undecided_verdict_says_what_remains_possible(values: list[float], end: str) -> None:
    verdict = judge("c", "s", values, ABOVE_0)
    assert verdict.outcome == "undecided"
    assert verdict.sentence().endswith(end)


def test_questions_and_verdicts_call_the_same_difference_nothing() -> None:
    assert Question(of={"arm": "a"}, against={"arm": "b"}).margin == NEGLIGIBLE == 0.01


def test_pairs_are_one_to_one() -> None:
    table = pd.DataFrame({"arm": ["a", "b", "b"], "seed": [0, 0, 1], "width": [32, 32, 32], "loss": [1.0, 0.5, 9.0]})
    assert paired(table, "b", "a", ["seed"], "loss")["loss"].tolist() == [-0.5]
    twice = pd.concat([table, table.assign(width=64)])
    with pytest.raises(UserError, match="b and a: several runs at equal seed"):
        paired(twice, "b", "a", ["seed"], "loss")
    assert len(paired(twice, "b", "a", ["seed", "width"], "loss")) == 2


def test_the_best_value_is_one_for_all_seeds() -> None:
    losses = pd.DataFrame({0.1: [1.0, 5.0, 2.0], 0.2: [3.0, 2.0, 2.5]}, index=[0, 1, 2])  # means 2.67 and 2.5
    assert at_best(losses).to_dict() == {0: 3.0, 1: 2.0, 2: 2.5}
    assert at_best(losses, losses[[0.1]]).to_dict() == {0: 1.0, 1: 5.0, 2: 2.0}
    assert at_best(losses.mask(losses == 3.0)).to_dict() == {0: 1.0, 1: 5.0, 2: 2.0}  # it diverged at 0.2
    assert at_best(losses.mask(losses > 0)).isna().all()


def test_an_experiment_is_about_what_its_study_varies() -> None:
    made = evidence([({"arm": arm, "model.n_layers": layers}, []) for arm in "ab" for layers in (1, 2)])
    made.expect(["a", "b", "c"], ["model.n_layers"])
    for arms, factors, said in (
        (["a"], ["model.n_layers"], "has the arms a, not b"),
        (["a", "b"], [], "does not vary model.n_layers"),
        (["a", "b"], ["model.n_layers", "data.seq_len"], "needs the factor data.seq_len"),
    ):
        with pytest.raises(UserError, match=said):
            made.expect(arms, factors)
    wide = evidence([({"d_model": width, "optimizer": "muon"}, []) for width in (32, 64)])
    wide.expect(["a"], ["model.d_model", "optimizer"])
    with pytest.raises(UserError, match=r"does not vary model\.d_model"):
        wide.expect(["a"])
    rates = evidence([({"lr": lr}, []) for lr in (0.01, 0.02)])
    rates.expect(["a"], ["optim.lr"])  # for arms that are compared at their best rate
    with pytest.raises(UserError, match=r"does not vary optim\.lr"):
        rates.expect(["a"])


def test_means_over_seeds() -> None:
    table = pd.DataFrame({"arm": ["a", "a", "b"], "seed": [0, 1, 0], "loss": [1.0, 3.0, 5.0]})
    means = means_over_seeds(table, ["arm"], "loss")
    assert list(means["loss"]) == [2, 5]
    assert list(means["seeds"]) == [2, 1]
    assert means["low"].isna().tolist() == [False, True]

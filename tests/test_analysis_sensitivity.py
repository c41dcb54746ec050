"""Sensitivity, optima, drift and paired differences, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_data import INITIAL_LOSS
from test_analysis_frame import write_run

from lit_mult.analysis import sensitivity as s
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.seeds import holm, p_value, t_quantile

LRS = [2**-8, 2**-6, 2**-4]
NAN = float("nan")

# Multiples of 1/64 keep every sum and difference exact in binary.
dyadic = st.integers(64, 640).map(lambda n: n / 64)
curves = st.lists(dyadic | st.just(NAN), min_size=2, max_size=9)


def grid(losses: list[float]) -> list[float]:
    return [2.0 ** -(9 - i) for i in range(len(losses))]


def test_sensitivity_by_hand() -> None:
    # l0 = 5, l* = 2: (2.5-2) + (2-2) + (3-2) + (5-2, capped from 7) + (5-2, diverged) = 7.5 over 5 rates.
    losses = [2.5, 2.0, 3.0, 7.0, NAN]
    assert s.lr_sensitivity(grid(losses), losses, 5.0) == pytest.approx(1.5, abs=1e-15)
    losses[-1] = math.inf
    assert s.lr_sensitivity(grid(losses)[::-1], losses[::-1], 5.0) == pytest.approx(1.5, abs=1e-15)


def test_a_model_that_never_trains_has_a_doubtful_sensitivity_of_zero(tmp_path: Path) -> None:
    assert s.lr_sensitivity([1, 2], [NAN, NAN], 5.0) == 0
    assert s.lr_sensitivity([1, 2], [5.0, 6.0], 5.0) == 0
    for arm, losses in (("muP", [INITIAL_LOSS, INITIAL_LOSS + 1, None]), ("vectors", [3.0, 2.0, 3.0])):
        for lr, loss in zip(LRS, losses, strict=True):
            write_run(tmp_path, loss, arm=arm, lr=lr)
    table = point_table(tmp_path)
    assert table["note"].tolist() == ["no run ended below the initial loss", ""]
    assert (s.paired_differences(table)["doubtful"] == 1).all()


@pytest.mark.parametrize("lrs", [[1, 2, 3], [1, 1, 1], [1], [0, 1, 2]])
def test_sensitivity_wants_a_log_uniform_grid(lrs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"log-uniform|two learning rates"):
        s.lr_sensitivity(lrs, [2.0] * len(lrs), 5.0)


def test_a_grid_written_with_two_digits_passes() -> None:
    # sqrt(10) steps written short: log2 steps 1.678, 1.644, 1.678, all within 2 % of 1.667.
    assert s.lr_sensitivity([1e-3, 3.2e-3, 1e-2, 3.2e-2], [3.0, 2.0, 2.0, 3.0], 5.0) == 0.5


@given(curves, dyadic, st.integers(-64, 640).map(lambda n: n / 64))
def test_sensitivity_is_never_negative_and_ignores_a_constant(losses: list[float], l0: float, shift: float) -> None:
    value = s.lr_sensitivity(grid(losses), losses, l0)
    shifted = s.lr_sensitivity(grid(losses), [loss + shift for loss in losses], l0 + shift)
    assert value >= 0
    assert shifted == value


@given(curves)
def test_the_optimum_lies_between_the_neighbours_and_not_above_the_best(losses: list[float]) -> None:
    lrs = np.array(grid(losses))
    optimum = s.interpolated_optimum(lrs, losses)
    if np.isnan(losses).all():
        assert math.isnan(optimum.lr)
    else:
        best = int(np.nanargmin(losses))
        assert optimum.at_edge == (best in (0, len(losses) - 1))
        assert lrs[best] / 2 <= optimum.lr <= lrs[best] * 2
        assert optimum.loss <= losses[best]


@pytest.mark.parametrize("lrs", [[2**-9, 2**-7.5, 2**-6, 2**-4.5], [2**-8, 2**-7, 2**-4, 2**-3]])
def test_the_optimum_of_an_exact_parabola_is_its_vertex(lrs: list[float]) -> None:
    losses = [2 + 0.1 * (math.log2(lr) + 6.4) ** 2 for lr in lrs]  # vertex at lr 2^-6.4, loss 2
    optimum = s.interpolated_optimum(lrs, losses)
    assert math.log2(optimum.lr) == pytest.approx(-6.4, abs=1e-12)
    assert optimum.loss == pytest.approx(2, abs=1e-12)
    assert not optimum.at_edge


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 3.0, 4.0], s.Optimum(0.1, 2.0, at_edge=True)),
        ([4.0, 3.0, 2.0], s.Optimum(0.3, 2.0, at_edge=True)),
        ([4.0, 2.0, NAN], s.Optimum(0.2, 2.0, at_edge=False)),  # no right neighbour to fit through
        ([2.0, 2.0, 2.0], s.Optimum(0.1, 2.0, at_edge=True)),
        ([NAN, 2.0, NAN], s.Optimum(0.2, 2.0, at_edge=False)),
    ],
)
def test_the_grid_point_stands_where_nothing_can_be_interpolated(losses: list[float], expected: s.Optimum) -> None:
    assert s.interpolated_optimum([0.1, 0.2, 0.3], losses) == expected


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="do not go with"):
        s.interpolated_optimum([1, 2], [1, 2, 3])


def test_holm_by_hand() -> None:
    # In order: 0.01 * 4 = 0.04, 0.02 * 3 = 0.06, 0.022 * 2 = 0.044 -> 0.06 (never below the one before), 0.5 * 1.
    assert holm([0.5, 0.01, NAN, 0.022, 0.02]).tolist() == pytest.approx([0.5, 0.04, NAN, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_p_value_is_that_of_the_interval() -> None:
    # t = 1 / sqrt(1 / 3) = sqrt(3) with 2 degrees of freedom: p = 1 - sqrt(3 / (3 + 2)) = 0.2254.
    assert p_value([0.0, 1.0, 2.0]) == pytest.approx(1 - math.sqrt(0.6), abs=1e-12)
    assert p_value([0.0, 0.0]) == 1  # two names of one arm
    assert p_value([1.0, 1.0]) == 0
    assert math.isnan(p_value([1.0]))
    assert math.isnan(p_value([1.0, NAN]))


def sweep(folder: Path, arm: str, losses: Sequence[float | None], lrs: Sequence[float] = LRS, **where: object) -> None:
    for lr, loss in zip(lrs, losses, strict=True):
        write_run(folder, loss, arm=arm, lr=lr, **where)  # type: ignore[arg-type]


def point_table(folder: Path) -> pd.DataFrame:
    return s.points(load_records(folder))


def test_a_point_gathers_the_runs_of_a_group(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, None])
    write_run(tmp_path, 4.0, arm="untuned")
    reference, point = point_table(tmp_path).to_dict("records")
    assert point["sensitivity"] == pytest.approx((1.0 + 0.0 + INITIAL_LOSS - 2.0) / 3)
    assert (point["best_loss"], point["optimum_lr"], point["diverged"], point["lrs"]) == (2.0, 2**-6, 1, 3)
    assert (point["complete"], point["at_edge"], point["note"]) == (True, False, "")
    assert (reference["reference"], reference["complete"], reference["at_edge"]) == (True, True, False)
    assert reference["best_loss"] == 4.0
    assert math.isnan(reference["sensitivity"])


def test_a_group_with_missing_runs_is_incomplete_and_has_no_sensitivity(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, 4.0], seed=0)
    for lr, loss in zip(LRS[:2], [3.0, 2.0], strict=True):
        write_run(tmp_path, loss, lr=lr, seed=1)
    whole, part = point_table(tmp_path).to_dict("records")
    assert whole["complete"]
    assert not part["complete"]
    assert part["note"] == "2 of 3 runs"
    assert math.isnan(part["sensitivity"])
    row = s.summary(point_table(tmp_path)).to_dict("records")[0]
    assert (row["seeds"], row["sensitivity_seeds"], row["incomplete"]) == (2, 1, 1)


def test_a_grid_that_is_not_log_uniform_is_noted(tmp_path: Path) -> None:
    for lr in (0.01, 0.02, 0.03):
        write_run(tmp_path, 2.0 + lr, lr=lr)
    point = point_table(tmp_path).to_dict("records")[0]
    assert math.isnan(point["sensitivity"])
    assert "log-uniform" in point["note"]


def test_other_nuisance_factors_are_tuned_at_each_lr(tmp_path: Path) -> None:
    for decay, losses in ((0.1, [3.0, 2.5, 4.0]), (0.2, [3.5, 2.0, None])):
        for lr, loss in zip(LRS, losses, strict=True):
            write_run(tmp_path, loss, lr=lr, nuisance={"optim.weight_decay": decay}, cell=f"{decay}-{lr}")
    point = point_table(tmp_path).to_dict("records")[0]
    assert point["sensitivity"] == pytest.approx((1.0 + 0.0 + 2.0) / 3)  # of 3.0, 2.0, 4.0
    assert (point["runs"], point["lrs"], point["diverged"]) == (6, 3, 1)


def test_paired_differences_by_hand(tmp_path: Path) -> None:
    # Best losses, seeds 0 and 1, and an unpaired seed 2 that must not count:
    #   width 32: muP 2.0 2.2 1.0, vectors 1.9 2.3      -> -0.1 +0.1, mean 0
    #   width 64: muP 1.8 1.9,     vectors 1.5 1.8      -> -0.3 -0.1, mean -0.2
    # over widths -0.2 and 0: mean -0.1, standard error 0.1, and t(0.975, 1) = tan(0.475 pi) = 12.706.
    best = {
        ("muP", 32): [2.0, 2.2, 1.0], ("vectors", 32): [1.9, 2.3],
        ("muP", 64): [1.8, 1.9], ("vectors", 64): [1.5, 1.8],
    }  # fmt: skip
    for (arm, width), losses in best.items():
        for seed, loss in enumerate(losses):
            sweep(tmp_path, arm, [3.0, loss, 3.0], width=width, seed=seed)
    table = s.paired_differences(point_table(tmp_path))
    table = table[table["measure"] == "best_loss"].set_index("d_model")
    assert table["difference"].to_dict() == pytest.approx({32: 0.0, 64: -0.2, "all": -0.1})
    reach = 0.1 * math.tan(0.475 * math.pi)
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi))
    assert table.loc["all", ["low", "high"]].tolist() == pytest.approx([-0.1 - reach, -0.1 + reach])
    assert table[["of", "against", "within"]].drop_duplicates().to_numpy().tolist() == [["vectors", "muP", "AdamW"]]
    assert table[["seeds", "pairs", "doubtful"]].to_numpy().tolist() == [[2, 2, 0], [2, 2, 0], [2, 4, 0]]


def test_differences_of_sensitivity_and_between_optimizers(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, 4.0])  # (1 + 0 + 2) / 3 = 1
    sweep(tmp_path, "muP", [2.5, 1.9, 2.5], optimizer="muon")  # 1.2 / 3 = 0.4
    write_run(tmp_path, 2.5, arm="untuned")
    table = s.paired_differences(point_table(tmp_path)).set_index(["between", "of", "against", "measure"])
    # Mean losses (3 + 2 + 4) / 3 and (2.5 + 1.9 + 2.5) / 3; without the lowest rate (0 + 2) / 2 and (0 + 0.6) / 2,
    # without the highest (1 + 0) / 2 and (0.6 + 0) / 2.
    assert table["difference"].to_dict() == pytest.approx({
        ("arm", "muP", "untuned", "best_loss"): -0.5,
        ("optimizer", "Muon", "AdamW", "best_loss"): -0.1,
        ("optimizer", "Muon", "AdamW", "sensitivity"): -0.6,
        ("optimizer", "Muon", "AdamW", "mean_loss"): -0.7,
        ("optimizer", "Muon", "AdamW", "sensitivity_but_lowest"): -0.7,
        ("optimizer", "Muon", "AdamW", "sensitivity_but_highest"): -0.2,
    })  # fmt: skip
    assert table["low"].isna().all()  # one seed
    # The untuned arm has one rate: it is no match for the best of three.
    assert table["doubtful"].to_dict()["arm", "muP", "untuned", "best_loss"] == 1
    assert table["doubtful"].sum() == 1


def test_a_seed_is_judged_at_the_rate_that_is_best_for_all(tmp_path: Path) -> None:
    # Means over seeds: 2.5, 2.25, 2.75. The minimum of seed 0 lies elsewhere, at 2.0.
    sweep(tmp_path, "muP", [2.0, 2.5, 3.0], seed=0)
    sweep(tmp_path, "muP", [3.0, 2.0, 2.5], seed=1)
    table = point_table(tmp_path)
    assert table["best_loss"].tolist() == [2.5, 2.0]
    assert table["best_lr"].tolist() == [LRS[1], LRS[1]]
    assert table["at_edge"].tolist() == [False, False]
    assert table["optimum_at_edge"].tolist() == [True, False]
    assert table["sensitivity"].tolist() == pytest.approx([0.5, 0.5])  # of its own curve: (0 + 0.5 + 1) / 3


def test_a_diverged_run_counts_as_the_initial_loss_when_the_best_rate_is_chosen(tmp_path: Path) -> None:
    # Means: 2.5 and (1.0 + 5.5) / 2 = 3.25.
    sweep(tmp_path, "muP", [2.5, 1.0], lrs=LRS[:2], seed=0)
    sweep(tmp_path, "muP", [2.5, None], lrs=LRS[:2], seed=1)
    assert point_table(tmp_path)["best_lr"].tolist() == [LRS[0], LRS[0]]


def test_other_nuisance_factors_have_one_value_for_all_seeds(tmp_path: Path) -> None:
    # At each rate decay 0.1 has the lower mean, though seed 0 would prefer 0.2.
    for seed, decay, loss in ((0, 0.1, 2.25), (0, 0.2, 2.0), (1, 0.1, 2.25), (1, 0.2, 3.0)):
        for lr, extra in zip(LRS, (0.5, 0.0, 0.5), strict=True):
            nuisance = {"optim.weight_decay": decay}
            write_run(tmp_path, loss + extra, lr=lr, seed=seed, nuisance=nuisance, cell=f"{decay}-{lr}-{seed}")
    assert point_table(tmp_path)["best_loss"].tolist() == [2.25, 2.25]


def test_a_seed_for_precision_is_judged_and_has_no_curve(tmp_path: Path) -> None:
    for seed in (0, 1):
        sweep(tmp_path, "muP", [3.0, 2.0, 2.5, 4.0], lrs=[*LRS, 2**-2], seed=seed)
    for lr, loss in zip(LRS, (3.0, 2.5, 1.75), strict=True):
        write_run(tmp_path, loss, lr=lr, seed=2, refines=True)
    table = point_table(tmp_path)
    # Of the rates that all seeds have: means 3, 6.5 / 3 and 6.75 / 3.
    assert table["best_loss"].tolist() == [2.0, 2.0, 2.5]
    assert table["complete"].all()
    assert not table["at_edge"].any()
    assert table["sensitivity"].notna().tolist() == [True, True, False]
    assert (table["note"] == "").all()


def test_a_difference_at_the_edge_is_doubtful(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, 1.5])
    sweep(tmp_path, "vectors", [3.0, 2.0, 3.0])
    assert (s.paired_differences(point_table(tmp_path))["doubtful"] == 1).all()


def test_drift_is_exact_on_a_power_law(tmp_path: Path) -> None:
    # The optimum is 2^-5.5 at width 32 and falls by 2^-0.5 with each doubling: slope -0.5, intercept -5.5 + 0.5 * 5.
    for width in (32, 64, 128):
        vertex = -5.5 - 0.5 * (math.log2(width) - 5)
        for seed, nudge in ((0, 0.1), (1, -0.1)):
            losses = [2 + 0.1 * (math.log2(lr) - vertex - nudge) ** 2 for lr in LRS]
            sweep(tmp_path, "muP", losses, width=width, seed=seed)
    drift = s.optimum_drift(point_table(tmp_path)).to_dict("records")
    assert len(drift) == 1
    assert [drift[0][name] for name in ("slope", "slope_low", "slope_high", "intercept")] == pytest.approx(
        [-0.5, -0.5, -0.5, -3.0]
    )
    assert (drift[0]["trusted"], drift[0]["seeds"], drift[0]["widths"]) == (True, 2, 3)


def test_drift_with_an_optimum_at_the_edge_is_not_trusted(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, 3.0], width=32)
    sweep(tmp_path, "muP", [2.0, 2.5, 3.0], width=64)
    drift = s.optimum_drift(point_table(tmp_path)).to_dict("records")[0]
    assert drift["slope"] == pytest.approx(-2.0)  # from 2^-6 to 2^-8 over one doubling
    assert (drift["trusted"], drift["at_edge"]) == (False, 1)
    assert math.isnan(drift["slope_low"])


def test_groups_of_a_sampled_search_are_complete_by_their_number_of_runs(tmp_path: Path) -> None:
    # Each width has learning rates of its own, so the arm's union of rates says nothing about what a group lacks.
    for width, lrs in ((32, (0.01, 0.02)), (64, (0.011, 0.023)), (128, (0.013,))):
        for lr in lrs:
            write_run(tmp_path, 2.0, width=width, lr=lr, sampler="random")

    complete = s.points(load_records(tmp_path)).set_index("d_model")["complete"]

    assert complete.to_dict() == {32: True, 64: True, 128: False}


def test_a_group_with_a_pruned_run_has_a_best_loss_and_no_sensitivity(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0, 4.0])
    sweep(tmp_path, "vectors", [2.5, 1.9], lrs=LRS[:2])
    write_run(tmp_path, None, arm="vectors", lr=LRS[2], status="pruned")
    table = point_table(tmp_path)
    whole, pruned = table.to_dict("records")
    assert (whole["pruned"], whole["note"]) == (0, "")
    assert whole["sensitivity"] == pytest.approx(1.0)
    assert (pruned["best_loss"], pruned["optimum_lr"], pruned["at_edge"]) == (1.9, LRS[1], False)
    assert (pruned["runs"], pruned["complete"], pruned["diverged"], pruned["pruned"]) == (3, True, 0, 1)
    assert math.isnan(pruned["sensitivity"])
    assert pruned["note"] == "1 of 3 runs pruned"
    # What was pruned would not have been best, so the best losses compare; there is one sensitivity only.
    assert s.paired_differences(table)[["measure", "doubtful"]].to_numpy().tolist() == [["best_loss", 0]]
    assert s.summary(table)["pruned"].tolist() == [0, 1]


def test_a_group_with_nothing_but_pruned_runs_has_no_best_loss(tmp_path: Path) -> None:
    for lr in LRS:
        write_run(tmp_path, None, lr=lr, status="pruned")
    point = point_table(tmp_path).to_dict("records")[0]
    assert math.isnan(point["best_loss"])
    assert math.isnan(point["optimum_lr"])
    assert (point["note"], point["diverged"]) == ("3 of 3 runs pruned", 0)


def test_added_rates_find_the_optimum_and_leave_the_sensitivity_alone(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.5, 2.0])
    for lr, loss in ((2**-2, 1.5), (2**0, 2.5)):
        write_run(tmp_path, loss, lr=lr, added=True)
    sweep(tmp_path, "vectors", [3.0, 2.0, 4.0])
    table = point_table(tmp_path)
    found, planned = table.to_dict("records")
    # On the planned rates: (1 + 0.5 + 0) / 3. The parabola through 2.0, 1.5, 2.5 at 2^-4, 2^-2, 2^0 has its vertex at
    # log2 lr = -2 - 2 * (2.5 - 2.0) / (2 * (2.0 + 2.5 - 2 * 1.5)) = -7/3.
    assert found["sensitivity"] == pytest.approx(0.5)
    assert (found["best_loss"], found["at_edge"], found["complete"], found["note"]) == (1.5, False, True, "")
    assert math.log2(found["optimum_lr"]) == pytest.approx(-7 / 3)
    assert [found[name] for name in ("runs", "added", "lrs", "lr_low", "lr_high")] == [5, 2, 3, LRS[0], LRS[2]]
    assert [planned[name] for name in ("runs", "added", "lrs", "lr_low", "lr_high")] == [3, 0, 3, LRS[0], LRS[2]]
    assert (s.paired_differences(table)["doubtful"] == 0).all()  # of equal ranges


def test_a_group_is_complete_by_its_planned_runs(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.5, 2.0])
    sweep(tmp_path, "muP", [3.0, 2.5], lrs=LRS[:2], seed=1)
    write_run(tmp_path, 1.5, seed=1, lr=2**-2, added=True)
    write_run(tmp_path, 1.5, seed=2, lr=2**-2, added=True)
    table = point_table(tmp_path)
    assert table["complete"].tolist() == [True, False, False]
    assert table["note"].tolist() == ["", "2 of 3 runs", "0 of 3 runs"]


def test_a_sampled_search_has_a_best_trial_and_no_curve(tmp_path: Path) -> None:
    # On a log-uniform grid by chance, and the neighbours of the best would pull the vertex of a parabola away from it.
    for lr, loss in zip(LRS, [3.0, 2.0, 2.5], strict=True):
        write_run(tmp_path, loss, lr=lr, sampler="tpe", nuisance={"parametrization.lr.q_proj": 1 + lr})
    point = point_table(tmp_path).to_dict("records")[0]
    assert (point["best_loss"], point["optimum_lr"], point["optimum_loss"]) == (2.0, LRS[1], 2.0)
    assert math.isnan(point["sensitivity"])
    assert (point["complete"], point["note"]) == (True, "the learning rates were sampled, not laid on a grid")


def test_a_search_at_one_learning_rate_has_no_drift(tmp_path: Path) -> None:
    for width in (32, 64):
        for decay, loss in ((0.1, 2.0), (0.2, 2.1)):
            decays = {"optim.weight_decay": decay}
            write_run(tmp_path, loss, width=width, sampler="tpe", nuisance=decays, cell=f"{width}-{decay}")
    assert s.optimum_drift(point_table(tmp_path)).empty


def test_a_grid_that_is_not_log_uniform_puts_no_best_loss_in_doubt(tmp_path: Path) -> None:
    for arm, gain in (("muP", 0.0), ("vectors", 0.1)):
        for lr, loss in ((0.01, 2.5), (0.02, 2.0), (0.03, 2.5)):
            write_run(tmp_path, loss - gain, arm=arm, lr=lr)
    assert s.paired_differences(point_table(tmp_path))[["measure", "doubtful"]].to_numpy().tolist() == [
        ["best_loss", 0]
    ]


def test_three_arms_are_compared_in_pairs_at_each_width_and_over_all(tmp_path: Path) -> None:
    # Best losses: at width 32 2.0, 1.9, 1.7; at width 64 1.8, 1.5, 1.6. Over both: -0.2 = (-0.1 - 0.3) / 2 and so on.
    best = {"muP": (2.0, 1.8), "muP-tuned": (1.9, 1.5), "vectors": (1.7, 1.6)}
    for arm, losses in best.items():
        for width, loss in zip((32, 64), losses, strict=True):
            sweep(tmp_path, arm, [3.0, loss, 3.0], width=width)
    table = s.paired_differences(point_table(tmp_path))
    table = table[table["measure"] == "best_loss"].set_index(["of", "against", "d_model"])
    assert table["difference"].to_dict() == pytest.approx({
        ("muP-tuned", "muP", 32): -0.1, ("muP-tuned", "muP", 64): -0.3, ("muP-tuned", "muP", "all"): -0.2,
        ("vectors", "muP", 32): -0.3, ("vectors", "muP", 64): -0.2, ("vectors", "muP", "all"): -0.25,
        ("vectors", "muP-tuned", 32): -0.2, ("vectors", "muP-tuned", 64): 0.1, ("vectors", "muP-tuned", "all"): -0.05,
    })  # fmt: skip

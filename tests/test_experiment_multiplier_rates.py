"""Rates of the multipliers: planted optima that stay or move with the width, decays that help or do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from experiment_data import evidence, outcomes, saved

from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.experiments import multiplier_rates
from lit_mult.errors import UserError

RATES, DECAYS = (2**-10, 2**-8, 2**-6, 2**-4, 2**-2), (0, 0.02, 0.08, 0.32)
Loss = Callable[[int, float, int], float]
"""Of width, value and seed."""


def optimum_at(power: float, curvature: float = 0.05) -> Loss:
    """Parabola in log2 (rate) with its vertex at 2^-6 (width / 32)^power, wherever the seed shifts it."""

    def loss(width: int, rate: float, seed: int) -> float:
        vertex = -6 + power * math.log2(width / 32) + seed / 100 * math.log2(width / 32)
        return 3 + seed / 10 + curvature * (math.log2(rate) - vertex) ** 2

    return loss


def decay_gains(gain: float) -> Loss:
    return lambda width, decay, seed: 3 + seed / 10 - (gain + seed / 1000) * (decay == 0.08) + decay / 10


def study(rate: Loss, decay: Loss, widths: tuple[int, ...] = (32, 64, 128), seeds: int = 3) -> Evidence:
    cells = []
    for arm, field, values, loss in (
        ("rate", "optim.multiplier_lr", RATES, rate),
        ("decay", "optim.multiplier_weight_decay", DECAYS, decay),
    ):
        fixed = {"optim.multiplier_lr": 2**-6, "optim.multiplier_weight_decay": 0.002}
        for width in widths:
            for value in values:
                for seed in range(seeds):
                    final = loss(width, value, seed)
                    status = "completed" if math.isfinite(final) else "diverged"
                    run = {"arm": arm, "d_model": width, "seed": seed, "final_loss": final, "status": status}
                    cells.append((run | fixed | {field: value}, ()))
    return evidence(cells)


def test_an_optimum_that_stays_and_a_decay_that_helps() -> None:
    found = multiplier_rates.findings(study(optimum_at(0), decay_gains(0.1)))
    assert outcomes(found) == ["reproduced"] * 6
    slope, carried, decay_carried, *gains = found.tables["verdicts"]["value"]
    assert slope == pytest.approx(0.01)
    assert (carried, decay_carried) == (0, 0)
    assert gains == pytest.approx([0.008 - 0.101] * 3)
    shown = found.display_tables["excess_losses"].query("arm == 'decay' and d_model == '64'")
    assert list(shown["excess"]) == ["0.0930", "0.0950", "0.0000", "0.1250"]
    assert list(found.display_tables["optimal_rates"]["log2 optimum"]) == ["-6.0000", "-5.9900", "-5.9800"]
    assert not found.warnings
    assert list(found.figures) == ["multiplier_rates"]
    saved(found)


def test_an_optimum_that_moves_and_a_decay_that_harms() -> None:
    found = multiplier_rates.findings(study(optimum_at(-1), decay_gains(-0.1)))
    assert outcomes(found) == ["contradicted"] * 2 + ["reproduced"] + ["contradicted"] * 3
    slope, carried, *_ = found.tables["verdicts"]["value"]
    assert slope == pytest.approx(-1 + 0.01)
    # At width 128 the vertex is at -8, -7.98 and -7.96, by seed: 2^-8 is best there, 2^-6 costs a parabola's height.
    assert carried == pytest.approx(sum(0.05 * ((2 - shift) ** 2 - shift**2) for shift in (0, 0.02, 0.04)) / 3)


def test_an_optimum_at_the_edge_is_a_warning_and_no_result() -> None:
    found = multiplier_rates.findings(study(optimum_at(-3), decay_gains(0.1)))
    assert outcomes(found)[0] == "undecided"
    assert any("at the edge of the grid (it may lie outside): d = 128, seed 0, 1, 2" in text for text in found.warnings)


def test_all_seeds_are_judged_at_one_value() -> None:
    # Every seed does best at a decay of its own; one for all gains a third of that.
    lucky = dict(enumerate(DECAYS[1:]))
    found = multiplier_rates.findings(
        study(optimum_at(0), lambda width, decay, seed: 3 - 0.1 * (decay == lucky[seed]) + 0.01 * (decay > 0))
    )
    assert list(found.tables["verdicts"]["value"][3:]) == pytest.approx([0.01 - 0.1 / 3] * 3)


def test_runs_that_diverged_or_lack() -> None:
    steep = optimum_at(0)
    made = study(
        lambda width, rate, seed: math.nan if rate > 0.2 and seed == 1 else steep(width, rate, seed), decay_gains(0)
    )
    found = multiplier_rates.findings(made)
    assert outcomes(found)[:2] == ["reproduced"] * 2  # far from the optimum
    assert "3 of 81 runs diverged or were pruned" in found.warnings[0]
    shown = found.display_tables["excess_losses"].query("arm == 'rate' and value == '0.25'")
    assert list(shown["excess"]) == ["n/a"] * 3
    saved(found)

    lost = multiplier_rates.findings(
        study(lambda width, rate, seed: math.nan if width == 128 else steep(width, rate, seed), decay_gains(0))
    )
    assert outcomes(lost)[:2] == ["undecided"] * 2
    saved(lost)

    begun = made.runs[(made.runs["arm"] == "rate") & (made.runs["d_model"] == 32)].iloc[:4]
    saved(multiplier_rates.findings(Evidence(made.folder, begun)))
    single = multiplier_rates.findings(study(steep, decay_gains(0), widths=(32,), seeds=1))
    assert set(outcomes(single)) == {"undecided"}
    saved(single)


def test_seeds_of_as_many_but_other_values_are_not_averaged() -> None:
    made = study(optimum_at(0), decay_gains(0.1))
    lacking = {(0, RATES[0]), (1, RATES[0]), (2, RATES[-1])}
    pairs = zip(made.runs["seed"], made.runs["optim.multiplier_lr"], strict=True)
    kept = made.runs[[pair not in lacking for pair in pairs]]
    excess = multiplier_rates.findings(Evidence(made.folder, kept)).tables["excess"].query("arm == 'rate'")
    assert (set(excess["seed"]), set(excess["value"])) == ({0, 1}, set(RATES[1:]))


def test_a_study_of_other_arms_is_refused() -> None:
    made = study(optimum_at(0), decay_gains(0.1))
    with pytest.raises(UserError, match="has the arms"):
        multiplier_rates.findings(Evidence(made.folder, made.runs.assign(arm="muP")))

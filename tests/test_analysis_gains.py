"""The loss of arms with multipliers against those without, in reports of experiments: differences by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_analysis_frame import write_run

from lit_mult.analysis.frame import load_records
from lit_mult.analysis.gains import differences, gains

HEADING = "Exploratory: loss with learnable multipliers minus without"
TIMES = "decay_times_hidden_low", "decay_times_hidden_high"


def recorded(folder: Path, arm: str, losses: list[float | None], **where: object) -> None:
    for seed, loss in enumerate(losses):
        write_run(folder, loss, arm=arm, seed=seed, **where)  # type: ignore[arg-type]


def said(folder: Path, times: float) -> list[str]:
    runs = load_records(folder)
    runs[list(TIMES)] = times
    return gains(runs).statements[HEADING]


def test_a_statement_a_pair_and_optimizer(tmp_path: Path) -> None:
    for optimizer, losses in (("adamw", [2.96, 3.05, 3.13]), ("muon", [3.06, 3.1, 3.3])):
        recorded(tmp_path, "muP", [3.0, 3.1, 3.2], optimizer=optimizer)
        recorded(tmp_path, "vectors", losses, optimizer=optimizer)
    recorded(tmp_path, "scalars", [3.5], optimizer="muon")
    # Differences -0.04, -0.05, -0.07: mean -0.05333, standard deviation 0.015275, t(0.975; 2) = 4.302653: ± 0.03795.
    # Under Muon 0.06, 0, 0.1: mean 0.05333, standard deviation 0.050332: ± 0.12503.
    assert said(tmp_path, 4.4) == [
        "scalars - muP, Muon, at equal lr: final loss +0.5000 nats per token (1 seed), no difference shown; "
        "hidden matrices at 4.4 decay times, in the balance of noise and decay.",
        "vectors - muP, AdamW, at equal lr: final loss -0.0533 [-0.0913, -0.0154] nats per token (3 seeds), **lower** "
        "with multipliers; hidden matrices at 4.4 decay times, in the balance of noise and decay.",
        "vectors - muP, Muon, at equal lr: final loss +0.0533 [-0.0717, 0.1784] nats per token (3 seeds), no "
        "difference shown; hidden matrices at 4.4 decay times, in the balance of noise and decay.",
    ]
    assert said(tmp_path, 0.4)[1].endswith("at 0.4 decay times, below the 2 from which multipliers can matter.")
    assert said(tmp_path, math.nan)[1].endswith("decay times of hidden matrices unknown.")


def test_differences_are_at_equal_rates_and_leave_out_those_that_diverged(tmp_path: Path) -> None:
    for lr, against, of in (
        (0.01, [3.0, 3.1], [2.9, 3.0]),
        (0.02, [3.0, 3.1], [3.3, 3.4]),
        (0.04, [3.0, 3.1], [2.0, None]),  # diverged: left out in both seeds
        (0.08, [3.0, 3.1], []),  # of one arm alone
    ):
        recorded(tmp_path, "muP", list(against), lr=lr)
        recorded(tmp_path, "vectors", of, lr=lr)
    write_run(tmp_path, 1.0, arm="vectors", seed=7)  # a seed that has one rate, and no partner
    (row,) = differences(load_records(tmp_path)).to_dict("records")
    assert (row["settings"], row["left_out"], row["seeds"]) == (2, 1, 2)
    assert row["difference"] == pytest.approx((-0.1 + 0.3) / 2)
    assert "(2 seeds, mean over 2 settings, 1 left out where a run diverged or was pruned)" in said(tmp_path, 3)[0]


def test_a_seed_that_lacks_a_setting_is_left_out(tmp_path: Path) -> None:
    for arm, shift in (("muP", 0.0), ("vectors", 0.1)):
        recorded(tmp_path, arm, [3.0 + shift, 3.1 + shift, 3.2 + 5 * shift], lr=0.01)
        recorded(tmp_path, arm, [3.0 + shift, 3.1 + shift], lr=0.02)
    (row,) = differences(load_records(tmp_path)).to_dict("records")
    assert (row["settings"], row["seeds"], row["difference"]) == (2, 2, pytest.approx(0.1))


def test_nothing_is_said_without_a_pair(tmp_path: Path) -> None:
    recorded(tmp_path, "vectors", [3.0, 3.1])
    recorded(tmp_path, "scalars", [3.0, 3.1])
    assert not gains(load_records(tmp_path)).statements
    recorded(tmp_path, "muP", [None, None])
    assert said(tmp_path, 3) == [
        f"{arm} - muP, AdamW, at equal lr: no seed has all settings of both arms without a run that diverged or was "
        "pruned."
        for arm in ("scalars", "vectors")
    ]

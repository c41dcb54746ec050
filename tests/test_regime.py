"""How far a run takes its matrices towards the balance of noise and decay: by hand, in records and in their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from record_data import make_record
from tiny_runs import Tiny

from lit_mult.analysis.frame import load_records
from lit_mult.config import RunConfig, ScheduleConfig
from lit_mult.method.plan import plan_run
from lit_mult.method.regime import matrix_regimes
from lit_mult.method.schedule import main_stage, peak_steps
from lit_mult.registry.roles import HIDDEN_ROLES, MATRIX_ROLES, Role
from lit_mult.schema import MatrixRegime, RunRecord
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run

LR_WIDTH = {"train.steps": 600, "optim.lr": 2**-7}
"""Of the study lr_width, near its best rates. wsd has 60 steps of warmup and 100 of decay, so 440 at the peak rate."""


def regimes(**settings: Any) -> dict[Role, MatrixRegime]:
    """Of the settings of `LR_WIDTH` with others in their place; double underscores stand for dots."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config = RunConfig().with_overrides(LR_WIDTH | named)
    return matrix_regimes(config, plan_run(config, vocab_size=100))


def decay_times(**settings: Any) -> dict[str, float | None]:
    """Of query, embedding and head."""
    found = regimes(**settings)
    return {role.value: found[role].decay_times for role in (Role.Q_PROJ, Role.EMBEDDING, Role.LM_HEAD)}


# Factors of cosine from 1 to 0 in four steps: (1 + cos(pi k / 4)) / 2 for k = 1 ... 4, and the cosines add up to -1.
# Of linear from 1 to 1/2 in two: 3/4 and 1/2.
@pytest.mark.parametrize(
    ("settings", "steps", "stage", "length"),
    [
        ({}, 600, range(60, 500), 440),
        ({"decay_fraction": 0.0}, 600, range(60, 600), 540),
        ({"name": "constant"}, 600, range(60, 600), 540),
        ({"name": "cosine", "warmup_fraction": 0.5, "final_ratio": 0.0}, 8, range(4, 8), 1.5),
        ({"name": "linear", "warmup_fraction": 0.0, "final_ratio": 0.5}, 2, range(2), 1.25),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.5}, 10, range(5, 5), 0),
    ],
)
def test_steps_at_the_peak_rate(settings: dict[str, Any], steps: int, stage: range, length: float) -> None:
    schedule = ScheduleConfig.model_validate(settings)
    assert main_stage(steps, schedule) == stage
    assert peak_steps(steps, schedule) == pytest.approx(length, rel=1e-12)


def test_by_width_under_adamw() -> None:
    # 2^-7 * 0.1 * 440 = 0.34375, and the lr of hidden matrices and head falls as 1 / m.
    for width, hidden in ((32, 0.34375), (64, 0.171875), (128, 0.0859375)):
        found = regimes(model__d_model=width)
        for role in HIDDEN_ROLES | {Role.LM_HEAD}:
            assert found[role].decay_times == pytest.approx(hidden)
            assert found[role].equilibrium_time == pytest.approx(1280 * width / 32)  # 1 / (2^-7 * 0.1)
        assert found[Role.EMBEDDING] == regimes()[Role.EMBEDDING]
        assert found[Role.EMBEDDING].decay_times == pytest.approx(0.34375)


def test_by_width_rule_and_optimizer() -> None:
    # m = 4. lr_wd decays more as the lr falls, multiplier scales neither. Muon's lr of hidden matrices is 1 / sqrt(m).
    equal = pytest.approx(dict.fromkeys(("q_proj", "embedding", "lm_head"), 0.34375))
    assert decay_times(model__d_model=128, parametrization__width_rule="lr_wd") == equal
    assert decay_times(model__d_model=128, parametrization__width_rule="multiplier") == equal
    expected = {"q_proj": 0.34375 / 2, "embedding": 0.34375, "lm_head": 0.34375 / 4}
    assert decay_times(model__d_model=128, optimizer="muon") == pytest.approx(expected)


def test_independent_decay_takes_as_long_at_every_rate_and_width() -> None:
    for lr in (0.001, 0.1):
        found = regimes(
            optim__lr=lr, optim__weight_decay=0.01, optim__weight_decay_mode="independent", model__d_model=64
        )
        assert [one.decay_times for one in found.values()] == pytest.approx([0.01 * 440] * 9)
        assert [one.equilibrium_time for one in found.values()] == pytest.approx([100] * 9)


def test_factors_of_roles_count() -> None:
    # At the default width 64: m = 2.
    found = regimes(parametrization__lr={"q_proj": 2.0}, parametrization__weight_decay={"q_proj": 3.0, "v_proj": 0.0})
    assert found[Role.Q_PROJ].decay_times == pytest.approx(6 * 0.171875)
    assert found[Role.K_PROJ].decay_times == pytest.approx(0.171875)
    assert found[Role.V_PROJ] == MatrixRegime(equilibrium_time=None, decay_times=0.0)


def test_without_decay_there_is_no_balance() -> None:
    none = MatrixRegime(equilibrium_time=None, decay_times=0.0)
    assert set(regimes(optim__weight_decay=0.0).values()) == {none}
    # Hyperball holds the norms of hidden matrices and head; the embedding is AdamW's.
    found = regimes(optimizer="hyperball")
    unbalanced = {role for role, one in found.items() if one == MatrixRegime(equilibrium_time=None, decay_times=None)}
    assert unbalanced == HIDDEN_ROLES | {Role.LM_HEAD}
    assert found[Role.EMBEDDING].decay_times == pytest.approx(0.34375)


def test_a_tied_head_is_the_embedding() -> None:
    assert list(regimes(model__tie_embeddings=True)) == [
        role for role in Role if role in {Role.EMBEDDING, *HIDDEN_ROLES}
    ]


def test_the_record_of_a_run_has_its_regime_alone_and_in_a_stack(tiny: Tiny, tmp_path: Path) -> None:
    # 12 steps: round(1.2) = 1 of warmup, 2 of decay; m = 2.
    configs = [tiny({"optim.lr": lr, "optim.weight_decay": 0.5}) for lr in (0.01, 0.02)]
    records = [run(configs[0], tmp_path / "alone")]
    records += run_stack([Member(config, tmp_path / str(config.optim.lr)) for config in configs])
    for record, lr in zip(records, (0.01, 0.01, 0.02), strict=True):
        assert list(record.regime) == [role.value for role in Role if role in MATRIX_ROLES]
        assert record.regime["embedding"].decay_times == pytest.approx(lr * 0.5 * 9)
        assert record.regime["o_proj"].decay_times == pytest.approx(lr / 2 * 0.5 * 9)
        assert record.regime["o_proj"].equilibrium_time == pytest.approx(4 / lr)
    assert RunRecord.read(tmp_path / "alone" / "record.json") == records[0]


def columns(folder: Path) -> dict[str, Any]:
    (row,) = load_records(folder).to_dict("records")
    return {name: value for name, value in row.items() if name.startswith(("decay_times", "equilibrium"))}


def write(folder: Path, config: RunConfig, **changes: Any) -> Path:
    """The record of a run from before records had a regime, unless `changes` has it."""
    data = make_record(config, 2.0).model_dump(mode="json")
    del data["regime"]
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(data | changes))
    return folder


def test_an_older_record_has_the_columns_of_a_new_one(tmp_path: Path) -> None:
    settings = {"model.d_model": 64, "parametrization.lr": {"q_proj": 2.0}, "multipliers": "vector"}
    config = RunConfig().with_overrides(LR_WIDTH | settings)
    new = {role.value: one.model_dump() for role, one in matrix_regimes(config, plan_run(config, 100)).items()}
    expected = {
        "decay_times_hidden_low": 0.171875, "decay_times_hidden_high": 0.34375,
        "decay_times_head": 0.171875, "decay_times_embedding": 0.34375,
        "equilibrium_hidden_low": 1280, "equilibrium_hidden_high": 2560,
        "equilibrium_head": 2560, "equilibrium_embedding": 1280,
    }  # fmt: skip
    old = write(tmp_path / "old", config)
    assert RunRecord.read(old / "record.json").regime == {}
    assert columns(old) == pytest.approx(expected)
    assert columns(write(tmp_path / "new", config, regime=new)) == pytest.approx(expected)


def test_what_a_record_says_counts_before_what_its_config_says(tmp_path: Path) -> None:
    said = {"q_proj": {"equilibrium_time": 10.0, "decay_times": 7.0}}
    found = columns(write(tmp_path / "run", RunConfig(), regime=said))
    assert found["decay_times_hidden_low"] == found["decay_times_hidden_high"] == 7
    assert found["decay_times_head"] != found["decay_times_head"]  # NaN


def test_a_run_whose_plan_is_not_at_hand_has_no_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "plugin", RunConfig()) / "record.json"
    path.write_text(path.read_text().replace('"adamw"', '"lion"'))  # of a package that is not installed
    found = columns(path.parent)
    assert all(value != value for value in found.values())
    hyperball = columns(write(tmp_path / "hyperball", RunConfig(optimizer="hyperball")))
    assert [name for name, value in hyperball.items() if value == value] == [
        "decay_times_embedding", "equilibrium_embedding",
    ]  # fmt: skip

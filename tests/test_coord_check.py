"""The coordinate check: right rules pass, and each of three planted faults fails where it should."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lit_mult.analysis.exponents import exponents
from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.diagnostics.coordinates import Coordinate, over_layers
from lit_mult.method import plan, rules
from lit_mult.method.expectations import depth_exponent, expected_exponent
from lit_mult.registry.roles import Role

Check = Callable[..., tuple[int, dict[tuple[str, str], str]]]


@pytest.fixture
def check(text_file: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Exit code, and verdict by (kind, coordinate)."""

    def run(*options: str) -> tuple[int, dict[tuple[str, str], str]]:
        tiny = "--model.n_layers 1 --model.head_dim 8 --parametrization.base_d_model 8 --data.seq_len 16"
        size = "--train.batch_size 4 --widths 16,32,64,128,256 --seeds 2 --steps 4 --optim.lr 0.01"
        schedule = "--schedule.name constant --schedule.warmup_fraction 0"
        code = main(["coord-check", *f"{tiny} {size} {schedule} --data.corpus {text_file}".split(), *options])
        rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]
        return code, {(row[0], row[1]): row[-1] for row in rows if row[-1] in ("PASS", "FAIL")}

    return run


def test_json_has_the_numbers_of_the_table(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--model.n_layers 1 --model.head_dim 8 --parametrization.base_d_model 8 --data.seq_len 16 --widths 8,16,32"
    of_check = f"coord-check {tiny} --train.batch_size 4 --seeds 1 --steps 1 --data.corpus {text_file}".split()
    code = main(of_check)
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]

    assert main([*of_check, "--out", str(tmp_path), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("size", "sizes", "steps", "seeds")] == ["width", [8, 16, 32], 1, 1]
    shown = [(row["kind"], row["coordinate"], f"{row['exponent']:.2f}", row["verdict"]) for row in found["exponents"]]
    assert shown == [(kind, coordinate, exponent, verdict) for kind, coordinate, exponent, *_, verdict in rows]
    assert {row["exponent_low"] for row in found["exponents"]} == {None}  # one seed has no interval
    assert (tmp_path / "exponents.csv").is_file()


def failed(verdicts: dict[tuple[str, str], str]) -> set[tuple[str, str]]:
    return {key for key, verdict in verdicts.items() if verdict == "FAIL"}


@pytest.mark.parametrize("width_rule", ["lr", "lr_wd", "lr_sqrt_wd", "multiplier"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_width_rule_passes(check: Check, optimizer: str, width_rule: str) -> None:
    code, verdicts = check("--optimizer", optimizer, "--parametrization.width_rule", width_rule)

    assert failed(verdicts) == set()
    assert code == 0
    assert {kind for kind, _ in verdicts} == {"start", "change", "update", "decay"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learnable_multipliers_pass(check: Check, optimizer: str) -> None:
    code, verdicts = check("--optimizer", optimizer, "--multipliers", "vector")
    assert (code, failed(verdicts)) == (0, set())


def test_the_standard_parametrization_fails(check: Check) -> None:
    code, verdicts = check("--parametrization.rule", "standard", "--optim.lr", "0.001")
    assert code == 1
    assert {("change", "logits"), ("update", "layers.0.mlp.down_proj")} <= failed(verdicts)


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Role, rules.Scaling], rules.Scaling]) -> None:
    right = rules.scaling
    monkeypatch.setattr(plan, "scaling", lambda role, *rest: fault(role, right(role, *rest)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_that_was_not_scaled_is_caught(
    check: Check, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    plant(monkeypatch, lambda role, scaling: replace(scaling, weight_decay=1.0))
    code, verdicts = check("--optimizer", optimizer, "--parametrization.width_rule", "lr_wd")

    assert code == 1
    assert {kind for kind, _ in failed(verdicts)} == {"decay"}
    assert ("decay", "layers.0.mlp.down_proj") in failed(verdicts)
    assert ("decay", "embed_tokens") not in failed(verdicts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_multiplier_left_out_of_the_rule_is_caught(
    check: Check, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    plant(monkeypatch, lambda role, scaling: replace(scaling, forward=1.0))
    code, verdicts = check("--optimizer", optimizer, "--parametrization.width_rule", "multiplier")

    assert code == 1
    assert {("start", "layers.0.self_attn"), ("start", "layers.0.mlp")} <= failed(verdicts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_group_with_the_wrong_rate_is_caught_where_it_is(
    check: Check, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    plant(monkeypatch, lambda role, scaling: replace(scaling, lr=1.0) if role is Role.K_PROJ else scaling)
    code, verdicts = check("--optimizer", optimizer, "--parametrization.width_rule", "lr_wd")

    assert code == 1
    assert ("update", "layers.0.self_attn.k_proj") in failed(verdicts)
    assert not {("update", "layers.0.self_attn.q_proj"), ("update", "layers.0.mlp.down_proj")} & failed(verdicts)


@pytest.fixture
def check_depth(text_file: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """The same over depth."""

    def run(*options: str) -> tuple[int, dict[tuple[str, str], str]]:
        tiny = "--model.d_model 32 --model.head_dim 8 --parametrization.base_d_model 32 --data.seq_len 16"
        size = "--train.batch_size 8 --depths 2,4,8 --seeds 2 --steps 3 --optim.lr 0.002"
        schedule = "--schedule.name constant --schedule.warmup_fraction 0"
        code = main(["coord-check", *f"{tiny} {size} {schedule} --data.corpus {text_file}".split(), *options])
        rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]
        return code, {(row[0], row[1]): row[-1] for row in rows if row[-1] in ("PASS", "FAIL")}

    return run


READERS = {f"layers.*.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}
ENDS = {"layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"}
BRANCHES = {"layers.*.self_attn", "layers.*.mlp"}


@pytest.mark.parametrize("rule", ["depth_mup", "completep"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_depth_rules_pass(check_depth: Check, optimizer: str, rule: str) -> None:
    code, verdicts = check_depth("--optimizer", optimizer, "--parametrization.depth_rule", rule)

    assert (code, failed(verdicts)) == (0, set())
    assert {("start", "last block"), ("change", "last block"), ("change", "logits")} < verdicts.keys()


@pytest.mark.parametrize("rule", ["depth_mup", "completep"])
@pytest.mark.parametrize(("optimizer", "lr"), [("normuon", 0.002), ("scion", 3e-4), ("scion-sign", 3e-5)])
def test_depth_rules_pass_under_kin_of_muon(check_depth: Check, optimizer: str, lr: float, rule: str) -> None:
    options = ("--optimizer", optimizer, "--optim.lr", str(lr), "--parametrization.depth_rule", rule)
    code, verdicts = check_depth(*options, "--optim.weight_decay_mode", "timescale", "--optim.weight_decay", "1e-4")
    assert (code, failed(verdicts)) == (0, set())


@pytest.mark.parametrize("options", [["--multipliers", "vector"], ["--optimizer", "hyperball"]])
def test_depth_rules_pass_with_multipliers_and_on_spheres(check_depth: Check, options: list[str]) -> None:
    rule = "hyperp" if "hyperball" in options else "completep"
    code, verdicts = check_depth(*options, "--parametrization.depth_rule", rule)
    assert (code, failed(verdicts)) == (0, set())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_depth_without_a_rule_fails(check_depth: Check, optimizer: str) -> None:
    code, verdicts = check_depth("--optimizer", optimizer)
    assert code == 1
    assert {("start", name) for name in BRANCHES} | {("update", name) for name in ENDS} <= failed(verdicts)


DepthFault = Callable[[float, rules.DepthScaling], rules.DepthScaling]


def plant_depth(monkeypatch: pytest.MonkeyPatch, fault: DepthFault) -> None:
    right = rules.depth_scaling
    monkeypatch.setattr(plan, "depth_scaling", lambda n_layers, *rest: fault(n_layers / 2, right(n_layers, *rest)))


@pytest.mark.parametrize(("optimizer", "rule"), [("adamw", "completep"), ("muon", "depth_mup")])
@pytest.mark.parametrize("power", [-0.5, 0.5])
def test_a_rate_with_the_wrong_exponent_in_the_depth_is_caught(
    check_depth: Check, monkeypatch: pytest.MonkeyPatch, optimizer: str, rule: str, power: float
) -> None:
    plant_depth(monkeypatch, lambda depth, scaling: replace(scaling, lr=scaling.lr * depth**power))
    code, verdicts = check_depth("--optimizer", optimizer, "--parametrization.depth_rule", rule)

    assert code == 1
    assert {(kind, name) for kind in ("update", "decay") for name in READERS | ENDS} <= failed(verdicts)
    assert "start" not in {kind for kind, _ in failed(verdicts)}


@pytest.mark.parametrize(("rule", "power"), [("depth_mup", -0.5), ("completep", 0.5)])
def test_a_branch_with_the_wrong_exponent_in_the_depth_is_caught(
    check_depth: Check, monkeypatch: pytest.MonkeyPatch, rule: str, power: float
) -> None:
    plant_depth(monkeypatch, lambda depth, scaling: replace(scaling, branch=scaling.branch * depth**power))
    code, verdicts = check_depth("--parametrization.depth_rule", rule)

    assert code == 1
    assert {("start", name) for name in BRANCHES} | {("update", name) for name in ENDS} <= failed(verdicts)
    assert "decay" not in {kind for kind, _ in failed(verdicts)}


def test_layers_of_any_number_have_the_same_coordinates() -> None:
    # attention RMS 3 and 4 in two layers: sqrt((9 + 16) / 2); of the blocks themselves the last one's
    found: list[Coordinate] = [
        ("start", "layers.0.self_attn", "", 3.0),
        ("start", "layers.0", "", 5.0),
        ("start", "layers.1.self_attn", "", 4.0),
        ("start", "layers.1", "", 7.0),
        ("start", "norm", "", 1.0),
    ]
    assert [(name, value) for _, name, _, value in over_layers(found)] == [
        ("layers.*.self_attn", pytest.approx(math.sqrt(12.5))),
        ("last block", 7.0),
        ("norm", 1.0),
    ]


def test_the_exponent_is_fitted_on_the_larger_widths() -> None:
    """value = width^-1 below 64 and constant from there on."""
    rows = [
        {"width": width, "seed": seed, "kind": "change", "coordinate": "x", "low": 0.0, "high": 0.0}
        | {"value": max(64 / width, 1.0) * (1 + seed)}
        for width in (16, 32, 64, 128, 256)
        for seed in (0, 1)
    ]
    (row,) = exponents(pd.DataFrame(rows)).itertuples(index=False)
    assert (row.exponent, row.verdict) == (pytest.approx(0, abs=1e-12), "PASS")

    rows[-1]["value"] = float("nan")
    assert exponents(pd.DataFrame(rows))["verdict"].tolist() == ["FAIL"]


@pytest.mark.parametrize(("command", "sizes"), [("check", "--widths 16,32,64"), ("check_depth", "--depths 1,2,3")])
def test_tables_and_figure_are_written(
    command: str, sizes: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(command)("--out", str(tmp_path / "out"), "--steps", "1", *sizes.split())

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"coordinates.csv", "exponents.csv", "coordinates.png"}
    assert (tmp_path / "out" / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    size = sizes.split()[0].strip("-").rstrip("s")
    assert (tmp_path / "out" / "coordinates.csv").read_text().startswith(f"{size},seed,kind,coordinate,role,value,")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--widths", "32,64"], "--widths 32,64: must be three or more"),
        (["--widths", "32,wide,64"], "three or more different whole numbers"),
        (["--widths", "32,64,100"], "model.d_model = 100: must be a multiple"),
        (["--depths", "2,4"], "--depths 2,4: must be three or more"),
        (["--depths", "0,2,4"], "model.n_layers = 0: input should be greater than 0"),
        (["--depths", "2,4,8", "--widths", "32,64,128"], "--depths 2,4,8: must be left out with --widths"),
    ],
)
def test_bad_widths_are_one_line(options: list[str], said: str, refused: Callable[..., str]) -> None:
    assert said in refused("coord-check", *options)


def test_expectations_know_the_config() -> None:
    config: Any = RunConfig.from_dict({"optimizer": "muon"})
    assert expected_exponent(config, "decay", "layers.0.mlp.up_proj", "up_proj") == (-0.5, -0.5)
    assert expected_exponent(config, "decay", "lm_head", "lm_head") == (-1.0, -1.0)
    root = config.with_overrides({"parametrization.width_rule": "lr_sqrt_wd"})
    assert expected_exponent(root, "decay", "layers.0.mlp.up_proj", "up_proj") == (-0.25, -0.25)
    cautious = root.with_overrides({"optim.weight_decay_mode": "cautious"})
    assert expected_exponent(cautious, "decay", "lm_head", "lm_head") == (-0.5, -0.5)
    timescale = root.with_overrides({"optim.weight_decay_mode": "timescale"})
    assert expected_exponent(timescale, "decay", "lm_head", "lm_head") == (0.0, 0.0)
    independent = config.with_overrides({"optim.weight_decay_mode": "independent"})
    assert expected_exponent(independent, "decay", "lm_head", "lm_head") == (0.0, 0.0)


def test_depth_expectations_know_the_config() -> None:
    up = ("decay", "layers.*.mlp.up_proj", "up_proj")
    config: Any = RunConfig.from_dict({"parametrization": {"depth_rule": "depth_mup"}})
    assert depth_exponent(config, *up) == (-0.5, -0.5)
    assert depth_exponent(config, "decay", "lm_head", "lm_head") == (0.0, 0.0)
    for mode, expected in {"independent": 0.0, "timescale": 0.0, "corrected": -0.5, "cautious": -0.5}.items():
        other = config.with_overrides({"optim.weight_decay_mode": mode})
        assert depth_exponent(other, *up) == (expected, expected)
    scion = config.with_overrides({"optimizer": "scion", "optim.weight_decay_mode": "timescale"})
    assert depth_exponent(scion, *up) == (-0.5, -0.5)  # its decay is its own: 1 per lr
    assert depth_exponent(config.with_overrides({"parametrization.depth_rule": "completep"}), *up) == (0.0, 0.0)

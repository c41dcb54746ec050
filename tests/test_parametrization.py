"""Scaling with width, presets and the plan of a run: numbers derived by hand.

The model goes from width 32 to 128 with heads of 32, a gated MLP twice as wide and 64 tokens, so that m = 4:

    matrix        base (d_out, d_in)    wide (d_out, d_in)
    embedding     (64, 32)              (64, 128)
    q, k, v, o    (32, 32)              (128, 128)
    gate, up      (64, 32)              (256, 128)
    down          (32, 64)              (128, 256)
    lm_head       (64, 32)              (64, 128)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_mult.config import ParametrizationConfig, RunConfig, Tier
from lit_mult.errors import ConfigError, UserError
from lit_mult.method import presets
from lit_mult.method.plan import RunPlan, plan_run
from lit_mult.method.presets import Preset, RoleMultipliers, apply_preset, inlined, load_preset, run_multipliers
from lit_mult.method.rules import Scaling, scaling, width_factor
from lit_mult.method.search_space import neutral, search_space
from lit_mult.registry.contracts import Axis
from lit_mult.registry.roles import MATRIX_ROLES, Role
from lit_mult.schema import Tuning

VOCAB = 64
MODEL = {"n_layers": 1, "head_dim": 32, "mlp_ratio": 2.0}
RULES = ["lr", "lr_wd", "multiplier"]
ATTENTION_AND_MLP_IN = (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ, Role.O_PROJ, Role.GATE_PROJ, Role.UP_PROJ)


def plan(d_model: int = 128, parametrization: Mapping[str, Any] | None = None, **settings: Any) -> RunPlan:
    settings["model"] = MODEL | {"d_model": d_model} | settings.get("model", {})
    return plan_run(RunConfig.from_dict(settings | {"parametrization": parametrization or {}}), VOCAB)


def scalings(optimizer: str, d_model: int = 128, **parametrization: Any) -> dict[Role, Scaling]:
    model = RunConfig.from_dict({"model": MODEL | {"d_model": d_model}}).model
    wide, base = model.matrix_shapes(VOCAB), model.model_copy(update={"d_model": 32}).matrix_shapes(VOCAB)
    config = ParametrizationConfig.model_validate(parametrization)
    return {role: scaling(role, wide[role], base[role], optimizer, config) for role in wide}  # type: ignore[arg-type]


def by_role(run: RunPlan) -> dict[Role, Any]:
    return {matrix.role: matrix for matrix in run.matrices.values()}


# Standard deviations of the effective matrices. Standard: 1/sqrt(d_in), with d_in = 128, and 256 for down.
# muP: the same but for the head, sqrt(32)/128 = 1/sqrt(32)/4.
STD = dict.fromkeys(MATRIX_ROLES, 1 / math.sqrt(128)) | {Role.EMBEDDING: 1.0, Role.DOWN_PROJ: 1 / 16}
MUP_STD = STD | {Role.LM_HEAD: math.sqrt(32) / 128}

# The factor of an update. AdamW: base d_in / d_in = 1/4 for every hidden matrix and the head (32/128, and 64/256).
# Muon: sqrt(d_out / d_in / max(d_out, d_in)) over the same at base width,
#   q, k, v, o   sqrt(1/128) / sqrt(1/32)                     = sqrt(1/4) = 1/2
#   gate, up     sqrt(256/128/256) / sqrt(64/32/64)           = sqrt(1/4) = 1/2
#   down         sqrt(128/256/256) / sqrt(32/64/64)           = sqrt(1/4) = 1/2
# and the head, under AdamW, 1/4. The embedding's input is one-hot: 1.
ADAMW_FACTOR = dict.fromkeys(MATRIX_ROLES, 1 / 4) | {Role.EMBEDDING: 1.0}
MUON_FACTOR = dict.fromkeys(MATRIX_ROLES, 1 / 2) | {Role.EMBEDDING: 1.0, Role.LM_HEAD: 1 / 4}
FACTORS = {"adamw": ADAMW_FACTOR, "muon": MUON_FACTOR}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_standard_scales_nothing_but_the_init(optimizer: str) -> None:
    for rule in RULES:
        for role, got in scalings(optimizer, rule="standard", width_rule=rule).items():
            assert got == Scaling(init_std=pytest.approx(STD[role]), lr=1.0, weight_decay=1.0, forward=1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rule_lr_shrinks_the_rate(optimizer: str) -> None:
    for role, got in scalings(optimizer, rule="mup", width_rule="lr").items():
        factor = FACTORS[optimizer][role]
        assert got == Scaling(pytest.approx(MUP_STD[role]), lr=pytest.approx(factor), weight_decay=1.0, forward=1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rule_lr_wd_raises_the_decay_as_the_rate_shrinks(optimizer: str) -> None:
    # AdamW: rate 1/4, decay 4; Muon: rate 1/2, decay 2, and 1/4 and 4 for its head
    for role, got in scalings(optimizer, rule="mup", width_rule="lr_wd").items():
        factor = FACTORS[optimizer][role]
        assert got == Scaling(pytest.approx(MUP_STD[role]), pytest.approx(factor), pytest.approx(1 / factor), 1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rule_multiplier_shrinks_the_forward_factor_alone(optimizer: str) -> None:
    # W is drawn larger by the factor that the forward takes away: the head at sqrt(32)/128 * 4 = 1/sqrt(32),
    # its std at base width
    for role, got in scalings(optimizer, rule="mup", width_rule="multiplier").items():
        factor = FACTORS[optimizer][role]
        assert got == Scaling(pytest.approx(MUP_STD[role] / factor), 1.0, 1.0, forward=pytest.approx(factor))
    assert scalings("adamw", rule="mup", width_rule="multiplier")[Role.LM_HEAD].init_std == pytest.approx(32**-0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("d_model", [32, 64, 128, 512])
def test_identities_of_table_1(optimizer: str, d_model: int) -> None:
    lr, lr_wd, multiplier = (scalings(optimizer, d_model, rule="mup", width_rule=rule) for rule in RULES)
    for role in MATRIX_ROLES:
        update = [rule[role].lr * rule[role].forward for rule in (lr, lr_wd, multiplier)]
        assert update == pytest.approx([update[0]] * 3)  # the effective matrix moves alike
        start = [rule[role].init_std * rule[role].forward for rule in (lr, lr_wd, multiplier)]
        assert start == pytest.approx([start[0]] * 3)  # and starts alike
        shrink = [rule[role].lr * rule[role].weight_decay for rule in (lr, lr_wd, multiplier)]
        assert shrink == pytest.approx([update[0], 1.0, 1.0])  # a step's decay is constant in width but for "lr"


@pytest.mark.parametrize("width_rule", RULES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_at_base_width_mup_is_standard(optimizer: str, width_rule: str, tied: bool) -> None:
    settings = {"optimizer": optimizer, "model": {"tie_embeddings": tied}}
    mup = plan(32, {"rule": "mup", "width_rule": width_rule}, **settings)
    assert mup == plan(32, {"rule": "standard"}, **settings)


def test_muon_factor_follows_both_sides_of_the_matrix() -> None:
    # wide (64, 256): sqrt(64/256/256) = 1/32; base (64, 32): sqrt(64/32/64) = 1/sqrt(32); ratio sqrt(32)/32
    config = ParametrizationConfig()
    assert width_factor(Role.UP_PROJ, (64, 256), (64, 32), "muon", config) == pytest.approx(1 / math.sqrt(32))
    # wide (256, 64): sqrt(256/64/256) = 1/8; base (32, 64): sqrt(32/64/64) = 1/sqrt(128); ratio sqrt(2)
    assert width_factor(Role.UP_PROJ, (256, 64), (32, 64), "muon", config) == pytest.approx(math.sqrt(2))
    assert width_factor(Role.UP_PROJ, (64, 256), (64, 32), "adamw", config) == 1 / 8
    for role in (Role.EMBEDDING, Role.NORM, Role.MULTIPLIER):
        assert width_factor(role, (64, 256), (64, 32), "muon", config) == 1.0


def test_plan_multiplies_base_rate_rule_and_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("name: mine\nsource: a test\nlr: {q_proj: 3}\nweight_decay: {q_proj: 5, v_proj: 0}\n")
    settings = {"optim": {"lr": 2**-6, "weight_decay": 0.1}}
    roles = by_role(plan(parametrization={"width_rule": "lr_wd", "preset": str(preset)}, **settings))
    assert roles[Role.Q_PROJ].lr == pytest.approx(2**-6 / 4 * 3)
    assert roles[Role.Q_PROJ].weight_decay == pytest.approx(0.1 * 4 * 5)
    assert roles[Role.K_PROJ].lr == pytest.approx(2**-6 / 4)
    assert roles[Role.K_PROJ].weight_decay == pytest.approx(0.4)
    assert roles[Role.V_PROJ].weight_decay == 0.0
    assert roles[Role.EMBEDDING].lr == 2**-6
    assert roles[Role.EMBEDDING].weight_decay == pytest.approx(0.1)


def test_muon_takes_the_hidden_matrices_alone() -> None:
    optimizers = {role: matrix.optimizer for role, matrix in by_role(plan(optimizer="muon")).items()}
    assert {role for role, name in optimizers.items() if name == "adamw"} == {Role.EMBEDDING, Role.LM_HEAD}
    assert {matrix.optimizer for matrix in plan().matrices.values()} == {"adamw"}


@pytest.mark.parametrize("lr", [2**-4, 2**-8])
def test_independent_decay_does_not_depend_on_any_rate(lr: float) -> None:
    optim = {"lr": lr, "weight_decay": 0.01, "weight_decay_mode": "independent", "multiplier_weight_decay": 0.002}
    for width_rule in ("lr", "lr_wd", "multiplier"):
        run = plan(parametrization={"width_rule": width_rule}, optim=optim)
        # a step shrinks by lr * weight_decay as the optimizer takes them: 0.01 for each, at four times the base width
        assert all(matrix.lr * matrix.weight_decay == pytest.approx(0.01) for matrix in run.matrices.values())
        assert run.multiplier.lr * run.multiplier.weight_decay == pytest.approx(0.002)
        assert run.norm.weight_decay == 0.0


def test_rates_of_vectors_are_absolute_or_relative_to_the_base_rate() -> None:
    absolute = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "multiplier_lr": 0.25})
    assert (absolute.norm.lr, absolute.multiplier.lr) == (0.5, 0.25)
    relative = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "multiplier_lr": 0.25, "vector_lr_mode": "relative"})
    assert (relative.norm.lr, relative.multiplier.lr) == (2**-7, 2**-8)
    shared = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "vector_lr_mode": "relative"})
    assert shared.norm.lr == shared.multiplier.lr == 2**-7
    assert shared.multiplier.weight_decay == 2e-3  # the paper's, sec. 4.1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_of_norms_and_matrices_are_equal_in_every_arm(optimizer: str) -> None:
    arms = [plan(multipliers=kind, optimizer=optimizer) for kind in ("none", "fixed", "scalar", "vector")]
    for arm in arms:
        assert arm.norm == arms[0].norm
        for name, matrix in arm.matrices.items():
            same = arms[0].matrices[name]
            assert (matrix.lr, matrix.weight_decay, matrix.init_std) == (same.lr, same.weight_decay, same.init_std)


def test_rates_of_vectors_do_not_change_with_width() -> None:
    for rule in RULES:
        narrow, wide = (plan(d, {"width_rule": rule}, multipliers="vector") for d in (32, 128))
        assert (narrow.norm, narrow.multiplier) == (wide.norm, wide.multiplier)


@pytest.mark.parametrize("rule", ["standard", "mup"])
def test_a_tied_head_is_scaled_by_its_constant(rule: str) -> None:
    # the embedding starts at std 0.5, the untied head would at sqrt(32)/128 (mup) or 1/sqrt(128) (standard)
    std = math.sqrt(32) / 128 if rule == "mup" else 1 / math.sqrt(128)
    for width_rule in RULES:
        run = plan(
            128,
            {"rule": rule, "width_rule": width_rule, "embedding_std": 0.5},
            model={"tie_embeddings": True},
        )
        assert run.matrices["lm_head"].constant == pytest.approx(std / 0.5)
        assert run.matrices["embed_tokens"].constant == 1.0


def test_attention_scale() -> None:
    assert plan().attention_scale == pytest.approx(32**-0.5)
    assert plan(parametrization={"attention_scale": "1/head_dim"}).attention_scale == 1 / 32


# Forward multipliers in the configuration of the released Falcon-H1-0.5B.
FALCON = {
    Role.EMBEDDING: 5.656854,
    Role.LM_HEAD: 0.0390625,
    Role.K_PROJ: 0.390625,
    Role.O_PROJ: 0.9375,
    Role.GATE_PROJ: 0.883883,
    Role.DOWN_PROJ: 0.5859375,
}


def test_falcon_preset_holds_the_released_values() -> None:
    preset = load_preset("falcon-h1-0.5b")
    assert preset.forward == FALCON
    assert preset.lr == preset.weight_decay == {}
    assert load_preset("neutral").forward == {}


def test_fixed_multipliers_are_the_presets_times_the_width_rules() -> None:
    falcon = {"preset": "falcon-h1-0.5b", "width_rule": "multiplier"}
    roles = by_role(plan(128, falcon, multipliers="fixed"))
    for role, matrix in roles.items():
        assert matrix.constant == pytest.approx(FALCON.get(role, 1.0) * ADAMW_FACTOR[role])
        assert matrix.start == {}
    assert all(by_role(plan(128, falcon))[role].constant == ADAMW_FACTOR[role] for role in roles)  # none: rule alone


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_learnable_multipliers_start_at_one_or_at_the_preset(kind: str) -> None:
    falcon = {"preset": "falcon-h1-0.5b"}
    for matrix in plan(128, falcon, multipliers=kind).matrices.values():
        assert matrix.constant == 1.0
        assert set(matrix.start.values()) <= {1.0}
    started = by_role(plan(128, falcon, multipliers=kind, placement={"init": "preset"}))
    first = Axis.SCALAR if kind == "scalar" else Axis.ROW
    for role, matrix in started.items():
        assert set(matrix.start) == matrix.axes
        if role is Role.LM_HEAD:  # no multiplier stands there: the preset stays a constant
            assert (matrix.start, matrix.constant) == ({}, 0.0390625)
        else:  # one axis carries the value, the others start at 1
            assert matrix.start.pop(first) == FALCON.get(role, 1.0)
            assert set(matrix.start.values()) <= {1.0}
            assert matrix.constant == 1.0


@pytest.mark.parametrize(
    ("tier", "lr", "weight_decay", "forward"),
    [("NONE", 1, 1, 1), ("LR", 3, 1, 1), ("LRWD", 3, 5, 1), ("FULL", 3, 5, 7)],
)
def test_tiers_take_lr_then_decay_then_forward(
    tmp_path: Path, tier: str, lr: int, weight_decay: int, forward: int
) -> None:
    preset = tmp_path / "all.yaml"
    preset.write_text(
        "name: all\nsource: a test\nlr: {up_proj: 3}\nweight_decay: {up_proj: 5}\nforward: {up_proj: 7}\n"
    )
    settings = {"multipliers": "fixed", "optim": {"lr": 1.0, "weight_decay": 1.0}}
    role = by_role(plan(32, {"preset": str(preset), "tier": tier}, **settings))[Role.UP_PROJ]
    assert (role.lr, role.weight_decay, role.constant) == (lr, weight_decay, forward)


HEAD = "name: x\nsource: y\n"
ROLES = "the role must be one of embedding, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEAD + "lr: {norm: 2}", f"lr.norm = 2: {ROLES}"),
        (HEAD + "lr: {q_proj: 0}", "lr.q_proj = 0: input should be greater than 0"),
        (HEAD + "forward: {q_proj: -1}", "forward.q_proj = -1: input should be greater than 0"),
        (HEAD + "weight_decay: {q_proj: -1}", "weight_decay.q_proj = -1: input should be greater than or equal to 0"),
        (HEAD + "lr: {q_proj: .nan}", "lr.q_proj"),
        (HEAD + "lr: {q_proj: .inf}", "lr.q_proj"),
        (HEAD + "lr: {query: 2}", f"lr.query = 2: {ROLES}"),
        (HEAD + "lr: {1: 2}", "lr.1 = 2: the role"),
        (HEAD + "lr: 2", "lr = 2: input should be a valid dictionary"),
        (HEAD + "lr: {q_proj: fast}", "lr.q_proj = 'fast'"),
        (HEAD + "rate: {q_proj: 2}", "rate = {'q_proj': 2}: unknown field"),
        (HEAD + "version: 2", "version = 2: input should be 1"),
        (HEAD + "optimizers: {sgd: {}}", "sgd"),
        (HEAD + "optimizers: [muon]", "optimizers = ['muon']: input should be a valid dictionary"),
        (HEAD + "optimizers: {muon: 1}", "optimizers.muon = 1: input should be a valid dictionary"),
        (HEAD + "optimizers: {muon: {lr: {query: 2}}}", f"optimizers.muon.lr.query = 2: {ROLES}"),
        (HEAD + "optimizers: {muon: {lr: {q_proj: 0}}}", "optimizers.muon.lr.q_proj = 0: input should be greater"),
        (HEAD + "optimizers: {muon: {tuning: {study: a}}}", "optimizers.muon.tuning.trials"),
        ("name: x", "source"),
        ("- a\n- b", "valid dictionary"),
        ("", "valid dictionary"),
        ("lr: {", "not a YAML file"),
    ],
)
def test_a_bad_preset_file_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_preset(str(path))
    message = str(caught.value)
    assert complaint in message
    assert "\n" not in message
    assert message.startswith(f"preset {path}: ")


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match=r"not a YAML file"):
        load_preset(str(path))


@pytest.mark.parametrize("name", ["falcon", "", "presets"])
def test_an_unknown_preset_names_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_preset(name)
    assert str(caught.value) == (
        f"parametrization.preset = {name!r}: must be a YAML file or one of falcon-h1-0.5b, mup_tuning, neutral"
    )


def test_a_config_has_multipliers_of_its_own(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        HEAD + "lr: {q_proj: 3, k_proj: 7}\nweight_decay: {q_proj: 5}\nforward: {q_proj: 11, k_proj: 13}\n"
    )
    own = {"lr": {"q_proj": 4.0}, "weight_decay": {"v_proj": 2.0}, "forward": {"k_proj": 0.5}}
    settings = {"multipliers": "fixed", "optim": {"lr": 2**-6, "weight_decay": 0.1}}
    roles = by_role(plan(parametrization={"preset": str(preset), **own}, **settings))
    # the width rule's lr factor is 1/4
    assert roles[Role.Q_PROJ].lr == 2**-6 / 4 * 4  # in place of the preset's 3
    assert roles[Role.K_PROJ].lr == 2**-6 / 4 * 7  # the preset's
    assert roles[Role.V_PROJ].lr == 2**-6 / 4
    decays = {role: roles[role].weight_decay for role in (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ)}
    assert decays == pytest.approx({Role.Q_PROJ: 0.5, Role.K_PROJ: 0.1, Role.V_PROJ: 0.2})
    assert [roles[role].constant for role in (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ)] == [11, 0.5, 1]


def test_own_multipliers_of_zero_and_one_replace_the_presets_too(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(HEAD + "lr: {q_proj: 3}\nweight_decay: {q_proj: 5}\n")
    own = {"preset": str(preset), "lr": {"q_proj": 1.0}, "weight_decay": {"q_proj": 0.0}}
    role = by_role(plan(32, own, optim={"lr": 0.5}))[Role.Q_PROJ]
    assert (role.lr, role.weight_decay) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("tier", "lr", "weight_decay", "forward"),
    [("NONE", 1, 1, 1), ("LR", 3, 1, 1), ("LRWD", 3, 5, 1), ("FULL", 3, 5, 7)],
)
def test_tiers_cut_a_configs_own_multipliers(tier: str, lr: int, weight_decay: int, forward: int) -> None:
    own = {"tier": tier, "lr": {"up_proj": 3.0}, "weight_decay": {"up_proj": 5.0}, "forward": {"up_proj": 7.0}}
    role = by_role(plan(32, own, multipliers="fixed", optim={"lr": 1.0, "weight_decay": 1.0}))[Role.UP_PROJ]
    assert (role.lr, role.weight_decay, role.constant) == (lr, weight_decay, forward)


def test_own_forward_multipliers_are_used_where_those_of_a_preset_are() -> None:
    own = {"forward": {"o_proj": 0.5, "lm_head": 0.25}}
    shown = {}
    for kind, init in (("none", "preset"), ("fixed", "ones"), ("scalar", "ones"), ("scalar", "preset")):
        roles = by_role(plan(128, own, multipliers=kind, placement={"init": init}))
        shown[kind, init] = [(roles[role].constant, roles[role].start) for role in (Role.O_PROJ, Role.LM_HEAD)]
    assert shown == {
        ("none", "preset"): [(1.0, {}), (1.0, {})],
        ("fixed", "ones"): [(0.5, {}), (0.25, {})],
        ("scalar", "ones"): [(1.0, {Axis.SCALAR: 1.0}), (1.0, {})],
        ("scalar", "preset"): [(1.0, {Axis.SCALAR: 0.5}), (0.25, {})],  # no multiplier stands at the head
    }


@pytest.mark.parametrize("tier", ["NONE", "FULL"])
@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ({"lr": {"q_prj": 2.0}}, f"parametrization.lr.q_prj = 2.0: {ROLES}"),
        ({"forward": {"norm": 2.0}}, f"parametrization.forward.norm = 2.0: {ROLES}"),
        ({"forward": {"q_proj": 0.0}}, "parametrization.forward.q_proj = 0.0: input should be greater than 0"),
        (
            {"weight_decay": {"q_proj": -1.0}},
            "parametrization.weight_decay.q_proj = -1.0: input should be greater than or equal to 0",
        ),
    ],
)
def test_a_bad_multiplier_of_a_config_is_refused(tier: str, own: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(parametrization=own | {"tier": tier})
    assert str(caught.value) == complaint


BY_OPTIMIZER = (
    HEAD + "lr: {q_proj: 2}\nweight_decay: {q_proj: 3}\noptimizers: {muon: {lr: {k_proj: 5}, forward: {k_proj: 7}}}\n"
)


def test_an_optimizers_own_part_stands_in_place_of_the_shared_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BY_OPTIMIZER)
    preset = load_preset(str(path))
    adamw = RoleMultipliers(lr={Role.Q_PROJ: 2}, weight_decay={Role.Q_PROJ: 3})
    muon = RoleMultipliers(lr={Role.K_PROJ: 5}, forward={Role.K_PROJ: 7})
    assert (preset.multipliers("adamw", "FULL"), preset.multipliers("muon", "FULL")) == (adamw, muon)
    assert preset.multipliers("muon", "LR") == RoleMultipliers(lr={Role.K_PROJ: 5})
    assert preset.multipliers("adamw", "NONE") == RoleMultipliers()
    rates = {}
    for optimizer in ("adamw", "muon"):
        roles = by_role(plan(32, {"preset": str(path)}, optimizer=optimizer, optim={"lr": 1.0}))
        rates[optimizer] = (roles[Role.Q_PROJ].lr, roles[Role.K_PROJ].lr)
    assert rates == {"adamw": (2.0, 1.0), "muon": (1.0, 5.0)}


def test_a_preset_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "optimizers: {muon: {lr: {k_proj: 5}}}\n")
    assert by_role(plan(32, {"preset": str(path)}, optimizer="muon", optim={"lr": 1.0}))[Role.K_PROJ].lr == 5.0
    complaint = "parametrization.preset = 'x': has multipliers for muon only, not for adamw"
    config = RunConfig.from_dict({"parametrization": {"preset": str(path)}})
    for use in (run_multipliers, inlined):
        with pytest.raises(ConfigError) as caught:
            use(config)
        assert str(caught.value) == complaint


def test_a_preset_is_inlined_under_the_configs_own_multipliers(tmp_path: Path) -> None:
    path, copy = tmp_path / "mine.yaml", tmp_path / "copy.yaml"
    for place in (path, copy):
        place.write_text(BY_OPTIMIZER)
    settings = {"preset": str(path), "lr": {"k_proj": 0.5}, "tier": "LR"}
    config = RunConfig.from_dict({"parametrization": settings})
    got = inlined(config)
    assert got.parametrization.preset == "neutral"
    assert got.parametrization.tier == "LR"  # cuts when the run is planned, not here
    assert got.parametrization.lr == {"q_proj": 2.0, "k_proj": 0.5}
    assert (got.parametrization.weight_decay, got.parametrization.forward) == ({"q_proj": 3.0}, {})
    assert plan_run(got, VOCAB) == plan_run(config, VOCAB)
    assert got == apply_preset(config, load_preset(str(path)))
    assert inlined(got) is got

    # wherever the file lies, the run is the same; with another number it is another
    elsewhere = inlined(config.with_overrides({"parametrization.preset": str(copy)}))
    assert elsewhere.hash == got.hash
    copy.write_text(BY_OPTIMIZER.replace("q_proj: 2", "q_proj: 2.5"))
    assert inlined(config.with_overrides({"parametrization.preset": str(copy)})).hash != got.hash

    muon = inlined(config.with_overrides({"optimizer": "muon"})).parametrization
    assert (muon.lr, muon.weight_decay, muon.forward) == ({"k_proj": 0.5}, {}, {"k_proj": 7.0})


def test_a_shipped_preset_stays_a_name() -> None:
    config = RunConfig.from_dict({"parametrization": {"preset": "falcon-h1-0.5b"}})
    assert inlined(config) is config
    with pytest.raises(ConfigError, match="must be a YAML file or one of falcon"):
        inlined(config.with_overrides({"parametrization.preset": "nothing"}))


def test_search_spaces_grow_with_the_tier() -> None:
    assert search_space("NONE") == {}
    rates = {f"parametrization.lr.{role}": (0.25, 4.0) for role in MATRIX_ROLES}
    decays = {f"parametrization.weight_decay.{role}": (0.25, 4.0) for role in MATRIX_ROLES}
    forward = {f"parametrization.forward.{role}": (0.125, 8.0) for role in FALCON}
    assert search_space("LR") == rates
    assert search_space("LRWD") == rates | decays
    assert search_space("FULL") == rates | decays | forward
    assert [len(search_space(tier)) for tier in ("LR", "LRWD", "FULL")] == [9, 18, 24]


@pytest.mark.parametrize("tier", ["LR", "LRWD", "FULL"])
def test_every_field_of_a_search_space_changes_the_plan_and_its_neutral_point_does_not(tier: Tier) -> None:
    config = RunConfig.from_dict({"multipliers": "fixed", "parametrization": {"tier": tier}, "model": MODEL})
    untuned = plan_run(config, VOCAB)
    space = search_space(tier)
    assert plan_run(config.with_overrides(neutral(space)), VOCAB) == untuned
    for field, (low, high) in space.items():
        changed = plan_run(config.with_overrides({field: high}), VOCAB)
        role = field.rpartition(".")[2]
        assert {name for name, matrix in changed.matrices.items() if matrix != untuned.matrices[name]} == {
            name for name, matrix in untuned.matrices.items() if matrix.role == role
        }
        assert low * high == 1


TUNING = Tuning(
    study="tune",
    trials=3,
    completed=1,
    pruned=1,
    diverged=1,
    tokens=15_800,
    flops=9.48e7,
    seconds=2.75,
    d_model=64,
    base_d_model=32,
    steps=100,
    batch_size=4,
    seq_len=32,
    lr=2**-6,
    best_loss=2.1,
    seeds=[0, 1],
    tier="FULL",
    git_commit="abc",
    corpus_hash="c0ffee",
)


WRITTEN = """\
version: 1
name: mine
source: a test
lr:
  q_proj: 3.0
optimizers:
  muon:
    forward:
      k_proj: 0.390625
    lr:
      embedding: 1.25
      q_proj: 2.0
      lm_head: 0.5
    tuning:
      study: tune
      trials: 3
      completed: 1
      pruned: 1
      diverged: 1
      tokens: 15800
      flops: 94800000.0
      seconds: 2.75
      d_model: 64
      base_d_model: 32
      steps: 100
      batch_size: 4
      seq_len: 32
      lr: 0.015625
      best_loss: 2.1
      seeds:
      - 0
      - 1
      tier: FULL
      git_commit: abc
      corpus_hash: c0ffee
"""


def test_a_preset_is_written_in_the_order_of_reading() -> None:
    tuned = RoleMultipliers(
        lr={Role.LM_HEAD: 0.5, Role.Q_PROJ: 2.0, Role.EMBEDDING: 1.25},
        forward={Role.K_PROJ: 0.390625},
        tuning=TUNING,
    )
    preset = Preset(name="mine", source="a test", lr={Role.Q_PROJ: 3.0}, optimizers={"muon": tuned})
    assert preset.to_yaml() == WRITTEN


@pytest.mark.parametrize("name", ["neutral", "falcon-h1-0.5b"])
def test_the_shipped_presets_have_a_version_and_survive_writing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(load_preset(name).to_yaml())
    assert load_preset(str(path)) == load_preset(name)
    assert yaml.safe_load(path.read_text())["version"] == 1
    assert (Path(presets.__file__).parent / "presets" / f"{name}.yaml").read_text().startswith("version: 1\n")


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
MATRICES = st.sampled_from(sorted(MATRIX_ROLES))
FACTORS_BY_ROLE = {
    "forward": st.dictionaries(MATRICES, POSITIVE),
    "lr": st.dictionaries(MATRICES, POSITIVE),
    "weight_decay": st.dictionaries(MATRICES, st.floats(min_value=0, allow_infinity=False)),
}
TUNINGS = st.builds(
    TUNING.model_copy,
    update=st.fixed_dictionaries(
        {
            "default_loss": st.none() | POSITIVE,
            "flops": POSITIVE,
            "git_commit": st.none() | st.text() | st.lists(st.text()),
            "seeds": st.lists(st.integers()),
        }
    ),
)
PARTS_OF_PRESETS = st.builds(RoleMultipliers, tuning=st.none() | TUNINGS, **FACTORS_BY_ROLE)


@given(
    preset=st.builds(
        Preset,
        name=st.text(),
        source=st.text(),
        optimizers=st.dictionaries(st.sampled_from(["adamw", "muon"]), PARTS_OF_PRESETS),
        **FACTORS_BY_ROLE,
    )
)
def test_a_preset_survives_writing(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "preset.yaml"
    path.write_text(preset.to_yaml())
    assert load_preset(str(path)) == preset

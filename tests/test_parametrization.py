"""Scaling with width and the plan of a run: numbers derived by hand.

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
from typing import Any

import pytest

from lit_mult.config import ParametrizationConfig, RunConfig
from lit_mult.errors import ConfigError
from lit_mult.method.plan import RunPlan, plan_run
from lit_mult.method.rules import Scaling, scaling, width_factor
from lit_mult.registry.roles import MATRIX_ROLES, Role

VOCAB = 64
MODEL = {"n_layers": 1, "head_dim": 32, "mlp_ratio": 2.0}
RULES = ["lr", "lr_wd", "lr_sqrt_wd", "multiplier"]


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


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


@OPTIMIZERS
def test_standard_scales_nothing_but_the_init(optimizer: str) -> None:
    for rule in RULES:
        for role, got in scalings(optimizer, rule="standard", width_rule=rule).items():
            assert got == Scaling(init_std=pytest.approx(STD[role]), lr=1.0, weight_decay=1.0, forward=1.0)


@OPTIMIZERS
@pytest.mark.parametrize("width_rule", RULES)
def test_each_rule_changes_its_own_scalings(optimizer: str, width_rule: str) -> None:
    """The rate shrinks; or the decay rises as the rate or its root shrinks; or the forward factor shrinks alone.

    There W is drawn larger by the factor that the forward takes away: the head at sqrt(32)/128 * 4 = 1/sqrt(32), its
    std at base width.
    """
    for role, got in scalings(optimizer, rule="mup", width_rule=width_rule).items():
        std, factor = MUP_STD[role], FACTORS[optimizer][role]
        expected = {"lr": (std, factor, 1, 1), "lr_wd": (std, factor, 1 / factor, 1)}
        expected["lr_sqrt_wd"] = (std, factor, (1 / factor) ** 0.5, 1)
        expected["multiplier"] = (std / factor, 1, 1, factor)
        assert got == Scaling(*(pytest.approx(value) for value in expected[width_rule]))
    if width_rule == "multiplier":
        assert scalings("adamw", rule="mup", width_rule=width_rule)[Role.LM_HEAD].init_std == pytest.approx(32**-0.5)


@OPTIMIZERS
@pytest.mark.parametrize("d_model", [32, 64, 128, 512])
def test_identities_of_table_1(optimizer: str, d_model: int) -> None:
    rules = [scalings(optimizer, d_model, rule="mup", width_rule=rule) for rule in RULES]
    for role in MATRIX_ROLES:
        update = [rule[role].lr * rule[role].forward for rule in rules]
        assert update == pytest.approx([update[0]] * 4)  # the effective matrix moves alike
        start = [rule[role].init_std * rule[role].forward for rule in rules]
        assert start == pytest.approx([start[0]] * 4)  # and starts alike
        shrink = [rule[role].lr * rule[role].weight_decay for rule in rules]
        assert shrink == pytest.approx([update[0], 1.0, update[0] ** 0.5, 1.0])  # of the decay of a step


@pytest.mark.parametrize("width_rule", RULES)
@OPTIMIZERS
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


def test_muon_takes_the_hidden_matrices_alone() -> None:
    optimizers = {role: matrix.optimizer for role, matrix in by_role(plan(optimizer="muon")).items()}
    assert {role for role, name in optimizers.items() if name == "adamw"} == {Role.EMBEDDING, Role.LM_HEAD}
    assert {matrix.optimizer for matrix in plan().matrices.values()} == {"adamw"}


@pytest.mark.parametrize("lr", [2**-4, 2**-8])
def test_independent_decay_does_not_depend_on_any_rate(lr: float) -> None:
    optim = {"lr": lr, "weight_decay": 0.01, "weight_decay_mode": "independent"}
    for width_rule in ("lr", "lr_wd", "multiplier"):
        run = plan(parametrization={"width_rule": width_rule}, optim=optim)
        # a step shrinks by lr * weight_decay as the optimizer takes them: 0.01 for each, at four times the base width
        assert all(matrix.lr * matrix.weight_decay == pytest.approx(0.01) for matrix in run.matrices.values())
        assert run.norm.weight_decay == 0.0


@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_multipliers_decay_by_their_own_rate_in_either_mode(mode: str) -> None:
    # a step shrinks them by lr * weight_decay as the optimizer takes them: 0.01 * 2e-3 by default, not 2e-3
    default = plan(optim={"lr": 2**-4, "weight_decay_mode": mode}).multiplier
    assert default.lr * default.weight_decay == pytest.approx(2e-5)
    rates = {"multiplier_lr": 0.25, "vector_lr_mode": "relative", "multiplier_weight_decay": 0.5}
    own = plan(optim={"lr": 2**-4, "weight_decay_mode": mode, **rates}).multiplier
    assert own.lr * own.weight_decay == pytest.approx(2**-4 * 0.25 * 0.5)


def test_rates_of_vectors_are_absolute_or_relative_to_the_base_rate() -> None:
    absolute = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "multiplier_lr": 0.25})
    assert (absolute.norm.lr, absolute.multiplier.lr) == (0.5, 0.25)
    relative = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "multiplier_lr": 0.25, "vector_lr_mode": "relative"})
    assert (relative.norm.lr, relative.multiplier.lr) == (2**-7, 2**-8)
    shared = plan(optim={"lr": 2**-6, "vector_lr": 0.5, "vector_lr_mode": "relative"})
    assert shared.norm.lr == shared.multiplier.lr == 2**-7
    assert shared.multiplier.weight_decay == 2e-3  # the paper's, sec. 4.1


@OPTIMIZERS
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


# With l = n_layers / 2 = 1, 2, 4 (base_n_layers is 2): factors on the matrices that end a branch, on the rates of what
# is in blocks, on its epsilon. From x + l^-alpha f(x), lr l^(alpha-1), eps l^-alpha (arXiv:2505.01618 table 1) with
# alpha = 1/2 and 1; hyperp has branches / sqrt(2 n_layers) = sqrt(4), sqrt(8), sqrt(16).
ROOT = math.sqrt(0.5)
DEPTH_FACTORS = {
    "none": [(1, 1, 1), (1, 1, 1), (1, 1, 1)],
    "depth_mup": [(1, 1, 1), (ROOT, ROOT, ROOT), (1 / 2, 1 / 2, 1 / 2)],
    "completep": [(1, 1, 1), (1 / 2, 1, 1 / 2), (1 / 4, 1, 1 / 4)],
    "hyperp": [(1 / 2, 1, 1), (math.sqrt(1 / 8), ROOT, ROOT), (1 / 4, 1 / 2, 1 / 2)],
}
IN_BLOCKS = MATRIX_ROLES - {Role.EMBEDDING, Role.LM_HEAD}


@pytest.mark.parametrize(("depth", "factors"), [(2, 0), (4, 1), (8, 2)])
@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (rule, optimizer)
        for rule in ("none", "depth_mup", "completep")
        for optimizer in ("adamw", "muon", "hyperball", "normuon", "scion", "scion-sign")
    ]
    + [("hyperp", "hyperball"), ("hyperp", "muon-hyperball")],
)
def test_depth_rules(rule: str, optimizer: str, depth: int, factors: int) -> None:
    branch, rate, eps = DEPTH_FACTORS[rule][factors]
    width_rules = RULES if optimizer in ("adamw", "muon") else ["lr"]
    for width_rule in width_rules:
        settings: dict[str, Any] = {"optimizer": optimizer, "multipliers": "vector", "model": {"n_layers": depth}}
        settings["optim"] = {"eps": 1e-6, "weight_decay": 0.2}
        width = plan(parametrization={"width_rule": width_rule}, **settings)
        run = plan(parametrization={"width_rule": width_rule, "depth_rule": rule}, **settings)
        for name, matrix in run.matrices.items():
            plain, inside = width.matrices[name], matrix.role in IN_BLOCKS
            ends = matrix.role in (Role.O_PROJ, Role.DOWN_PROJ)
            assert matrix.constant == pytest.approx(plain.constant * (branch if ends else 1))
            assert matrix.lr == pytest.approx(plain.lr * (rate if inside else 1))
            assert (matrix.weight_decay, matrix.init_std) == (plain.weight_decay, plain.init_std)
            is_adam = matrix.optimizer in ("adamw", "hyperball")  # Muon's steps do not depend on the gradient's size
            assert (matrix.eps or 1e-6) == pytest.approx(1e-6 * (eps if inside and is_adam else 1))
        for inner, outer in ((run.block_norm, width.norm), (run.block_multiplier, width.multiplier)):
            assert (inner.lr, inner.eps or 1e-6) == pytest.approx((outer.lr * rate, 1e-6 * eps))
            assert (inner.optimizer, inner.weight_decay) == ("adamw", outer.weight_decay)
        assert (run.norm, run.multiplier) == (width.norm, width.multiplier)


@pytest.mark.parametrize("mode", ["coupled", "independent", "corrected", "cautious", "timescale"])
def test_a_depth_rule_leaves_decay_without_the_lr(mode: str) -> None:
    # At l = 4 a step of depth_mup decays by half of lr * weight_decay, as its lr is half; independent: by 0.2;
    # timescale: by 0.2 over 60 steps, of which wsd has 6 of warmup and 10 of decay.
    optim = {"lr": 0.25, "weight_decay": 0.2, "weight_decay_mode": mode}
    rule = {"depth_rule": "depth_mup"}
    own = plan(32, rule, model={"n_layers": 8}, optim=optim, train={"steps": 60}).matrices["layers.7.mlp.up_proj"]
    share = {"independent": 0.2, "timescale": 0.2 / 44}.get(mode, 0.025)
    assert own.lr * own.weight_decay == pytest.approx(share)
    assert own.decay_rule == (mode if mode in ("corrected", "cautious") else "plain")
    assert own.eps == pytest.approx(1e-8 / 2)


@pytest.mark.parametrize("rule", ["depth_mup", "completep"])
@pytest.mark.parametrize("d_model", [32, 128])
def test_at_base_depth_a_depth_rule_is_the_width_rule(rule: str, d_model: int) -> None:
    for optimizer in ("adamw", "muon", "hyperball"):
        settings: dict[str, Any] = {"optimizer": optimizer, "multipliers": "vector", "model": {"n_layers": 3}}
        assert plan(d_model, {"depth_rule": rule, "base_n_layers": 3}, **settings) == plan(d_model, **settings)


@pytest.mark.parametrize("optimizer", ["muown", "import:torch.optim.NAdam"])
def test_optimizers_without_a_depth_rule_are_refused(optimizer: str) -> None:
    with pytest.raises(ConfigError, match=r"has no such depth rule, which .*depth_rule = completep needs"):
        plan(parametrization={"rule": "standard", "depth_rule": "completep"}, optimizer=optimizer)


@OPTIMIZERS
def test_hyperp_is_for_hyperball(optimizer: str) -> None:
    with pytest.raises(
        ConfigError, match=f"optimizer = '{optimizer}': has no such depth rule, which .* = hyperp needs"
    ):
        plan(parametrization={"depth_rule": "hyperp"}, optimizer=optimizer)


def test_depth_rules_leave_the_hash_of_other_runs() -> None:
    data = RunConfig().to_dict()
    assert not {"depth_rule", "base_n_layers"} & RunConfig.from_dict(data).hashed_fields()["parametrization"].keys()


@pytest.mark.parametrize("rule", ["standard", "mup"])
def test_a_tied_head_is_scaled_by_its_constant(rule: str) -> None:
    # the embedding starts at std 0.5, the untied head would at sqrt(32)/128 (mup) or 1/sqrt(128) (standard)
    std = math.sqrt(32) / 128 if rule == "mup" else 1 / math.sqrt(128)
    for width_rule in RULES:
        rules = {"rule": rule, "width_rule": width_rule, "embedding_std": 0.5}
        run = plan(128, rules, model={"tie_embeddings": True})
        assert run.matrices["lm_head"].constant == pytest.approx(std / 0.5)
        assert run.matrices["embed_tokens"].constant == 1.0


def test_attention_scale() -> None:
    assert plan().attention_scale == pytest.approx(32**-0.5)
    assert plan(parametrization={"attention_scale": "1/head_dim"}).attention_scale == 1 / 32

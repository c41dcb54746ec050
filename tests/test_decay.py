"""Decay rules: what the modes of optim.weight_decay_mode plan, and what a step then removes, under every optimizer."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import foreign
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal
from tiny_runs import Tiny, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lit_mult
from lit_mult.config import OptimConfig
from lit_mult.errors import Interrupted
from lit_mult.inject.callbacks import check_optimizer
from lit_mult.method.decay import NORMALIZED
from lit_mult.method.plan import plan_run
from lit_mult.method.regime import matrix_regimes
from lit_mult.nn.llama import Llama
from lit_mult.optim.groups import parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.roles import Role
from lit_mult.stacked.key import stack_key
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run

LR, DECAY, STEPS = 0.02, 0.5, 20
RULES = ("corrected", "cautious")
DEEP = {"model.n_layers": 8, "parametrization.depth_rule": "depth_mup"}
SHAPE = (6, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(step: int) -> float:
    return 1 - step / STEPS


def trained(
    optimizer: str, gradients: Callable[[int], Tensor] = normal, schedule: Callable[[int], float] = factor, **rule: Any
) -> Tensor:
    """A matrix after 20 steps."""
    weight = nn.Parameter(normal(99))
    group = {"params": [weight], "name": "w", "optimizer": optimizer, "lr": LR, "weight_decay": DECAY, **rule}
    made = HybridOptimizer([group], OptimConfig())
    scheduler = LambdaLR(made, schedule)
    for step in range(STEPS):
        weight.grad = gradients(step)
        made.step()
        scheduler.step()
    assert made.param_groups[0]["weight_decay"] == DECAY
    return weight.detach()


def loop(optimizer: str, rule: str) -> Tensor:
    """The same in float64, from the formulas."""
    W, m, v = normal(99).double(), torch.zeros(SHAPE).double(), torch.zeros(SHAPE).double()
    for step in range(STEPS):
        g, lr, t = normal(step).double(), LR * factor(step), step + 1
        if optimizer == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            u = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        else:
            m = 0.95 * m + 0.05 * g
            X = (0.05 * g + 0.95 * m).T
            X = X / X.norm()
            for _ in range(5):
                A = X @ X.T
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            u = 0.2 * math.sqrt(6) * X.T
        decayed = {
            "plain": lr * DECAY * W,
            "corrected": lr * DECAY * (lr / LR) * W,
            "cautious": lr * DECAY * torch.where(u * W >= 0, W, 0.0),
        }
        W = W - decayed[rule] - lr * u
    return W


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rule", ["plain", "corrected", "cautious"])
def test_twenty_steps_are_the_float64_loop(optimizer: str, rule: str) -> None:
    settings = {"decay_rule": rule, "peak_lr": LR}
    torch.testing.assert_close(trained(optimizer, **settings).double(), loop(optimizer, rule), rtol=1e-5, atol=1e-5)
    assert (loop(optimizer, rule) - loop(optimizer, "plain")).norm() > (0.01 if rule != "plain" else -1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rules_are_plain_decay_where_their_conditions_hold(optimizer: str) -> None:
    def constant(step: int) -> float:
        return 1.0

    plain = trained(optimizer, schedule=constant)
    assert torch.equal(trained(optimizer, schedule=constant, decay_rule="corrected", peak_lr=LR), plain)

    # Adam's update has the sign of a constant gradient; that of the start shrinks all entries until they cross 0.
    def towards_zero(step: int) -> Tensor:
        return normal(99).sign()

    if optimizer == "adamw":
        slow = {"gradients": towards_zero, "schedule": lambda step: 0.001}  # moves 0.0004 in all
        assert normal(99).abs().min() > 0.001
        cautious = trained(optimizer, decay_rule="cautious", **slow)
        torch.testing.assert_close(cautious, trained(optimizer, **slow), rtol=1e-5, atol=0)


@given(seed=st.integers(0, 1000), decay=st.floats(0.01, 5.0))
def test_cautious_decay_leaves_the_entries_that_grow(seed: int, decay: float) -> None:
    start, gradient = normal(seed), normal(seed + 1)
    ends = {}
    for name, its in (("none", 0.0), ("cautious", decay)):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        rule = {"decay_rule": "cautious", "weight_decay": its}
        HybridOptimizer([{"params": [weight], "name": "w", "optimizer": "adamw", "lr": 0.1, **rule}]).step()
        ends[name] = weight.detach()
    grows = gradient * start < 0  # Adam's first step is lr times the sign
    assert torch.equal(ends["cautious"][grows], ends["none"][grows])
    expected = (ends["none"] - 0.1 * decay * start)[~grows]
    torch.testing.assert_close(ends["cautious"][~grows], expected, rtol=1e-6, atol=1e-7)


def test_a_matrix_without_a_gradient_does_not_decay() -> None:
    idle = nn.Parameter(normal(0))
    group = {"params": [idle], "name": "w", "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.1}
    HybridOptimizer([group | {"decay_rule": "cautious"}]).step()
    assert torch.equal(idle, normal(0))


def test_a_rate_above_the_peak_is_refused() -> None:
    with refusal("lr of group w: 0.04 is above the peak of 0.02, by which corrected decay divides"):
        trained("adamw", schedule=lambda step: 2.0, decay_rule="corrected", peak_lr=LR)


# What is planned


def test_all_but_the_head_have_corrected_decay(tiny: Tiny) -> None:
    config = tiny({"optim.weight_decay_mode": "corrected", "parametrization.width_rule": "lr_wd"})
    coupled = plan_run(tiny({"parametrization.width_rule": "lr_wd"}), 17).matrices
    for name, matrix in plan_run(config, 17).matrices.items():
        assert matrix.decay_rule == ("plain" if name == "lm_head" else "corrected")
        assert (matrix.lr, matrix.weight_decay) == (coupled[name].lr, coupled[name].weight_decay)
    tied = plan_run(config.with_overrides({"model.tie_embeddings": True}), 17).matrices
    assert tied["embed_tokens"].decay_rule == "plain"  # it is the head, too
    assert Role.ROUTER not in NORMALIZED


def test_groups_have_the_rule_beside_the_epsilon_of_a_depth_rule(tiny: Tiny) -> None:
    # l = 8 / 2: half the lr and half of Adam's epsilon in blocks; and half the lr at twice the base width
    config = tiny({**DEEP, "optim.weight_decay_mode": "corrected", "optim.lr": 0.25, "optim.eps": 1e-6})
    plan = plan_run(config, 17)
    groups = parameter_groups(plan_parameters(Llama(config.model, plan), plan))
    assert {(one["name"], one.get("decay_rule"), one.get("peak_lr"), one.get("eps")) for one in groups} == {
        ("embedding", "corrected", 0.25, None),
        ("q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj", "corrected", 0.0625, 5e-7),
        ("norm", None, None, 5e-7),
        ("norm", None, None, None),
        ("lm_head", None, None, None),
    }


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_timescale_is_the_number_of_decay_times(tiny: Tiny, schedule: str) -> None:
    for changes in ({}, {"model.d_model": 32}, {"optim.lr": 0.3}, {"train.steps": 80}, {"optimizer": "muon"}, DEEP):
        settings = {"optim.weight_decay_mode": "timescale", "optim.weight_decay": 4.0, "schedule.name": schedule}
        config = tiny({"train.steps": 40, **settings, **changes})
        times = [one.decay_times for one in matrix_regimes(config, plan_run(config, 17)).values()]
        assert times == pytest.approx([4.0] * 9)


def test_timescale_trains_as_the_coupled_decay_that_it_stands_for(tiny: Tiny, tmp_path: Path) -> None:
    # wsd: 24 steps of which round(2.4) = 2 are warmup and 24 / 6 = 4 decay, hence 18 at the peak.
    shared = {"train.steps": 24, "optim.lr": 0.05, "parametrization.rule": "standard"}
    own = {"optim.weight_decay_mode": "timescale", "optim.weight_decay": 3.0}
    timescale = run(tiny({**shared, **own}), tmp_path / "timescale")
    coupled = run(tiny({**shared, "optim.weight_decay": 3.0 / (0.05 * 18)}), tmp_path / "coupled")
    assert timescale.train_curve == coupled.train_curve
    for name, value in weights(tmp_path / "coupled").items():
        assert torch.equal(weights(tmp_path / "timescale")[name], value), name


def test_regimes_of_the_other_rules(tiny: Tiny) -> None:
    # linear to 0 over 10 steps after 2: factors 0.9, ..., 0, whose squares sum to 2.85 and which sum to 4.5.
    schedule = {"schedule.name": "linear", "schedule.final_ratio": 0.0, "schedule.warmup_fraction": 1 / 6}
    settings = {**schedule, "optim.lr": 0.5, "optim.weight_decay": 0.2, "parametrization.rule": "standard"}
    found = {}
    for mode in ("coupled", "corrected", "cautious"):
        config = tiny({**settings, "optim.weight_decay_mode": mode})
        found[mode] = matrix_regimes(config, plan_run(config, 17))
    assert found["coupled"][Role.Q_PROJ].decay_times == pytest.approx(0.45)
    assert found["corrected"][Role.Q_PROJ].decay_times == pytest.approx(0.285)
    assert found["corrected"][Role.LM_HEAD] == found["coupled"][Role.LM_HEAD]
    assert found["cautious"][Role.Q_PROJ].decay_times == pytest.approx(0.225)
    assert found["cautious"][Role.Q_PROJ].equilibrium_time == pytest.approx(20)


def test_what_cannot_be_planned_is_one_line(refused: Callable[..., str]) -> None:
    timescale = ("parameters", "--optim.weight_decay_mode", "timescale")
    assert "optim.weight_decay = 300.0: as a number of decay times (timescale) must be below the 220 steps" in refused(
        *timescale, "--optim.weight_decay", "300"
    )
    assert "optim.weight_decay_mode = 'timescale': needs steps between warmup and final decay" in refused(
        *timescale, "--schedule.name", "linear", "--schedule.warmup_fraction", "1"
    )


@pytest.mark.parametrize("mode", RULES)
def test_the_brownian_reference_refuses_them(mode: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optim.weight_decay_mode": mode, "train.diagnostics": ["brownian"]})
    with refusal(f"optim.weight_decay_mode = '{mode}': has no noise reference"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Runs


def test_stacks_with_every_mode_train_as_their_members_alone(tiny: Tiny, tmp_path: Path) -> None:
    modes = {"coupled": 0.5, "corrected": 0.5, "cautious": 2.0, "timescale": 3.0, "independent": 0.02}
    configs = [
        tiny(
            {
                "optimizer": "muon",
                "multipliers": "vector",
                "optim.lr": 0.1,
                "schedule.name": "cosine",
                "train.steps": 24,
            }
            | {"optim.weight_decay_mode": mode, "optim.weight_decay": decay}
            | {"parametrization.depth_rule": "depth_mup" if mode in ("cautious", "timescale") else "none"}
        )
        for mode, decay in modes.items()
    ]
    assert len({stack_key(config) for config in configs}) == 1
    alone = [run(config, tmp_path / "alone" / str(index)) for index, config in enumerate(configs)]
    together = run_stack([Member(config, tmp_path / "stack" / str(index)) for index, config in enumerate(configs)])
    assert len({record.final_loss for record in alone}) == len(modes)
    for index, (record, single) in enumerate(zip(together, alone, strict=True)):
        for mine, theirs in zip(record.train_curve, single.train_curve, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        expected = weights(tmp_path / "alone" / str(index))
        for name, value in weights(tmp_path / "stack" / str(index)).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("mode", RULES)
def test_a_stopped_run_goes_on_exactly(mode: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optimizer": "muon", "optim.weight_decay_mode": mode, "optim.weight_decay": 1.0})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "part")[name], value), name


# Models of other libraries


def test_groups_of_a_foreign_model_have_the_mode() -> None:
    model = lit_mult.add_multipliers(foreign("llama"), "none", verbose=False)
    for mode in ("coupled", "independent", "corrected", "cautious", "timescale"):
        groups = lit_mult.build_param_groups(model, 0.1, 3.0, weight_decay_mode=mode, steps=30)
        by_name = {group["name"]: group for group in groups}
        assert by_name.pop("vector")["weight_decay"] == 0
        rules = {name: group.get("decay_rule", "plain") for name, group in by_name.items()}
        assert {rules[name] for name in rules if "q_proj" in name} == {
            mode if mode in ("corrected", "cautious") else "plain"
        }
        assert {rules[name] for name in rules if "lm_head" in name} == {"cautious" if mode == "cautious" else "plain"}
        decay = {"independent": 30.0, "timescale": 1.0}.get(mode, 3.0)
        assert [group["weight_decay"] for group in by_name.values()] == pytest.approx([decay] * len(by_name))
    with refusal("weight_decay_mode = 'timescale': needs steps"):
        lit_mult.build_param_groups(model, 0.1, weight_decay_mode="timescale")
    with refusal("weight_decay_mode = 'none': must be coupled, independent, corrected, cautious or timescale"):
        lit_mult.build_param_groups(model, 0.1, weight_decay_mode="none")


def test_an_optimizer_that_does_not_know_the_rule_is_refused() -> None:
    model = lit_mult.add_multipliers(foreign("llama"), "vector", verbose=False)
    groups = lit_mult.build_param_groups(model, 0.1, weight_decay_mode="cautious")
    check_optimizer(model, HybridOptimizer(groups))
    with refusal("groups have cautious decay, which AdamW has not; use HybridOptimizer"):
        check_optimizer(model, torch.optim.AdamW(groups))


def test_a_noise_twin_decays_by_the_same_rule() -> None:
    model = lit_mult.add_multipliers(foreign("llama"), "none", verbose=False)
    norms = {}
    for mode in ("coupled", "cautious"):
        own = copy.deepcopy(model)
        optimizer = HybridOptimizer(lit_mult.build_param_groups(own, 0.02, 5.0, weight_decay_mode=mode))
        noise = lit_mult.NoiseTwin(own, optimizer)
        for _ in range(60):
            noise.step()
        norms[mode] = next(row["noise_rms"] for row in noise.norms() if row["role"] == "q_proj")
    # At most half of the decay, less in a time 1 / (lr * decay) of 10 steps: the norm is sqrt(2) times as large.
    assert norms["cautious"] > 1.4 * norms["coupled"]


def test_states_with_rules_are_plain_values(tiny: Tiny) -> None:
    config = tiny({"optim.weight_decay_mode": "corrected"})
    plan = plan_run(config, 17)
    rows = plan_parameters(Llama(config.model, plan), plan)
    buffer = io.BytesIO()
    torch.save(HybridOptimizer(parameter_groups(rows), config.optim).state_dict(), buffer)
    buffer.seek(0)
    groups = torch.load(buffer, weights_only=True)["param_groups"]
    assert [group.get("decay_rule") for group in groups].count("corrected") >= 1

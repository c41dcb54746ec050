"""Parameter groups, the hybrid optimizer, clipping, schedules, and one golden training step."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_mult.config import OptimConfig, RunConfig, ScheduleConfig
from lit_mult.method.plan import plan_run
from lit_mult.method.schedule import schedule_factor
from lit_mult.nn.llama import Llama
from lit_mult.optim import muon
from lit_mult.optim.clipping import clip_gradients, gradient_norm
from lit_mult.optim.groups import parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.roles import HIDDEN_ROLES, Role
from lit_mult.training.module import LitLlama

VOCAB = 17
SHAPE = {"d_model": 32, "n_layers": 1, "head_dim": 16, "mlp_ratio": 1.0}


def configure(**settings: Any) -> RunConfig:
    settings["model"] = SHAPE | settings.get("model", {})
    return RunConfig.from_dict(settings)


def planned(config: RunConfig) -> tuple[Llama, list[Any]]:
    plan = plan_run(config, VOCAB)
    model = Llama(config.model, plan)
    return model, plan_parameters(model, plan)


# Parameter groups


@pytest.mark.parametrize("kind", ["none", "fixed", "scalar", "vector"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("table", ["full", "minimal"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(kind: str, optimizer: str, table: str, tied: bool) -> None:
    config = configure(
        multipliers=kind, optimizer=optimizer, placement={"table": table}, model={"tie_embeddings": tied}
    )
    model, rows = planned(config)
    groups = parameter_groups(rows)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    for row in rows:
        assert (row.optimizer == "muon") == (optimizer == "muon" and row.role in HIDDEN_ROLES), row.name
        assert (row.role in (Role.NORM, Role.MULTIPLIER)) == (row.parameter.ndim < 2), row.name
    HybridOptimizer(groups, config.optim)


def test_counts_of_parameters_by_role() -> None:
    _, rows = planned(configure(multipliers="vector", optimizer="muon"))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.role.value] = counts.get(row.role.value, 0) + row.parameter.numel()
    assert counts == {
        "embedding": 17 * 32,
        "lm_head": 17 * 32,
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 32 * 32),
        "norm": 3 * 32,
        # embedding row + column; rows of q, k, v, gate, up; row + column of o and down
        "multiplier": (17 + 32) + 5 * 32 + 2 * (32 + 32),
    }


def test_norms_and_multipliers_have_groups_of_their_own() -> None:
    # The same rate and decay as a matrix does not put them together: a group is read by its name in logs and tables.
    config = configure(
        multipliers="vector", optim={"lr": 0.01, "vector_lr": 0.01, "multiplier_weight_decay": 0.0, "weight_decay": 0.0}
    )
    names = [group["name"] for group in parameter_groups(planned(config)[1])]
    assert len(set(names)) == len(names) == 3
    assert {"norm", "multiplier"} < set(names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "hyperball", "muon-hyperball"])
def test_a_depth_rule_changes_adams_epsilon_in_blocks_alone(optimizer: str) -> None:
    # one layer where two are the base, l = 1/2: eps l^-1 = 2 eps; Muon's own epsilon, 1e-7, is a bound on a norm
    rules = {"depth_rule": "completep", "base_n_layers": 2}
    config = configure(multipliers="vector", optimizer=optimizer, parametrization=rules, optim={"eps": 1e-5})
    _, rows = planned(config)
    names = {id(row.parameter): row.name for row in rows}
    for group in HybridOptimizer(parameter_groups(rows), config.optim).param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            is_muon = "muon" in group["optimizer"]
            assert group["eps"] == (1e-7 if is_muon else 2e-5 if name.startswith("layers.") else 1e-5), name


def test_a_parameter_of_unknown_role_raises() -> None:
    config = configure()
    plan = plan_run(config, VOCAB)
    model = Llama(config.model, plan)
    model.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no optimizer group, for layers.0.extra.weight, layers.0.extra.bias"):
        plan_parameters(model, plan)
    model.layers[0].extra.requires_grad_(False)  # frozen parameters need none
    plan_parameters(model, plan)


def test_frozen_parameters_are_left_out() -> None:
    config = configure(multipliers="vector")
    plan = plan_run(config, VOCAB)
    model = Llama(config.model, plan)
    model.norm.weight.requires_grad_(False)
    rows = plan_parameters(model, plan)
    assert "norm.weight" not in [row.name for row in rows]
    assert len(rows) == len(list(model.parameters())) - 1


# The hybrid optimizer

OPTIM = OptimConfig(betas=(0.8, 0.9), eps=1e-6, muon_momentum=0.9, muon_ns_steps=4)
SIZES = {"a": (6, 4), "b": (3,), "c": (), "d": (8, 4), "e": (4, 8)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in SIZES.items()}


def groups(by_name: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    rows = (("d", "muon", 0.02, 0.1), ("ab", "adamw", 0.01, 0.3), ("e", "muon", 0.005, 0.0), ("c", "adamw", 0.1, 0.0))
    return [
        {"params": [by_name[n] for n in names], "name": names, "optimizer": optimizer, "lr": lr, "weight_decay": decay}
        for names, optimizer, lr, decay in rows
    ]


def set_gradients(by_name: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in by_name.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def assert_bit_identical(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_hybrid_is_torch_adamw_bit_for_bit_and_torch_muon_up_to_bfloat16() -> None:
    ours, theirs = parameters(), parameters()
    hybrid = HybridOptimizer(groups(ours), OPTIM)
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["a"], theirs["b"]], "lr": 0.01, "weight_decay": 0.3},
            {"params": [theirs["c"]], "lr": 0.1, "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=True,
    )
    muon = torch.optim.Muon(
        [
            {"params": [theirs["d"]], "lr": 0.02, "weight_decay": 0.1},
            {"params": [theirs["e"]], "lr": 0.005, "weight_decay": 0.0},
        ],
        momentum=0.9,
        ns_steps=4,
        adjust_lr_fn="match_rms_adamw",
    )
    start = parameters()
    for step in range(5):
        for by_name in (ours, theirs):
            set_gradients(by_name, step)
        for optimizer in (hybrid, adamw, muon):
            optimizer.step()
        assert_bit_identical({name: ours[name] for name in "abc"}, {name: theirs[name] for name in "abc"})
        for name in "de":
            # torch iterates in bfloat16: a few roundings of 2^-9 a step, of the distance moved
            apart = (ours[name] - theirs[name]).detach().norm() / (theirs[name] - start[name]).detach().norm()
            assert apart < 0.03
    hybrid.zero_grad()
    assert all(parameter.grad is None for parameter in ours.values())


def test_muon_is_the_float64_loop() -> None:
    ours = parameters()
    optimizer = HybridOptimizer(groups(ours), OPTIM)
    W = {name: ours[name].detach().double() for name in "de"}
    momentum = {name: torch.zeros_like(W[name]) for name in "de"}
    rates = {"d": (0.02, 0.1), "e": (0.005, 0.0)}
    for step in range(5):
        set_gradients(ours, step)
        for name, (lr, decay) in rates.items():
            G = ours[name].grad.double()
            momentum[name] = 0.9 * momentum[name] + 0.1 * G
            X = 0.1 * G + 0.9 * momentum[name]  # Nesterov
            X = X / X.norm()
            for _ in range(4):  # the quintic iteration with the coefficients of Keller Jordan's Muon
                A = X @ X.T
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            W[name] = (1 - lr * decay) * W[name] - lr * 0.2 * math.sqrt(8) * X
        optimizer.step()
        for name in W:
            torch.testing.assert_close(ours[name].detach().double(), W[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_polar_express_is_the_float64_loop(steps: int) -> None:
    """Coefficients of arXiv:2505.16932, one triple a step, the last repeated, after a division by 1.02 |x|."""
    triples = [
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.50002),
        (3.8917, -2.7725, 0.50606),
        (3.2858, -2.3681, 0.46449),
        (2.3465, -1.7098, 0.42324),
    ]
    settings = {"muon_coefficients": "polar_express", "muon_ns_steps": steps}
    ours = parameters()
    optimizer = HybridOptimizer(groups(ours), OptimConfig(**settings))
    W, momentum = ours["d"].detach().double(), torch.zeros(8, 4).double()
    for step in range(20):
        set_gradients(ours, step)
        G = ours["d"].grad.double()
        momentum = 0.95 * momentum + 0.05 * G
        X = (0.05 * G + 0.95 * momentum).T  # Nesterov; tall
        X = X / (1.02 * X.norm())
        for a, b, c in [*triples, triples[-1], triples[-1]][:steps]:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        W = (1 - 0.02 * 0.1) * W - 0.02 * 0.2 * math.sqrt(8) * X.T
        optimizer.step()
    torch.testing.assert_close(ours["d"].detach().double(), W, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6), tall=st.booleans())
def test_polar_express_brings_singular_values_closer_to_1(seed: int, tall: bool) -> None:
    """On (0.003, 1] the five polynomials in a row lie within 0.858 and 1.142, those of the quintic from 0.68 on."""
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.linalg.svdvals(matrix)[-1] > 0.003 * matrix.norm()
    matrix = matrix if tall else matrix.T
    values = torch.linalg.svdvals(muon.orthogonalize(matrix[None], muon.COEFFICIENTS["polar_express"], 5, 1e-7)[0])
    assert 0.857 < values.min() < values.max() < 1.143


def test_muons_update_has_adams_rms() -> None:
    # arXiv:2502.16982: entries of an orthogonal (8, 4) matrix have RMS 1/sqrt(8), times 0.2 sqrt(8) is 0.2. The
    # Newton-Schulz iteration leaves singular values around 0.7 to 1.2.
    by_name = {"w": nn.Parameter(torch.zeros(8, 4))}
    group = {"params": [by_name["w"]], "name": "w", "optimizer": "muon", "lr": 1.0, "weight_decay": 0.0}
    optimizer = HybridOptimizer([group], OptimConfig())
    set_gradients(by_name, 0)
    optimizer.step()
    assert float(by_name["w"].detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_a_loaded_state_continues_bit_identically() -> None:
    whole = parameters()
    optimizer = HybridOptimizer(groups(whole), OPTIM)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def advance(by_name: dict[str, nn.Parameter], optimizer: Any, scheduler: Any, steps: range) -> None:
        for step in steps:
            set_gradients(by_name, step)
            optimizer.step()
            scheduler.step()

    advance(whole, optimizer, scheduler, range(3))
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in whole.items()}
    second = HybridOptimizer(groups(resumed), OPTIM)
    second_scheduler = LambdaLR(second, lambda step: 1 / (step + 1))
    second.load_state_dict(state["optimizer"])
    second_scheduler.load_state_dict(state["scheduler"])
    assert {group["name"] for group in second.param_groups} == {"d", "ab", "e", "c"}
    assert len(second.state) == len(SIZES)
    advance(resumed, second, second_scheduler, range(3, 6))
    advance(whole, optimizer, scheduler, range(3, 6))
    assert_bit_identical(resumed, whole)


def test_closure_is_called_once_with_gradients_enabled() -> None:
    by_name = parameters()
    optimizer = HybridOptimizer(groups(by_name), OPTIM)
    before = {name: parameter.detach().clone() for name, parameter in by_name.items()}
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = sum((parameter.square().sum() for parameter in by_name.values()), torch.zeros(()))
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    torch.testing.assert_close(loss, sum(value.square().sum() for value in before.values()))
    assert all(not torch.equal(by_name[name], before[name]) for name in before)


def test_a_scheduler_reaches_both_optimizers() -> None:
    by_name = parameters()
    optimizer = HybridOptimizer(groups(by_name), OPTIM)
    scheduler = LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    peak = {"d": 0.02, "ab": 0.01, "e": 0.005, "c": 0.1}
    for factor in (1.0, 0.5, 0.0):
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
            name: factor * lr for name, lr in peak.items()
        }
        before = {name: parameter.detach().clone() for name, parameter in by_name.items()}
        set_gradients(by_name, 0)
        optimizer.step()
        assert {torch.equal(by_name[name], before[name]) for name in by_name} == {factor == 0.0}
        if factor:
            scheduler.step()


def test_duplicates_and_unknown_optimizers_raise() -> None:
    by_name = parameters()
    for name in ("adamw", "muon"):  # in the same optimizer, and in the other one
        again = {"params": [by_name["d"]], "name": "again", "optimizer": name, "lr": 1.0, "weight_decay": 0.0}
        with pytest.raises(ValueError, match="more than one parameter group"):
            HybridOptimizer([*groups(by_name), again], OPTIM)
    with pytest.raises(ValueError, match="group x: unknown optimizer 'sgd'"):
        HybridOptimizer([{"params": [by_name["a"]], "name": "x", "optimizer": "sgd"}], OPTIM)


# Clipping


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("counted", [False, True], ids=["without-multipliers", "with-multipliers"])
def test_clipping_counts_multipliers_only_when_asked(kind: str, counted: bool) -> None:
    module = LitLlama(configure(multipliers=kind, optim={"clip": 2.0, "clip_multipliers": counted}).to_dict(), VOCAB)
    optimizer = module.configure_optimizers()["optimizer"]
    rows = module.plan_parameters()
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        row.parameter.grad = torch.randn(row.parameter.shape, generator=generator)
    before = [row.parameter.grad.clone() for row in rows]
    module.configure_gradient_clipping(optimizer)
    inside = [counted or row.role is not Role.MULTIPLIER for row in rows]
    norm = math.sqrt(
        sum(float(g.double().square().sum()) for g, clipped in zip(before, inside, strict=True) if clipped)
    )
    assert norm > 2
    for row, gradient, clipped in zip(rows, before, inside, strict=True):
        if clipped:
            torch.testing.assert_close(row.parameter.grad, gradient * (2 / norm))
        else:
            assert torch.equal(row.parameter.grad, gradient)
    assert any(not clipped for clipped in inside) == (kind != "none" and not counted)


def test_gradients_below_the_limit_and_without_a_limit_stay_as_they_are() -> None:
    p, q, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(gradient_norm([p, q, idle])) == 5.0  # 3-4-5
    for limit in (None, 5.5):
        assert float(clip_gradients([p, q, idle], limit)) == 5.0
        assert (p.grad.tolist(), q.grad.tolist()) == ([3.0, 0.0], [0.0, 4.0])
    assert float(clip_gradients([p], 1.0)) == 3.0
    assert p.grad.tolist() == pytest.approx([1.0, 0.0], rel=1e-5)
    assert q.grad.tolist() == [0.0, 4.0]


# Schedules: factors by hand

SCHEDULES = [
    # wsd, 12 steps: warmup round(1.2) = 1 step, decay over the last 2 = 12/6: 8^(-1/2), 8^-1.
    ({}, 12, [1] * 10 + [8**-0.5, 1 / 8]),
    # wsd, 8 steps: warmup 4 (1/4, ..., 1), decay 2: 4^(-1/2), 4^-1.
    ({"warmup_fraction": 0.5, "decay_fraction": 0.25, "final_ratio": 0.25}, 8, [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.25]),
    # wsd that decays from the end of its warmup: 2 + 2 steps.
    ({"warmup_fraction": 0.5, "decay_fraction": 0.5, "final_ratio": 0.25}, 4, [0.5, 1, 0.5, 0.25]),
    # wsd without decay.
    ({"warmup_fraction": 0.5, "decay_fraction": 0.0}, 4, [0.5, 1, 1, 1]),
    # cosine, warmup 2, then 4 steps at progress 1/4, ..., 1: 0.2 + 0.8 (1 + cos(pi progress))/2.
    (
        {"name": "cosine", "warmup_fraction": 1 / 3, "final_ratio": 0.2},
        6,
        [0.5, 1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2],
    ),
    # linear, warmup 1, then 4 steps from 1 down to 0.
    ({"name": "linear", "warmup_fraction": 0.2, "final_ratio": 0.0}, 5, [1, 0.75, 0.5, 0.25, 0]),
    # without warmup the decay begins on the first step.
    ({"name": "linear", "warmup_fraction": 0.0, "final_ratio": 0.5}, 2, [0.75, 0.5]),
    ({"name": "cosine", "warmup_fraction": 0.0, "final_ratio": 0.0}, 2, [0.5, 0]),
    ({"name": "constant", "warmup_fraction": 0.5}, 4, [0.5, 1, 1, 1]),
    ({"name": "constant", "warmup_fraction": 0.0}, 3, [1, 1, 1]),
    # warmup all the way.
    ({"name": "linear", "warmup_fraction": 1.0}, 3, [1 / 3, 2 / 3, 1]),
    ({"name": "wsd", "warmup_fraction": 1.0, "decay_fraction": 0.0}, 2, [0.5, 1]),
    # one step: round(0.1) = round(1/6) = 0 steps of warmup and decay; linear and cosine end at once.
    ({}, 1, [1]),
    ({"name": "linear", "final_ratio": 0.3}, 1, [0.3]),
    ({"name": "cosine", "final_ratio": 0.3}, 1, [0.3]),
    ({"name": "constant"}, 1, [1]),
]


@pytest.mark.parametrize(("settings", "steps", "expected"), SCHEDULES)
def test_schedule_by_hand(settings: dict[str, Any], steps: int, expected: list[float]) -> None:
    config = ScheduleConfig.model_validate(settings)
    assert [schedule_factor(step, steps, config) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 301])
def test_schedules_rise_to_one_and_never_rise_again(name: str, steps: int) -> None:
    config = ScheduleConfig.model_validate({"name": name, "warmup_fraction": 0.1, "final_ratio": 0.125})
    warmup = round(0.1 * steps)
    factors = [schedule_factor(step, steps, config) for step in range(steps + 1)]  # a scheduler asks one step further
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    after = factors[warmup:]
    assert all(0.125 - 1e-12 <= later <= earlier <= 1 for earlier, later in itertools.pairwise(after))
    assert factors[steps] == factors[steps - 1]


# One golden step


def test_golden_training_step() -> None:
    torch.manual_seed(0)
    config = RunConfig.from_dict(
        {
            "multipliers": "vector",
            "optimizer": "muon",
            "seed": 1,
            "model": {"d_model": 64, "n_layers": 2, "head_dim": 16, "mlp_ratio": 1.5, "num_key_value_groups": 2},
            "parametrization": {"base_d_model": 32, "width_rule": "lr_wd"},
            "optim": {"lr": 2**-6},
            "schedule": {"warmup_fraction": 0.0},
            "train": {"steps": 10},
        }
    )
    module = LitLlama(config.to_dict(), vocab_size=29)
    optimizer = module.configure_optimizers()["optimizer"]
    window_BT1 = (torch.arange(4 * 13).view(4, 13) * 7 + torch.arange(4)[:, None] ** 2) % 29
    start = [row.parameter.detach().clone() for row in module.plan_parameters()]
    losses = []
    for step in range(2):
        loss = module.training_step(window_BT1, step)
        losses.append(loss.item())
        if step == 0:
            loss.backward()
            module.configure_gradient_clipping(optimizer)
            optimizer.step()
    moved = {"muon": 0.0, "matrix": 0.0, "norm": 0.0, "multiplier": 0.0}
    for row, before in zip(module.plan_parameters(), start, strict=True):
        kind = row.role.value if row.role.value in moved else "muon" if row.optimizer == "muon" else "matrix"
        moved[kind] += float((row.parameter.detach() - before).double().square().sum())
    got = {"first loss": losses[0], "second loss": losses[1], **moved}

    # Losses, and the squared distance that each kind of parameter moves. Recorded on CPU with torch 2.13, where all is
    # float32. By hand: Adam's first step moves every entry by lr, and the 5 norms of 64 by 5 * 64 * 0.01^2 = 0.0320.
    golden = {
        "first loss": 3.6429355,
        "second loss": 2.6894463,
        "muon": 0.15746135,
        "matrix": 0.46069897,
        "norm": 0.03199946,
        "multiplier": 0.13020924,
    }
    tolerance = dict.fromkeys(golden, 1e-3) | {"first loss": 1e-5}
    wrong = [name for name in golden if got[name] != pytest.approx(golden[name], rel=tolerance[name])]
    assert not wrong, (
        f"one training step gives other numbers than before for {', '.join(wrong)}. A change that was not meant to "
        f"alter training has altered it: find out why. If it was meant to (initialization, scaling, model, optimizer), "
        f"say so in the changelog, rerun the reference results, and set golden = {got}"
    )

"""Coordinate check (arXiv:2203.03466 app. D.1): how far activations move in a few steps must not depend on width.

The quantity is the RMS of the change of an activation after three steps on one batch, and its exponent in the width:
0 is what muP promises, under AdamW and under Muon. This is the measurement behind Muon's `rules.width_factor`; that the
rules as a whole keep their promise is for `lit-mult coord-check` (test_coord_check.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.method import rules
from lit_mult.registry.roles import HIDDEN_ROLES
from lit_mult.training.module import LitLlama

WIDTHS = (32, 64, 128, 256, 512)
BASE, VOCAB, STEPS = 32, 64, 3
SEEDS = (0, 1, 2)  # averages of the logarithm
# Exponents are fitted on the widths from 128 on. Below that muP's own finite-size part is seen: the head starts at
# 1/sqrt(m) of its size, so that logits change by a + b / sqrt(m), which falls towards a.
FITTED = WIDTHS[2:]
MUP = [("mup", "lr"), ("mup", "lr_wd"), ("mup", "multiplier")]

Changes = dict[str, float]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def changes(width: int, optimizer: str, rule: str, width_rule: str, seed: int, kind: str) -> Changes:
    """RMS of the change of activations from initialization, after a few steps on one batch."""
    config = RunConfig.from_dict(
        {
            "multipliers": kind,
            "optimizer": optimizer,
            "seed": seed,
            "model": {"d_model": width, "n_layers": 1, "head_dim": 16, "num_key_value_groups": 2, "mlp_ratio": 0.5},
            "parametrization": {"rule": rule, "width_rule": width_rule, "base_d_model": BASE},
            "optim": {"lr": 2**-8, "clip": None},
            "schedule": {"name": "constant", "warmup_fraction": 0.0},
        }
    )
    module = LitLlama(config.to_dict(), VOCAB)
    model, down = module.model, module.model.layers[0].mlp.down_proj
    seen: dict[str, Tensor] = {}
    model.norm.register_forward_hook(lambda module, args, out: seen.update({"residual stream": args[0].detach()}))
    down.register_forward_hook(lambda module, args, out: seen.update({"input of down_proj": args[0].detach()}))
    window_BT1 = torch.randint(VOCAB, (4, 33), generator=torch.Generator().manual_seed(100 + seed))

    def look() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(window_BT1[:, :-1])} | seen

    before, weight = look(), down.effective_weight().detach().clone()
    optimizer_ = module.configure_optimizers()["optimizer"]
    for step in range(STEPS):
        optimizer_.zero_grad()
        module.training_step(window_BT1, step).backward()
        optimizer_.step()
    after = look()
    moved = {name: rms(after[name] - before[name]) for name in ("logits", "residual stream")}
    dW = down.effective_weight().detach() - weight
    return moved | {"dW x": rms(after["input of down_proj"] @ dW.T)}


def measure(optimizer: str, rule: str, width_rule: str, kind: str = "none") -> dict[int, Changes]:
    """Changes by width, averaged over the seeds."""
    by_width = {}
    for width in WIDTHS:
        runs = [changes(width, optimizer, rule, width_rule, seed, kind) for seed in SEEDS]
        by_width[width] = {name: math.exp(statistics.fmean(math.log(run[name]) for run in runs)) for name in runs[0]}
    return by_width


measured = cache(measure)


def exponent(by_width: dict[int, Changes], name: str) -> float:
    """Slope of log2(change) against log2(width)."""
    x = [math.log2(width) for width in FITTED]
    return statistics.linear_regression(x, [math.log2(by_width[width][name]) for width in FITTED]).slope


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_base_width_the_rules_change_activations_alike(optimizer: str) -> None:
    standard = measured(optimizer, "standard", "lr")[BASE]
    for rule, width_rule in MUP:
        assert measured(optimizer, rule, width_rule)[BASE] == standard


# An update of Muon matched to Adam's RMS is orthogonal times 0.2 lr sqrt(max(d_out, d_in)): for a fixed aspect ratio it
# moves the output by lr sqrt(m). So a rate of m^-p moves it by m^(1/2 - p).
@pytest.mark.parametrize(("power", "expected"), [(0.0, 0.5), (0.5, 0.0), (1.0, -0.5)])
def test_muon_needs_one_over_the_root_of_the_width(
    monkeypatch: pytest.MonkeyPatch, power: float, expected: float
) -> None:
    ours: Callable[..., float] = rules.width_factor

    def with_power(role: Any, shape: Any, base_shape: Any, *rest: Any) -> float:
        if role in HIDDEN_ROLES:
            return float((base_shape[1] / shape[1]) ** power)
        return ours(role, shape, base_shape, *rest)

    if power != 0.5:
        monkeypatch.setattr(rules, "width_factor", with_power)
        by_width = measure("muon", "mup", "lr")
    else:
        by_width = measured("muon", "mup", "lr")
    assert exponent(by_width, "dW x") == pytest.approx(expected, abs=0.15)

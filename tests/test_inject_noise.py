"""Pure noise beside a model that is not ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lit_mult
from lit_mult.config import OptimConfig
from lit_mult.optim import adamw, muon
from lit_mult.registry.contracts import OptimizerSettings


def small(kind: str = "vector") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 48), nn.RMSNorm(48), nn.Linear(48, 40, bias=False))
    roles = {"0": "embedding", "1": "gate_proj", "3": "lm_head"}
    return lit_mult.add_multipliers(model, kind, roles=roles, verbose=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_on_noise_has_the_norms_of_its_twins_and_of_the_closed_form(optimizer: str) -> None:
    lr, decay, steps = 0.02, 0.5, 300  # lr * weight_decay * steps = 3
    model = small()
    trained = lit_mult.HybridOptimizer(
        lit_mult.build_param_groups(model, lr, decay, optimizer, vector_lr=0.01), OptimizerSettings()
    )
    noise = lit_mult.NoiseTwin(model, trained)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in trained.param_groups:
            group["lr"] = (lr if group["weight_decay"] == decay else 0.01) * min(1, step / 20)  # a schedule
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        trained.step()
        noise.step()
    rows = {row["name"]: row for row in noise.norms()}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert [rows[name]["role"] for name in ("0.weight", "0.row", "1.weight", "1.bias", "2.weight")] == [
        "embedding",
        "multiplier",
        "gate_proj",
        "vector",
        "vector",
    ]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(1, abs=0.12), row
    reference = {"adamw": adamw, "muon": muon}[optimizer].NOISE.autocorrelation
    assert reference is not None
    balance = reference(OptimConfig(), (48, 32)).equilibrium(lr, decay)
    assert rows["1.weight"]["noise_rms"] == pytest.approx(balance, rel=0.1)


@pytest.mark.parametrize("optimizer", ["scion", "scion-sign"])
def test_twins_keep_the_sides_on_which_updates_depend(optimizer: str) -> None:
    model = small("none")
    trained = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, 0.01, optimizer=optimizer))
    whole, cut = (lit_mult.NoiseTwin(model, trained, max_dim=most) for most in (256, 8))
    for _ in range(3):
        for noise in (whole, cut):
            noise.step()
    for one, other in zip(whole.norms(), cut.norms(), strict=True):
        assert one["noise_rms"] == pytest.approx(other["noise_rms"], rel=1e-6), one["name"]


def test_what_is_no_noise_differs_from_its_twin_and_the_training_from_nothing() -> None:
    model, alone = small("scalar"), small("scalar")
    optimizers = [torch.optim.AdamW(lit_mult.build_param_groups(one, 0.01, 0.1)) for one in (model, alone)]
    noise = lit_mult.NoiseTwin(model, optimizers[0])
    ids = torch.arange(40)
    state = torch.get_rng_state()
    for _ in range(60):
        for one, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(ids), ids).backward()
            optimizer.step()
        noise.step()
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    ratios = {row["name"]: row["ratio"] for row in noise.norms()}
    assert ratios["1.scalar"] > 1.1  # its gradients agree from step to step

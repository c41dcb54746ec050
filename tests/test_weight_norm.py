"""Weight normalization as a kind of multipliers, against torch's own and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import initialized
from tiny_runs import Tiny
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lit_mult
from lit_mult.config import RunConfig
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.nn.multipliers import MultipliedLinear
from lit_mult.nn.weight_norm import normalized_weight
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run

VOCAB = 17


def model_of(config: RunConfig) -> Llama:
    return initialized(config, VOCAB, config.seed)


def test_training_is_that_of_torchs_weight_norm() -> None:
    """Twenty SGD steps on one matrix, in float64: torch.nn.utils.parametrizations.weight_norm is the oracle."""
    torch.manual_seed(0)
    theirs = weight_norm(nn.Linear(5, 3, bias=False, dtype=torch.float64))
    g, v = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    row, weight = g.detach().flatten().clone().requires_grad_(), v.detach().clone().requires_grad_()
    for _ in range(20):
        x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        for module in (lambda x: theirs(x), lambda x: x @ normalized_weight(weight, row=row).T):
            (module(x) - y).square().mean().backward()
        with torch.no_grad():
            for parameter in (g, v, row, weight):
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    torch.testing.assert_close(row, g.flatten(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight, v, rtol=1e-12, atol=0)


def test_gradients_are_those_of_the_paper() -> None:
    torch.manual_seed(1)
    weight, row = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 6), (4,)))
    G = torch.randn(4, 6, dtype=torch.float64)
    (normalized_weight(weight, row=row) * G).sum().backward()
    norm = weight.norm(dim=1, keepdim=True)
    U = weight / norm
    along = (G * U).sum(1, keepdim=True)
    torch.testing.assert_close(row.grad, along.flatten())
    torch.testing.assert_close(weight.grad, row[:, None] / norm * (G - along * U))
    torch.testing.assert_close((weight.grad * weight).sum(1), torch.zeros(4, dtype=torch.float64))  # V turns only


@pytest.mark.parametrize("width_rule", ["lr", "multiplier"])
def test_the_model_starts_as_that_without_multipliers(tiny: Tiny, width_rule: str) -> None:
    settings = {"model.d_model": 32, "parametrization.width_rule": width_rule}
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    normalized, plain = model_of(tiny({**settings, "multipliers": "weight_norm"})), model_of(tiny(settings))
    torch.testing.assert_close(normalized(ids), plain(ids), rtol=1e-5, atol=1e-5)
    q_proj = normalized.layers[0].self_attn.q_proj
    assert isinstance(q_proj, MultipliedLinear)
    assert list(q_proj.multipliers) == ["row"]
    assert normalized.lm_head.multipliers == {}  # as the placement has none there
    torch.testing.assert_close(q_proj.row.detach(), q_proj.weight.detach().norm(dim=1))


def test_rows_alone_set_the_norms_and_merge(tiny: Tiny) -> None:
    model = model_of(tiny({"multipliers": "weight_norm"}))
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        for module in model.modules():
            if isinstance(module, MultipliedLinear) and module.row is not None:
                module.weight.mul_(torch.rand(len(module.weight), 1) + 0.5)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(model)(ids), before, rtol=1e-4, atol=1e-4)


def test_a_preset_starts_rows_at_its_forward_multipliers(tiny: Tiny) -> None:
    settings = {"multipliers": "weight_norm", "placement.init": "preset", "parametrization.forward": {"k_proj": 0.25}}
    k_proj = model_of(tiny(settings)).layers[0].self_attn.k_proj
    torch.testing.assert_close(k_proj.row.detach(), k_proj.weight.detach().norm(dim=1) / 4)


def test_it_runs_with_diagnostics_and_in_a_stack_as_alone(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"multipliers": "weight_norm", "optimizer": "muon"}
    alone = [run(tiny({**settings, "seed": seed}), tmp_path / f"{seed}") for seed in (0, 1)]
    members = [Member(tiny({**settings, "seed": seed}), tmp_path / f"stack{seed}") for seed in (0, 1)]
    for one, other in zip(alone, run_stack(members), strict=True):
        assert one.final_loss == pytest.approx(other.final_loss, abs=1e-5)
    groups = ["norms", "rows", "updates", "gradients", "symmetry", "brownian"]
    recorded = run(tiny({**settings, "train.diagnostics": groups, "train.diagnostics_every": 6}), tmp_path / "recorded")
    assert recorded.final_loss == alone[0].final_loss
    quantities = set(lit_mult.load_diagnostics(tmp_path / "recorded")["quantity"])
    assert {"row_noise_rms", "weight_noise_rms", "row_rms", "effective_update"} <= quantities

"""Softplus gains as a kind of multipliers, by hand and against plain multipliers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from foreign_models import disturb, foreign, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from models import initialized
from tiny_runs import Tiny, stop_at

import lit_mult
from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.hf.export import export
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.nn.multipliers import effective_weight
from lit_mult.nn.softplus import softplus_weight
from lit_mult.registry.kinds import KINDS
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

VOCAB = 17


def model_of(config: RunConfig) -> Llama:
    return initialized(config, VOCAB, config.seed)


def test_gradients_are_those_of_vectors_times_the_logistic_function() -> None:
    """With What = W, G = dL/dW_eff and gains r, c (arXiv:2606.25971 algorithm 2):

    g_r = ((What o G) c) f(row), g_c = ((What o G)^T r) f(column), and G_What = diag(r) G diag(c).
    """
    generator = torch.Generator().manual_seed(0)
    W, G = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    row, column = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (4, 6))
    r, c = (torch.log1p(x.exp()) for x in (row, column))
    of_softplus = [x.clone().requires_grad_() for x in (W, row, column)]
    of_vectors = [x.clone().requires_grad_() for x in (W, r, c)]
    for form, (weight, rows, columns) in ((softplus_weight, of_softplus), (effective_weight, of_vectors)):
        (form(weight, 0.5, row=rows, column=columns) * G / 0.5).sum().backward()

    f_row, f_column = (1 / (1 + (-x).exp()) for x in (row, column))
    expected = (r[:, None] * G * c, (W * G) @ c * f_row, (W * G).T @ r * f_column)
    for ours, by_hand in zip(of_softplus, expected, strict=True):
        torch.testing.assert_close(ours.grad, by_hand, rtol=1e-12, atol=0)
    for ours, plain, factor in zip(of_softplus, of_vectors, (torch.ones(4, 1), f_row, f_column), strict=True):
        assert ours.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(ours.grad, plain.grad * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("width_rule", ["lr", "multiplier"])
def test_the_model_starts_as_that_without_multipliers(tiny: Tiny, width_rule: str) -> None:
    settings = {"model.d_model": 32, "parametrization.width_rule": width_rule}
    overrides = {"layers.0.*": "scalar"}
    gains = model_of(tiny({**settings, "multipliers": "softplus", "placement.overrides": overrides}))
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gains(ids), model_of(tiny(settings))(ids), rtol=1e-5, atol=1e-5)
    vectors = model_of(tiny({**settings, "multipliers": "vector", "placement.overrides": overrides}))
    assert {name for name, _ in gains.named_parameters()} == {name for name, _ in vectors.named_parameters()}
    assert gains.embed_tokens.row[0].item() == pytest.approx(math.log(math.e - 1))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(first=st.floats(0.02, 50), second=st.floats(0.02, 50))
def test_a_start_is_scaled_by_the_inverse(first: float, second: float) -> None:
    kind = KINDS["softplus"]
    start = kind.scaled(kind.scaled(math.log(math.e - 1), first), second)
    assert max(start, 0) + math.log1p(math.exp(-abs(start))) == pytest.approx(first * second, rel=1e-9)


def test_a_preset_starts_gains_at_its_forward_multipliers(tiny: Tiny) -> None:
    preset = {"placement.init": "preset", "parametrization.forward": {"k_proj": 0.25, "embedding": 30.0}}
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    gains, vectors = (model_of(tiny({**preset, "multipliers": kind})) for kind in ("softplus", "vector"))
    torch.testing.assert_close(gains(ids), vectors(ids), rtol=1e-5, atol=1e-5)
    k_proj = gains.layers[0].self_attn.k_proj
    torch.testing.assert_close(k_proj.effective_weight(), 0.25 * k_proj.weight)


def test_merging_and_export_give_plain_weights(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"multipliers": "softplus", "optimizer": "muon-sphere", "optim.vector_lr": 0.1})
    record = run(config, tmp_path / "a")
    trained = load_trained(tmp_path / "a")
    model, ids = trained.model, torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    assert model.embed_tokens.row.std().item() > 0.01  # trained
    torch.testing.assert_close(merged(model)(ids), model(ids), rtol=1e-4, atol=1e-4)
    plain = {name for name, _ in merged(model).named_parameters()}
    assert plain == {name for name, _ in model_of(tiny()).named_parameters()}
    assert export(model, config, trained.corpus, trained.step, tmp_path / "hf", record=record).within_rounding


@pytest.mark.parametrize("optimizer", ["adamw", "muon-sphere"])
def test_a_stopped_run_goes_on_exactly(optimizer: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"multipliers": "softplus", "optimizer": optimizer})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", on_progress=stop_at(6))
    assert run(config, tmp_path / "part").train_curve == whole.train_curve


def test_it_trains_in_a_stack_as_alone(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"multipliers": "softplus", "optimizer": "muon"}
    alone = [run(tiny({**settings, "seed": seed}), tmp_path / f"{seed}") for seed in (0, 1)]
    members = [Member(tiny({**settings, "seed": seed}), tmp_path / f"stack{seed}") for seed in (0, 1)]
    for one, other in zip(alone, run_stack(members), strict=True):
        assert one.final_loss == pytest.approx(other.final_loss, abs=1e-5)


def test_what_takes_logarithms_of_multipliers_refuses_it(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"multipliers": "softplus", "train.diagnostics": ["symmetry"]})
    with pytest.raises(ConfigError, match="multipliers = 'softplus': is no product of multipliers and matrix"):
        run(config, tmp_path / "a")


def test_on_a_foreign_model_with_a_row_of_zeros() -> None:
    """Zeros stay zeros; weight normalization could not divide by their norm."""
    model, ids = foreign("llama"), token_ids()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0
        before = model(ids).logits
        lit_mult.add_multipliers(model, kind="softplus", placement={"*.down_proj": "scalar"}, verbose=False)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
        disturb(model)
        disturbed = model(ids).logits
        assert (disturbed - before).abs().max() > 0.01
        lit_mult.merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, disturbed, rtol=1e-4, atol=1e-4)

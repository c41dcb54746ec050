"""Training in 16 bits: multipliers and norm weights stay in float32, matrices and their products do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import initialized
from refusals import refusal
from test_multipliers import filled, matrix_plan
from tiny_runs import Tiny, stop_at, weights
from torch import Tensor, nn

from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.nn.multipliers import MultipliedLinear
from lit_mult.registry.contracts import Axis
from lit_mult.stacked.model import stack
from lit_mult.stacked.optimizer import StackedOptimizer
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import LitLlama
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to(bfloat16)": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "bfloat16()": (lambda module: module.bfloat16(), torch.bfloat16),
    "half()": (lambda module: module.half(), torch.float16),
}
KINDS = ["scalar", "vector", "weight_norm"]


def is_matrix(name: str) -> bool:
    return "norm" not in name and name.endswith(".weight")


def build(kind: str, **model: Any) -> Llama:
    small = {"d_model": 16, "n_layers": 1, "head_dim": 8} | model
    config = {"multipliers": kind, "model": small, "parametrization": {"base_d_model": 8}}
    return initialized(RunConfig.from_dict(config), 19)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_has_matrices_and_activations_of_16_bits_and_the_rest_in_float32(cast: str, kind: str) -> None:
    convert, dtype = CASTS[cast]
    model = build(kind, final_norm="scalar")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    convert(model)

    for name, parameter in model.named_parameters():
        assert parameter.dtype == (dtype if is_matrix(name) else torch.float32), name
        assert torch.equal(parameter, before[name].to(parameter.dtype))

    seen: set[torch.dtype] = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    logits = model(torch.arange(12).view(2, 6))
    assert seen == {dtype}
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
    convert(model)  # gradients follow their parameters
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())


@pytest.mark.parametrize("axis", Axis)
def test_an_effective_matrix_is_rounded_once(axis: Axis) -> None:
    module = filled(MultipliedLinear(matrix_plan(frozenset({axis}), constant=0.7, shape=(40, 30)))).float().bfloat16()
    # below half the distance from 1 to the next bfloat16, 2^-7, but not lost on products
    module.get_parameter(axis).data.fill_(1 + 2**-9)
    W = module.weight.detach().double()

    W_eff = module.effective_weight()
    W_eff.sum().backward()

    assert W_eff.dtype == torch.bfloat16
    assert torch.equal(W_eff, (0.7 * (1 + 2**-9) * W).float().bfloat16())
    assert not torch.equal(W_eff, (0.7 * W).float().bfloat16())
    sides = {Axis.ROW: 1, Axis.COLUMN: 0, Axis.SCALAR: (0, 1)}
    torch.testing.assert_close(module.get_parameter(axis).grad, (0.7 * W).sum(sides[axis]).float())


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The multipliers in a checkpoint."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] in list(Axis)}


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_learn_in_bf16_true_as_they_do_in_float32(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    runs = {}
    for precision in ("32-true", "bf16-true"):
        run(tiny({"multipliers": kind, "trainer.precision": precision}), tmp_path / precision)
        runs[precision] = weights(tmp_path / precision)

    exact = learned(runs["32-true"])
    assert exact
    model = initialized(tiny({"multipliers": kind}), 256)
    start = learned({f"model.{name}": value for name, value in model.state_dict().items()})
    for name, value in learned(runs["bf16-true"]).items():
        assert value.dtype == torch.float32
        moved, expected = value - start[name], exact[name] - start[name]
        assert expected.abs().max() > 1e-3
        # gradients of 8 bits change a step by a few per cent
        assert (moved - expected).norm() < 0.2 * expected.norm(), name
    assert {v.dtype for name, v in runs["bf16-true"].items() if is_matrix(name)} == {torch.bfloat16}


def test_the_optimizer_s_moments_of_multipliers_are_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"multipliers": "vector", "trainer.precision": "bf16-true"})
    run(config, tmp_path)
    state = torch.load(RunFolder(tmp_path).final_checkpoint, weights_only=True)["optimizer_states"][0]
    types = {}
    for group in state["param_groups"]:
        moments = [state["state"][index] for index in group["params"]]
        types[group["name"]] = {moment[name].dtype for moment in moments for name in ("exp_avg", "exp_avg_sq")}
    assert types.pop("multiplier") == types.pop("norm") == {torch.float32}
    assert set.union(*types.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "muon", "hyperball", "muon-hyperball", "muon-sphere", "muown", "normuon", "scion", "scion-sign"],
)
def test_a_stopped_run_in_16_bits_goes_on_to_the_same_bits(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    rates = {"optim.lr": 1e-3} if "scion" in optimizer else {}
    config = tiny({"multipliers": "vector", "optimizer": optimizer, "trainer.precision": "bf16-true", **rates})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(config, tmp_path / "parts", on_progress=stop_at(6))
    parts = run(config, tmp_path / "parts")

    assert (parts.train_curve, parts.val_curve) == (whole.train_curve, whole.val_curve)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())


def test_a_model_trained_in_16_bits_is_loaded_with_its_very_multipliers_and_merged(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny({"multipliers": "vector", "trainer.precision": "bf16-true"}), tmp_path)

    model = load_trained(tmp_path).model

    held = weights(tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, held[f"model.{name}"].float())
    ids = torch.arange(48).view(3, 16)
    torch.testing.assert_close(merged(model)(ids), model(ids), rtol=0, atol=1e-5)


def test_diagnostics_of_a_run_in_16_bits_are_finite(tiny: Tiny, tmp_path: Path) -> None:
    groups = ["norms", "rows", "outputs", "updates", "gradients", "symmetry", "noise"]
    fields = {"multipliers": "vector", "trainer.precision": "bf16-true", "train.diagnostics_every": 4}
    run(tiny(fields | {"train.diagnostics": groups}), tmp_path)
    assert load_diagnostics(tmp_path)["value"].abs().lt(1e9).all()


def test_an_update_of_nothing_is_0_in_16_bits(tiny: Tiny, tmp_path: Path) -> None:
    # With weight normalization no effective matrix is its weight, so that rounding one and not the other would show.
    fields = {"multipliers": "weight_norm", "optim.lr": 1e-30, "optim.vector_lr": 1e-30}
    run(tiny(fields | {"trainer.precision": "bf16-true", "train.diagnostics": ["updates"]}), tmp_path)
    readings = load_diagnostics(tmp_path)
    updates = readings[readings["quantity"] == "effective_update"]["value"]
    assert len(updates) == 9
    assert (updates == 0).all()


def test_a_stack_holds_parameters_of_one_type(tiny: Tiny) -> None:
    config = tiny({"multipliers": "vector"})
    alone = LitLlama(config.to_dict(), 19).bfloat16()
    with pytest.raises(ValueError, match=r"are of torch\.bfloat16 and torch\.float32$"):
        StackedOptimizer(dict(stack([alone.model]).named_parameters()), [alone.plan_parameters()], [config])


def test_a_stack_in_16_bits_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    members = [Member(tiny({"trainer.precision": "bf16-true", "seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    with refusal("trainer.precision = 'bf16-true': has parameters of two types, which a stack cannot hold"):
        run_stack(members)
    assert not list(tmp_path.iterdir())


def test_the_validation_loss_is_a_mean_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"trainer.precision": "bf16-true"})
    metric = LitLlama(config.to_dict(), 256).to(torch.bfloat16).val_loss
    for value in [1.0, 3.0] * 300:  # in bfloat16 256 + 1 is 256
        metric.update(torch.tensor(value), 1)
    assert metric.compute().item() == 2.0

    loss = torch.tensor(run(config, tmp_path).final_loss)
    assert loss != loss.bfloat16().float()

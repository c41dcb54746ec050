"""Norms that are scalars or frozen at 1 (arXiv:2601.04890 fig. 1: VPN, SPN, FPN): model, groups, export, hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import initialized
from safetensors.torch import load_file
from tiny_runs import Tiny
from transformers import AutoModelForCausalLM

from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError
from lit_mult.hf.export import export
from lit_mult.hf.pretrained import config_part, start_from_pretrained
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.optim.groups import parameter_groups, plan_parameters
from lit_mult.training.folder import RunFolder
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

VOCAB = 48
SMALL = {"model.d_model": 16, "model.head_dim": 8, "model.n_layers": 2, "parametrization.base_d_model": 8}
FROZEN = {"model.block_norms": "frozen", "model.final_norm": "frozen"}
SCALAR = {"model.final_norm": "scalar"}


def build(overrides: dict[str, Any], value: float = 1.0) -> tuple[Llama, RunConfig]:
    """An initialized model whose final norm weighs `value` where it is learned."""
    config = RunConfig().with_overrides(SMALL | overrides)
    model = initialized(config, VOCAB)
    if model.norm.weight.requires_grad:
        with torch.no_grad():
            model.norm.weight.fill_(value)
    return model, config


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


def test_hashes_from_before_these_fields_stand() -> None:
    # AlreadyClaimed from the version before block_norms, final_norm and train.diagnostics existed.
    assert RunConfig().hash == "47ff211b683b0226"
    assert RunConfig().with_overrides({"multipliers": "vector", "optimizer": "muon"}).hash == "a227642da9dfed7f"
    recording = RunConfig().with_overrides({"train.diagnostics": ["norms"], "train.diagnostics_every": 7})
    assert recording.hash == RunConfig().hash
    others = [FROZEN, SCALAR, {"model.block_norms": "frozen"}, {"model.final_norm": "frozen"}]
    assert len({RunConfig().with_overrides(other).hash for other in [{}, *others]}) == 5


def test_all_kinds_start_as_the_same_model() -> None:
    logits = [build(overrides)[0](ids()) for overrides in ({}, SCALAR, FROZEN)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_scalar_norm_is_a_vector_of_equal_entries() -> None:
    scalar, vector = build(SCALAR, 2.5)[0], build({}, 2.5)[0]
    assert scalar.norm.weight.shape == ()
    assert torch.equal(scalar(ids()), vector(ids()))

    for model in (scalar, vector):
        model(ids()).square().sum().backward()
    torch.testing.assert_close(scalar.norm.weight.grad, vector.norm.weight.grad.sum())
    for name in ("embed_tokens", "layers.0.self_attn.q_proj", "lm_head"):
        got, wanted = (model.get_submodule(name).weight.grad for model in (scalar, vector))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_a_frozen_norm_changes_no_other_gradient_and_has_none() -> None:
    frozen, learned = build(FROZEN)[0], build({})[0]
    for model in (frozen, learned):
        model(ids()).square().sum().backward()
    wanted = dict(learned.named_parameters())
    for name, parameter in frozen.named_parameters():
        if "norm" in name:
            assert (parameter.grad, parameter.requires_grad) == (None, False)
        else:
            assert torch.equal(parameter.grad, wanted[name].grad), name


def test_the_groups_have_the_scalar_without_decay_and_no_frozen_norm(capsys: pytest.CaptureFixture[str]) -> None:
    model, config = build(SCALAR | {"model.block_norms": "frozen", "optim.vector_lr": 0.03, "multipliers": "vector"})
    rows = plan_parameters(model, plan_run(config, VOCAB))
    norms = [row for row in rows if row.role == "norm"]
    assert [(row.name, row.lr, row.weight_decay, row.optimizer) for row in norms] == [("norm.weight", 0.03, 0, "adamw")]
    (group,) = [group for group in parameter_groups(rows) if group["name"] == "norm"]
    assert group["params"] == [model.norm.weight]

    flags = [f"--{name}={value}" for name, value in (SMALL | SCALAR | {"model.block_norms": "frozen"}).items()]
    assert main(["parameters", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "norm" in line]
    assert [line[:3] for line in lines] == [["norm.weight", "norm", "1"]]


@pytest.mark.parametrize("overrides", [SCALAR, FROZEN, {**SCALAR, "model.block_norms": "frozen"}])
def test_a_trained_model_is_exported_and_read_back(overrides: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"multipliers": "vector", "data.val_windows": 16, **overrides})
    record = run(config, tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    held = torch.load(RunFolder(tmp_path / "run").final_checkpoint, weights_only=True)["state_dict"]
    frozen_blocks, frozen_final = config.model.block_norms == "frozen", config.model.final_norm == "frozen"
    for name, weight in held.items():
        if "norm" in name:
            frozen = frozen_final if name == "model.norm.weight" else frozen_blocks
            assert bool((weight == 1).all()) is frozen, name  # what is not frozen has learned something
    final = held["model.norm.weight"]
    # a step of the usual run counts three vectors of norms
    norms = 2 * 16 * (not frozen_blocks) + (not frozen_final)
    whole = run(tiny({"multipliers": "vector", "train.steps": 1, "data.val_windows": 16}), tmp_path / "whole")
    assert record.parameters["total"] == whole.parameters["total"] - 3 * 16 + norms

    export(trained.model, config, trained.corpus, trained.step, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(weights["model.norm.weight"], final.expand(16))
    torch.testing.assert_close(merged(trained.model)(ids()), trained.model(ids()), rtol=1e-5, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")

    part = config_part(tmp_path / "hf")
    started = RunConfig.from_dict(part).with_overrides(overrides)
    plan = plan_run(started, 256)
    again = Llama(started.model, plan)
    initialize(again, plan, seed=3)
    start_from_pretrained(again, plan, started)
    torch.testing.assert_close(again(ids()), trained.model(ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.final_norm": "scalar"}, "model.final_norm = 'scalar': must be vector: norm of "),
        ({"model.final_norm": "frozen"}, "model.final_norm = 'frozen': must be vector: norm of "),
        (
            {"model.block_norms": "frozen"},
            "model.block_norms = 'frozen': must be learned: layers.0.input_layernorm of ",
        ),
    ],
)
def test_learned_norms_of_a_folder_do_not_fit_simpler_ones(
    overrides: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    run(tiny({"data.val_windows": 16}), tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    export(trained.model, trained.config, trained.corpus, trained.step, tmp_path / "hf")
    config = RunConfig.from_dict(config_part(tmp_path / "hf")).with_overrides(overrides)
    plan = plan_run(config, 256)
    with pytest.raises(ConfigError) as error:
        start_from_pretrained(Llama(config.model, plan), plan, config)
    assert said in str(error.value)

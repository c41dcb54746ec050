"""What training scripts do to a model with multipliers: nothing is lost, copied wrongly or computed otherwise."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_models import disturb, foreign, token_ids
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lit_mult.errors import UserError
from lit_mult.hf.folder import hf_name
from lit_mult.inject.groups import build_param_groups, clip_grad_norm_, multipliers_in
from lit_mult.inject.model import add_multipliers, merge_and_unload
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.contracts import OptimizerSettings


def multiplied(family: str = "llama", **changes: Any) -> Any:
    model = add_multipliers(foreign(family, **changes), verbose=False)
    disturb(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(
            found[name], one, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def reference() -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, its gradients and its loss on one batch."""
    model = multiplied()
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    return model, gradients(model), loss.detach()


def test_checkpointing_recomputes_the_same(reference: Any) -> None:
    _, expected, _ = reference
    model = multiplied().train()
    model.gradient_checkpointing_enable()
    model(token_ids(), labels=token_ids()).loss.backward()
    close(gradients(model), expected)


def test_accumulation_adds_up(reference: Any) -> None:
    _, expected, _ = reference
    model = multiplied()
    for row in token_ids():
        (model(row[None], labels=row[None]).loss / 2).backward()
    close(gradients(model), expected)


def test_autocast_multiplies_in_bfloat16_and_keeps_gradients_in_float32(reference: Any) -> None:
    """Against autocast on the merged model, whose weights are W_eff."""
    model, _, _ = reference
    model, ids = copy.deepcopy(model), token_ids()
    model.zero_grad()
    merged = merge_and_unload(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, plain = model(ids).logits, merged(ids).logits
        assert torch.equal(
            model.model.layers[0].self_attn.q_proj(torch.ones(1, 32)),
            torch.ones(1, 32).bfloat16() @ (merged.model.layers[0].self_attn.q_proj.weight.bfloat16().mT),
        )
    assert logits.dtype == plain.dtype
    torch.testing.assert_close(logits, plain, atol=2e-2, rtol=2e-2)
    logits.float().square().mean().backward()
    assert {one.dtype for one in gradients(model).values()} == {torch.float32}


def test_copies_and_pickles_are_whole(reference: Any) -> None:
    model, _, loss = reference
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(token_ids(), labels=token_ids()).loss, loss)
        with torch.no_grad():
            for one in multipliers_in(other):
                one.zero_()
        assert torch.equal(model(token_ids(), labels=token_ids()).loss, loss)


def test_states_go_round(reference: Any, tmp_path: Path) -> None:
    model, _, loss = reference
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_model(model, str(tmp_path / "state.safetensors"))
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp")

    def fresh() -> Any:
        return add_multipliers(foreign("llama", seed=1), verbose=False)

    one, two, three = fresh(), fresh(), fresh()
    one.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    load_model(two, tmp_path / "state.safetensors")
    state = three.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    three.load_state_dict(state)
    for other in (one, two, three):
        assert torch.equal(other(token_ids(), labels=token_ids()).loss, loss)


def test_a_plain_checkpoint_lacks_the_multipliers_alone() -> None:
    model = add_multipliers(foreign("qwen3", seed=1), verbose=False)
    missing, unexpected = model.load_state_dict(foreign("qwen3").state_dict(), strict=False)
    names = {name for name, one in model.named_parameters() if any(one is own for own in multipliers_in(model))}
    assert set(missing) == names
    assert unexpected == []
    assert torch.equal(model(token_ids()).logits, foreign("qwen3")(token_ids()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_compiled_whole(family: str) -> None:
    model, ids = multiplied(family), token_ids()
    logits = model(ids).logits
    logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    found = compiled(ids).logits
    found.square().mean().backward()
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    close(gradients(model), expected, atol=1e-5)


def test_traced_whole_by_dynamo() -> None:
    for family in ("llama", "gpt2"):
        model, ids = multiplied(family), token_ids()
        logits = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, logits, atol=1e-6, rtol=1e-6)


def test_code_that_reads_the_weight_gets_the_effective_matrix(reference: Any) -> None:
    model, _, _ = reference
    module = model.model.layers[0].mlp.down_proj
    x = torch.rand(3, 48)
    torch.testing.assert_close(x @ module.weight.mT, module(x))
    assert module.weight.grad_fn is not None
    assert model.get_parameter("model.layers.0.mlp.down_proj.weight") is module._parameters["weight"]
    # ... and what would replace it is told.
    with pytest.raises(TypeError, match="cannot assign"):
        module.weight = module.weight * 2


def test_lora_on_top_works_until_it_is_merged_by_itself() -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = multiplied(), token_ids()
    logits = model(ids).logits
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert torch.equal(tuned(ids).logits, logits)
    tuned(ids, labels=ids).loss.backward()
    for function in (add_multipliers, merge_and_unload, lambda model: build_param_groups(model, 1e-3)):
        with pytest.raises(UserError, match="is a PEFT adapter"):
            function(tuned)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_our_llama_built_in_and_added_train_alike(optimizer: str, kind: str) -> None:
    """50 steps from the same weights on the same batches: built in, and added to the same weights in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_mult.config import RunConfig
    from lit_mult.hf.export import hf_config
    from lit_mult.nn.merging import merged
    from lit_mult.training.module import make_module

    shape = {"d_model": 32, "head_dim": 16, "n_layers": 2}
    optim = {"lr": 0.01, "vector_lr": 0.005, "weight_decay": 0.3}
    schedule = {"name": "constant", "warmup_fraction": 0.0}
    fields = {"model": shape, "multipliers": kind, "optimizer": optimizer, "optim": optim, "schedule": schedule}
    config = RunConfig.from_dict(fields | {"parametrization": {"rule": "standard"}})
    built_in = make_module(config, vocab_size=64)
    fields = hf_config(config, 64, 0, "float32") | {"pad_token_id": None}  # a padding token would have no gradient
    theirs = LlamaForCausalLM(LlamaConfig(**fields))
    theirs.load_state_dict({hf_name(name): one for name, one in merged(built_in.model).state_dict().items()})
    add_multipliers(theirs, kind, verbose=False)
    groups = build_param_groups(theirs, 0.01, 0.3, optimizer, vector_lr=0.005)
    settings = OptimizerSettings()
    optimizers = [built_in.configure_optimizers()["optimizer"], HybridOptimizer(groups, settings)]
    from lit_mult.optim.clipping import clip_gradients

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        window = torch.randint(64, (4, 17), generator=generator) % torch.randint(2, 64, (1,), generator=generator)
        logits = built_in.model(window[:, :-1])
        ours = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        added = nn.functional.cross_entropy(theirs(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())
        torch.testing.assert_close(added, ours, atol=1e-5, rtol=0)
        for one, loss in zip(optimizers, (ours, added), strict=True):
            one.zero_grad()
            loss.backward()
        clip_gradients(built_in._without_multipliers, 1.0)
        clip_grad_norm_(theirs, 1.0)
        for one in optimizers:
            one.step()


_ALONE = """
import sys
import torch, lit_mult
from torch import nn
model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
lit_mult.add_multipliers(model, roles={"0": "embedding", "1": "q_proj"})
base = nn.Sequential(nn.Embedding(8, 2), nn.Linear(2, 8))
lit_mult.width_rules(model, base, optimizer="muon")
optimizer = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=1e-2, optimizer="muon"))
model(torch.arange(8)).square().sum().backward()
lit_mult.clip_grad_norm_(model, 1.0)
optimizer.step()
lit_mult.merge_and_unload(model)
print(*sys.modules)
"""


def test_torch_alone_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {
        "lightning",
        "pydantic",
        "optuna",
        "pandas",
        "scipy",
        "matplotlib",
        "transformers",
        "jsonargparse",
    }
    assert "q_proj" in done.stdout

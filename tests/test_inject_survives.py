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


def saved_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, but for parameters."""
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_nothing_more_is_kept_for_the_backward_pass(family: str) -> None:
    plain = saved_bytes(foreign(family))
    for kind in ("vector", "scalar"):
        few = saved_bytes(add_multipliers(foreign(family), kind, verbose=False)) - plain
        assert few < 0.03 * plain  # vectors, of scalars and of parts


def test_inputs_without_a_batch_and_without_a_device() -> None:
    module, ids = multiplied().model.layers[0].mlp.down_proj, torch.tensor(3)
    x = torch.rand(48, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0))
    embedding = multiplied().model.embed_tokens
    assert torch.equal(embedding(ids), embedding.weight[3])
    embedding(ids).sum().backward()
    assert torch.equal(embedding.row.grad.nonzero().flatten(), torch.tensor([3]))
    assert module(torch.rand(0, 48)).shape == (0, 32)
    assert multiplied().to("meta")(token_ids().to("meta")).logits.shape == (2, 12, 64)


def test_gradients_of_each_sample_by_vmap() -> None:
    model = nn.Sequential(nn.Embedding(11, 8, padding_idx=2), nn.Linear(8, 5))
    add_multipliers(model, roles={"0": "embedding", "1": "o_proj"}, verbose=False)
    disturb(model)
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    ids = torch.tensor([[0, 2, 7], [7, 7, 1]])

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (ids,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for index, sample in enumerate(ids):
        model.zero_grad()
        model(sample).square().sum().backward()
        for name, one in model.named_parameters():
            torch.testing.assert_close(found[name][index], one.grad, msg=name)


def test_multipliers_in_bfloat16_compute_and_have_gradients() -> None:
    """As under FSDP2 with `param_dtype`, which casts all parameters for the forward pass."""
    model = multiplied()
    cast = {name: one.detach().bfloat16().requires_grad_() for name, one in model.named_parameters()}
    torch.func.functional_call(model, cast, (token_ids(),)).logits.float().square().mean().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in cast.values())


def test_replicas_of_data_parallel_compute_the_same(reference: Any) -> None:
    model, _, _ = reference
    module = copy.deepcopy(model.model.layers[0].mlp.down_proj)
    replica = module._replicate_for_data_parallel()
    for name, one in module._parameters.items():
        setattr(replica, name, None if one is None else one.detach().clone())
    x = torch.rand(3, 48)
    assert torch.equal(replica(x), module(x))
    fused = multiplied("gpt2").transformer.h[0].attn.c_attn
    with torch.no_grad():
        fused.bias.fill_(2.0)
    replica = fused._replicate_for_data_parallel()
    for name, one in fused._parameters.items():
        setattr(replica, name, one.detach().clone())
    assert torch.equal(replica(x[:, :32]), fused(x[:, :32]))


def test_what_would_write_to_the_effective_matrix_is_refused() -> None:
    model = multiplied()
    with pytest.raises(UserError, match="num_embeddings = 72: a matrix with multipliers keeps its size"):
        model.resize_token_embeddings(72)
    with pytest.raises(UserError, match="cannot be initialized again; do so before add_multipliers"):
        model.lm_head.reset_parameters() or model.model.layers[0].mlp.up_proj.reset_parameters()


def test_an_optimizer_can_be_copied() -> None:
    for name in ("muon", "hyperball", "muown"):
        model = multiplied()
        optimizer = HybridOptimizer(build_param_groups(model, 1e-2, optimizer=name))
        pair = copy.deepcopy((model, optimizer))
        for one, own in ((model, optimizer), pair):
            for _ in range(2):
                one(token_ids(), labels=token_ids()).loss.backward()
                own.step()
        for one, other in zip(model.parameters(), pair[0].parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_weight_that_another_module_reads_stays_w_when_the_model_is_merged() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.q_proj = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.out = self.embed_tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.q_proj(self.embed_tokens(ids)) @ self.out.mT

    model = add_multipliers(Tied(), roles={"q_proj": "q_proj"}, verbose=False)
    disturb(model)
    logits = model(torch.arange(5))
    torch.testing.assert_close(merge_and_unload(model)(torch.arange(5)), logits)

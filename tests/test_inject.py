"""Multipliers on models that were not built here: identity, gradients, merging, roles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import FAMILIES, disturb, foreign, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_mult.inject.functions import embedding, linear
from lit_mult.inject.groups import build_param_groups, clip_grad_norm_, multipliers_in
from lit_mult.inject.layers import MatrixSpec, multipliers_of, specs_of
from lit_mult.inject.model import add_multipliers, merge_and_unload, remove_multipliers
from lit_mult.inject.table import parameters
from lit_mult.registry.contracts import Axis, RowParts
from lit_mult.registry.roles import Role


def specs(model: nn.Module) -> dict[str, MatrixSpec]:
    return {
        name if parameter == "weight" else f"{name}.{parameter}": spec
        for name, module in model.named_modules()
        for parameter, spec in specs_of(module).items()
    }


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_starts_as_it_was_and_merges_to_the_same_logits(family: str) -> None:
    model = foreign(family)
    ids = token_ids()
    plain, before = model(ids).logits, {name: one.clone() for name, one in model.state_dict().items()}
    for kind, table in (("vector", "full"), ("vector", "minimal"), ("scalar", "full")):
        ours = add_multipliers(copy.deepcopy(model), kind, table, verbose=False)
        assert torch.equal(ours(ids).logits, plain), (kind, table)  # multipliers of 1 change no bit
        state = ours.state_dict()
        assert state.keys() >= before.keys()
        assert all(torch.equal(state[name], one) for name, one in before.items())
        assert {name.rpartition(".")[2].rpartition("_")[2] for name in state.keys() - before.keys()} <= set(Axis)
        disturb(ours)
        changed = ours(ids).logits
        assert not torch.allclose(changed, plain, atol=1e-3)
        merged = merge_and_unload(ours)
        assert torch.allclose(merged(ids).logits, changed, atol=2e-6)
        assert merged.state_dict().keys() >= before.keys() - {"lm_head.weight"}
        assert {type(one) for one in merged.modules()} == {type(one) for one in model.modules()}
        assert not list(multipliers_in(merged))
        assert not specs(merged)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon_h1", "qwen3_moe"])
def test_gradients_are_equation_4_in_float64(family: str) -> None:
    """G comes from the merged model, whose weights are W_eff; eq. 4 gives the rest."""
    ours = add_multipliers(foreign(family).double(), verbose=False)
    ours.set_experts_implementation("eager")  # torch has no grouped products of float64
    disturb(ours)
    ids = token_ids()
    merged = merge_and_unload(copy.deepcopy(ours))
    for model in (ours, merged):
        model(ids, labels=ids).loss.backward()
    checked = 0
    for (name, module), plain in zip(ours.named_modules(), merged.modules(), strict=True):
        for parameter, spec in specs_of(module).items():
            weight, G = module._parameters[parameter], plain._parameters[parameter].grad
            if name in ("lm_head", "transformer.wte") and family == "gpt2":
                continue  # tied: its weight has the gradients of both
            own = multipliers_of(module, parameter)
            if not own or not (spec.parts is None or len(set(spec.axes)) == 1):
                continue
            flip = (lambda x: x.mT) if spec.transposed else (lambda x: x)
            W, G = flip(weight.detach()), flip(G)
            r = own[Axis.ROW].detach()[..., :, None]
            c = own[Axis.COLUMN].detach()[..., None, :] if Axis.COLUMN in own else torch.ones_like(W)
            torch.testing.assert_close(flip(weight.grad), r * c * G, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(own[Axis.ROW].grad, (W * c * G).sum(-1), atol=1e-12, rtol=1e-9)
            if Axis.COLUMN in own:
                torch.testing.assert_close(own[Axis.COLUMN].grad, (W * r * G).sum(-2), atol=1e-12, rtol=1e-9)
            checked += 1
    assert checked >= 8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([2, 7]))
def test_layers_have_the_gradients_of_autograd_on_the_product(
    seed: int, row: bool, column: bool, bias: bool, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, W, b, r, c = draw(2, 3, 4), draw(5, 4), draw(5), draw(5), draw(4)
    given_b, given_r, given_c = b if bias else None, r if row else None, c if column else None
    matrix = W * (r[:, None] if row else 1) * (c if column else 1)
    upstream = draw(2, 3, 5).detach()
    inputs = [one for one, used in ((x, True), (W, True), (b, bias), (r, row), (c, column)) if used]
    expected = torch.autograd.grad(nn.functional.linear(x, matrix, given_b), inputs, upstream, retain_graph=True)
    found = torch.autograd.grad(linear(x, W, given_b, given_r, given_c), inputs, upstream)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)

    ids = torch.randint(5, (tokens,), generator=generator)  # fewer and more than the vocabulary's
    padding = 3 if bias else None
    inputs = [one for one, used in ((W, True), (r, row), (c, column)) if used]
    upstream = draw(tokens, 4).detach()
    expected = torch.autograd.grad(nn.functional.embedding(ids, matrix, padding), inputs, upstream)
    found = torch.autograd.grad(embedding(ids, W, given_r, given_c, padding), inputs, upstream)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_second_derivatives_exist() -> None:
    x, W, r = (torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (5, 4), (5,)))
    assert torch.autograd.gradgradcheck(lambda x, W, r: linear(x, W, None, r, None), (x, W, r))


def test_parts_of_fused_matrices_get_their_own_multipliers() -> None:
    """Minimal has rows on the query and the gate alone; a kind of scalars has one a part."""
    minimal = specs(add_multipliers(foreign("gpt_neox"), table="minimal", verbose=False))
    qkv = minimal["gpt_neox.layers.0.attention.query_key_value"]
    assert qkv.parts == RowParts(4, (8, 8, 8))
    assert [sorted(axes) for axes in qkv.axes] == [["row"], [], []]

    model = add_multipliers(foreign("gpt_neox"), table="minimal", verbose=False)
    module = model.get_submodule("gpt_neox.layers.0.attention.query_key_value")
    assert module.row.shape == (32,)
    with torch.no_grad():
        module.row.copy_(torch.arange(1.0, 33))
    factors = (module.weight / module._parameters["weight"])[:, 0]
    by_head = factors.view(4, 3, 8)
    torch.testing.assert_close(by_head[:, 0].flatten(), torch.arange(1.0, 33))
    assert torch.equal(by_head[:, 1:], torch.ones(4, 2, 8))

    model = add_multipliers(foreign("phi3"), kind="scalar", verbose=False)
    module = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    assert module.scalar.shape == (3,)
    with torch.no_grad():
        module.scalar.copy_(torch.tensor([2.0, 3.0, 5.0]))
    factors = (module.weight / module._parameters["weight"]).mean(1)
    torch.testing.assert_close(factors, torch.tensor([2.0] * 32 + [3.0] * 16 + [5.0] * 16))


def test_a_mamba_block_has_the_papers_placement() -> None:
    """arXiv:2601.04890 app. C: rows on Z and dt, none on X, B and C; W_out row, and column without an inner norm."""
    found = specs(add_multipliers(foreign("falcon_h1"), verbose=False))
    block = found["model.layers.1.mamba.in_proj"]
    assert block.roles == (Role.SSM_GATE, Role.SSM_INPUT, Role.SSM_STEP)
    assert block.parts == RowParts(1, (32, 32 + 2 * 8, 4))
    assert [sorted(axes) for axes in block.axes] == [["row"], [], ["row"]]
    assert found["model.layers.1.mamba.out_proj"].axes == (frozenset({Axis.ROW, Axis.COLUMN}),)
    normed = specs(add_multipliers(foreign("falcon_h1", mamba_rms_norm=True), verbose=False))
    assert normed["model.layers.1.mamba.out_proj"].axes == (frozenset({Axis.ROW}),)


def test_a_merged_model_is_read_with_nothing_of_ours(tmp_path: Path) -> None:
    ids = token_ids()
    for family in ("llama", "gpt2", "qwen3_moe"):
        ours = add_multipliers(foreign(family), verbose=False)
        disturb(ours)
        logits = ours(ids).logits
        merge_and_unload(ours).save_pretrained(tmp_path / family)
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        assert torch.allclose(read(ids).logits, logits, atol=2e-6), family


def test_bfloat16_weights_are_rounded_once_and_multipliers_stay_float32() -> None:
    ours = add_multipliers(foreign("llama").bfloat16(), verbose=False)
    disturb(ours)
    assert {one.dtype for one in multipliers_in(ours)} == {torch.float32}
    module = ours.model.layers[0].self_attn.o_proj
    stored = module._parameters["weight"]
    exact = stored.double() * module.row.double()[:, None] * module.column.double()
    assert stored.dtype == module.weight.dtype == torch.bfloat16
    merged = merge_and_unload(copy.deepcopy(ours)).model.layers[0].self_attn.o_proj.weight
    assert torch.equal(merged, exact.bfloat16())
    assert (module.weight != merged).float().mean() < 0.01  # the float32 product is rounded to another neighbour rarely
    ids = token_ids()
    ours(ids, labels=ids).loss.backward()
    assert module.row.grad.dtype == torch.float32

    cast = add_multipliers(foreign("llama"), verbose=False)
    disturb(cast)
    cast.bfloat16()
    assert {one.dtype for one in multipliers_in(cast)} == {torch.float32}
    cast(ids, labels=ids).loss.backward()
    cast.half()
    assert {one.grad.dtype for one in multipliers_in(cast) if one.grad is not None} == {torch.float32}
    assert cast.lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize("split", ["rms", "rms_power_of_two"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_a_trained_model_can_be_split_into_scale_and_matrix(family: str, split: Any) -> None:
    model, ids = foreign(family), token_ids()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.7)
    logits = model(ids).logits
    for kind in ("vector", "scalar"):
        ours = add_multipliers(copy.deepcopy(model), kind, split=split, verbose=False)
        found = ours(ids).logits
        assert torch.equal(found, logits) if split == "rms_power_of_two" else torch.allclose(found, logits, atol=1e-3)
        for name, spec in specs(ours).items():
            assert spec.is_split == (bool(spec.all_axes) and name != "transformer.wte")
        name = {"phi3": "model.layers.0.self_attn.qkv_proj", "gpt2": "transformer.h.0.attn.c_attn"}.get(
            family, "model.layers.0.self_attn.q_proj"
        )
        module = ours.get_submodule(name)
        rms = float(module._parameters["weight"].detach().square().mean().sqrt()) * 32**0.5
        assert rms == pytest.approx(1, rel=1e-5) if split == "rms" else 2**-0.51 < rms < 2**0.51
        with pytest.raises(Exception, match="use merge_and_unload"):
            remove_multipliers(ours)


def test_adding_is_idempotent_and_can_be_undone() -> None:
    model, ids = foreign("qwen3"), token_ids()
    state = {name: id(one) for name, one in model.named_parameters()}
    add_multipliers(model, verbose=False)
    assert add_multipliers(model, verbose=False) is model
    assert {name: id(one) for name, one in model.named_parameters() if name in state} == state
    remove_multipliers(model)
    assert {name: id(one) for name, one in model.named_parameters()} == state
    assert torch.equal(model(ids).logits, foreign("qwen3")(ids).logits)


def test_selection_follows_peft_and_torchao() -> None:
    def placed(**choice: Any) -> set[str]:
        found = specs(add_multipliers(foreign("llama"), verbose=False, **choice))
        return {name.removeprefix("model.layers.") for name, spec in found.items() if spec.all_axes}

    assert placed(target_modules=["q_proj"]) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert placed(target_modules=["model.layers.1.*_proj"], exclude_modules=["mlp.*"]) == {
        f"1.self_attn.{name}_proj" for name in "qkvo"
    }
    assert placed(target_modules=r".*\.0\..*(gate|up)_proj") == {"0.mlp.gate_proj", "0.mlp.up_proj"}
    assert placed(filter_fn=lambda module, name: "layers.1" in name and module.in_features == 48) == {"1.mlp.down_proj"}
    assert "lm_head" in placed(placement={"lm_head": "row+column"})
    assert placed(placement={"*.layers.*": "none"}) == {"model.embed_tokens"}


def test_an_unknown_family_needs_a_mapping_and_no_more() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Wqkv, self.out, self.up, self.down = (
                nn.Linear(8, 24),
                nn.Linear(8, 8),
                nn.Linear(8, 16),
                nn.Linear(16, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.Wqkv(x).chunk(3, -1)
            return x + self.out(q * k + v) + self.down(self.up(x).relu())

    model = nn.Sequential(nn.Embedding(11, 8), Block(), nn.Linear(8, 11, bias=False))
    ids = torch.arange(5)
    plain = model(ids)
    roles: Any = {
        "0": "embedding",
        "Wqkv": ["q_proj", "k_proj", "v_proj"],
        "out": "o_proj",
        "up": "gate_proj",
        "down": "down_proj",
        "2": "lm_head",
    }
    add_multipliers(model, roles=roles, verbose=False)
    assert torch.equal(model(ids), plain)
    assert specs(model)["1.Wqkv"].parts == RowParts(1, (8, 8, 8))
    groups = build_param_groups(model, 1e-2, optimizer="muon")
    assert sum(one.numel() for group in groups for one in group["params"]) == sum(
        one.numel() for one in model.parameters()
    )


def test_every_parameter_is_in_one_group_and_multipliers_are_not_clipped() -> None:
    for family in ("llama", "gpt2", "falcon_h1", "qwen3_moe"):
        model = add_multipliers(foreign(family), verbose=False)
        groups = build_param_groups(model, 1e-3, 0.1, "muon", vector_lr=2e-3, multiplier_lr=3e-3)
        grouped = [id(one) for group in groups for one in group["params"]]
        assert sorted(grouped) == sorted(id(one) for one in model.parameters())
        own = {id(one) for one in multipliers_in(model)}
        for group in groups:
            ids = {id(one) for one in group["params"]}
            if ids & own:
                assert ids <= own
                assert (group["name"], group["optimizer"]) == ("multiplier", "adamw")
                assert (group["lr"], group["weight_decay"]) == (3e-3, 2e-3)
            elif group["name"] == "vector":
                assert (group["lr"], group["weight_decay"]) == (2e-3, 0.0)
            else:
                assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
                hidden = not {"embedding", "lm_head", "router", "position"} & set(group["name"].split("+"))
                assert (group["optimizer"] == "muon") == hidden, group["name"]
        ids = token_ids()
        (100 * model(ids, labels=ids).loss).backward()
        rest = [one for one in model.parameters() if id(one) not in own and one.grad is not None]
        before = torch.stack([one.grad.norm() for one in rest]).norm()
        kept = [one.grad.clone() for one in multipliers_in(model)]
        assert clip_grad_norm_(model, 1.0) == pytest.approx(float(before))
        assert torch.stack([one.grad.norm() for one in rest]).norm() == pytest.approx(1.0, rel=1e-4)
        assert all(torch.equal(one.grad, was) for one, was in zip(multipliers_in(model), kept, strict=True))


def test_the_table_names_every_matrix_and_says_what_is_tied(capsys: pytest.CaptureFixture[str]) -> None:
    model = add_multipliers(foreign("gpt2"))
    shown = capsys.readouterr().out.splitlines()
    assert shown == parameters(model).splitlines()
    assert shown[0].split() == ["matrix", "role", "shape", "multipliers"]
    rows = {line.split("  ")[0].strip(): line for line in shown}
    assert "q_proj+k_proj+v_proj  96x32" in rows["transformer.h.*.attn.c_attn (2)"]
    assert "none (weight of transformer.wte, which is tied; multipliers are not)" in rows["lm_head"]
    assert shown[-1] == f"{sum(one.numel() for one in multipliers_in(model))} learnable multipliers"
    groups = build_param_groups(model, 1e-3, 0.1, "muon", vector_lr=2e-3)
    rows = {line.split()[0]: line.split() for line in parameters(model, groups).splitlines()}
    assert rows["transformer.h.*.mlp.c_fc"][-3:] == ["muon", "0.001", "0.1"]
    assert rows["transformer.h.*.mlp.c_fc.row"][-4:] == ["-", "adamw", "0.002", "0.002"]
    assert rows["transformer.ln_f.bias"][1:] == ["vector", "32", "-", "adamw", "0.002", "0"]


def test_a_tied_head_is_untied_by_merging_and_says_so_in_the_config() -> None:
    model = add_multipliers(foreign("gpt2"), verbose=False)
    disturb(model)
    merged = merge_and_unload(model)
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is False
    kept = merge_and_unload(add_multipliers(foreign("gpt2"), exclude_modules=["wte"], verbose=False))
    assert kept.lm_head.weight is kept.transformer.wte.weight
    assert kept.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["pythia-14m", "Qwen3-0.6B", "Llama-3.2-1B"])
def test_litgpts_models_start_as_they_were_and_merge_to_the_same_logits(name: str) -> None:
    from litgpt import GPT, Config

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_head": 4, "n_query_groups": 2, "head_size": 8, "intermediate_size": 48}
    config = Config.from_name(name, n_layer=2, block_size=16, padded_vocab_size=64, **shape)
    model = GPT(config).eval()
    ids = token_ids()
    plain = model(ids)
    found = specs(add_multipliers(copy.deepcopy(model), table="minimal", verbose=False))
    qkv = found["transformer.h.0.attn.qkv"]
    assert qkv.parts == RowParts(1, (32, 16, 16))
    assert [sorted(axes) for axes in qkv.axes] == [["row"], [], []]
    for kind in ("vector", "scalar"):
        ours = add_multipliers(copy.deepcopy(model), kind, verbose=False)
        assert torch.equal(ours(ids), plain)
        disturb(ours)
        changed = ours(ids)
        assert not torch.allclose(changed, plain, atol=1e-3)
        assert torch.allclose(merge_and_unload(ours)(ids), changed, atol=2e-6)

"""Models and arguments that multipliers cannot be added to: one line that says what to do, and the model untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_models import foreign
from torch import nn
from torch.nn.utils import parametrizations

from lit_mult.errors import UserError
from lit_mult.inject.groups import build_param_groups
from lit_mult.inject.model import add_multipliers, merge_and_unload, remove_multipliers


def with_module(name: str, change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = foreign("llama")
        model.set_submodule(name, change(model.get_submodule(name)))
        return model

    return make


def meta() -> nn.Module:
    return foreign("llama").to("meta")


def used_twice() -> nn.Module:
    model = foreign("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


def quantized(module: nn.Module) -> nn.Module:
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    return module


def unknown() -> nn.Module:
    model = foreign("llama")
    model.model.layers[0].mlp.extra = nn.Linear(32, 32)
    return model


def with_padding(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0
    return model


llama = lambda: foreign("llama")  # noqa: E731

REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (llama, {"kind": "vectors"}, "kind = 'vectors': must be one of none, fixed, scalar, vector, weight_norm"),
    (llama, {"table": "all"}, "table = 'all': must be one of minimal, full"),
    (llama, {"split": "max"}, "split = 'max': must be None, rms or rms_power_of_two"),
    (llama, {"kind": "weight_norm", "split": "rms"}, "split = 'rms': needs learnable multipliers of a plain product"),
    (
        llama,
        {"target_modules": ["q_porj"]},
        "target_modules = 'q_porj': matches no matrix; names are model.embed_tokens, ",
    ),
    (llama, {"target_modules": "q_proj"}, "target_modules = 'q_proj': matches no matrix"),
    (llama, {"target_modules": "*q"}, "target_modules = '*q': is no regular expression"),
    (llama, {"exclude_modules": ["lm_haed"]}, "exclude_modules = 'lm_haed': matches no matrix"),
    (llama, {"placement": {"q_porj": "row"}}, "placement.q_porj = 'row': matches no matrix"),
    (llama, {"placement": {"q_proj": "rows"}}, "placement.q_proj = 'rows': must be none, or scalar, row, column"),
    (llama, {"roles": {"q_porj": "q_proj"}}, "roles.q_porj = 'q_proj': matches no matrix"),
    (llama, {"roles": {"q_proj": "query"}}, "roles.q_proj = 'query': must be one of embedding, q_proj, "),
    (llama, {"roles": {"q_proj": [("q_proj", 5), ("k_proj", 4)]}}, "does not divide 32 rows; give (role, rows)"),
    (llama, {"filter_fn": lambda module, name: False}, "no matrix would get multipliers of kind vector; matrices are"),
    (llama, {"target_modules": ["lm_head"]}, "no matrix would get multipliers of kind vector"),
    (unknown, {}, "no role is known for model.layers.*.mlp.extra; pass roles={'mlp.extra': 'q_proj'}"),
    (
        lambda: nn.ModuleDict({"emb": nn.Embedding(8, 4), "out": nn.Linear(4, 8)}),
        {},
        "no role is known for emb, out; pass roles={'emb': 'embedding'} (or another role)",
    ),
    (meta, {}, "model.embed_tokens: is on the meta device; materialize the model first"),
    (used_twice, {}, "model.layers.1.mlp.up_proj: is the module model.layers.0.mlp.up_proj itself, used twice"),
    (with_module("lm_head", quantized), {}, "lm_head: is quantized or has no weight (Linear)"),
    (with_module("lm_head", lambda _: nn.LazyLinear(64)), {}, "lm_head: has no shape yet; run the model once"),
    (with_module("lm_head", parametrizations.weight_norm), {}, "lm_head: has a parametrization of torch.nn.utils"),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16), {}, "no role is known for linear1, linear2; pass roles="),
    (
        with_module("model.embed_tokens", lambda old: nn.Embedding(64, 32, sparse=True)),
        {},
        "model.embed_tokens: has sparse gradients or a max_norm",
    ),
    (lambda: torch.compile(foreign("llama")), {}, "model is compiled (OptimizedModule); add multipliers before that"),
    (
        lambda: foreign("falcon_h1"),
        {"kind": "weight_norm"},
        "mamba.in_proj: is fused or a stack of experts, which kind",
    ),
    (lambda: with_padding(foreign("llama")), {"kind": "weight_norm"}, "model.embed_tokens: has a row of zeros"),
    (
        lambda: nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})}),
        {},
        "attn.qkv: is fused of q_proj, k_proj, v_proj, of unknown numbers of rows; pass roles={'attn.qkv': [('q_proj',",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED, ids=[one[2][:40] for one in REFUSED])
def test_refused_in_one_line_with_the_model_untouched(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    before = [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]
    with pytest.raises(UserError) as error:
        add_multipliers(model, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()] == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [quantized, lambda _: nn.LazyLinear(64), parametrizations.weight_norm])
def test_what_is_excluded_may_be_anything(change: Callable[[nn.Module], nn.Module]) -> None:
    model = with_module("lm_head", change)()
    add_multipliers(model, exclude_modules=["lm_head"], verbose=False)
    twice = used_twice()
    add_multipliers(twice, target_modules=["q_proj"], verbose=False)
    for one in (model, twice):
        grouped = [id(p) for group in build_param_groups(one, 1e-3) for p in group["params"]]
        assert len(grouped) == len(set(grouped))


def test_an_attention_of_torch_has_its_parts() -> None:
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(8, 2)})
    x = torch.rand(3, 2, 8)
    before = model["self_attn"](x, x, x)[0]
    add_multipliers(model, verbose=False)
    assert model["self_attn"].in_proj_weight_row.shape == (24,)
    assert torch.equal(model["self_attn"](x, x, x)[0], before)


def test_a_model_has_one_set_of_multipliers() -> None:
    model = foreign("llama")
    for function in (merge_and_unload, remove_multipliers, lambda model: build_param_groups(model, 1e-3)):
        with pytest.raises(UserError, match="no multipliers; call add_multipliers first"):
            function(model)
    add_multipliers(model, verbose=False)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="multipliers of another call; remove_multipliers or merge_and_unload"):
        add_multipliers(model, kind="scalar", verbose=False)
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    with pytest.raises(UserError, match="optimizer = 'muno': must be one of adamw, muon, hyperball, muon-hyperball"):
        build_param_groups(model, 1e-3, optimizer="muno")


def test_our_own_model_has_its_multipliers_built_in() -> None:
    from lit_mult.config import RunConfig
    from lit_mult.training.module import make_module

    ours = make_module(RunConfig.from_dict({"model": {"d_model": 8, "head_dim": 8}}), vocab_size=16)
    with pytest.raises(UserError, match=r"embed_tokens: has multipliers built in; set them in the model's config"):
        add_multipliers(ours.model)

"""muP on models that were not built here: factors, initial weights and the tied head against our plan and by hand."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from foreign_models import VOCAB, foreign, token_ids
from torch import nn

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.hf.folder import hf_name
from lit_mult.inject.groups import build_param_groups
from lit_mult.inject.layers import MatrixSpec, specs_of
from lit_mult.inject.model import add_multipliers, merge_and_unload, remove_multipliers
from lit_mult.inject.widths import width_rules
from lit_mult.method.plan import plan_run


def wide(family: str, times: int = 2, **changes: Any) -> Any:
    """A model `times` as wide as `foreign`'s, by more heads of the same size."""
    if family == "gpt2":
        return foreign(family, n_embd=32 * times, n_head=4 * times, **changes)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    if family not in ("gpt_neox",):
        sizes["num_key_value_heads"] = 2
    return foreign(family, **{name: size * times for name, size in sizes.items()} | changes)


def meta(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return foreign(family, **changes)


def specs(model: nn.Module) -> dict[str, MatrixSpec]:
    return {
        name if parameter == "weight" else f"{name}.{parameter}": spec
        for name, module in model.named_modules()
        for parameter, spec in specs_of(module).items()
    }


@pytest.mark.parametrize("rule", ["lr", "lr_wd", "lr_sqrt_wd"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_llama_trains_as_our_plan_says(width: int, optimizer: str, rule: str) -> None:
    """Rates, decays and initial scales relative to those at base width are the plan's."""
    config = RunConfig.from_dict(
        {
            "optimizer": optimizer,
            "model": {"d_model": width, "n_layers": 2, "head_dim": 8, "num_key_value_groups": 2, "mlp_ratio": 1.5},
            "parametrization": {"base_d_model": 32, "rule": "mup", "width_rule": rule},
            "optim": {"lr": 0.01, "weight_decay": 0.1},
        }
    )
    plan = plan_run(config, VOCAB).matrices
    model = add_multipliers(wide("llama", width // 32), "vector", verbose=False)
    before = copy.deepcopy(model.state_dict())
    width_rules(model, meta("llama"), optimizer, rule, verbose=False)
    groups = build_param_groups(model, 0.01, 0.1, optimizer)
    group_of = {id(one): group for group in groups for one in group["params"]}
    for name, ours in plan.items():
        weight = model.get_submodule(hf_name(f"{name}.")[:-1])._parameters["weight"]
        group = group_of[id(weight)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((ours.lr, ours.weight_decay), rel=1e-12)
        std = 1.0 if name == "embed_tokens" else ours.shape[1] ** -0.5  # of a model with the standard init
        scale = float(weight.detach().norm() / before[f"{hf_name(name + '.')}weight"].norm())
        assert scale == pytest.approx(ours.init_std / std, rel=1e-5)
    alone = [group for group in groups if group["name"] in ("vector", "multiplier")]
    assert [(group["lr"], group["weight_decay"]) for group in alone] == [(0.01, 2e-3), (0.01, 0.0)]


def test_fused_matrices_and_conv1d_by_hand() -> None:
    """Twice as wide: Adam 1 / 2 for d_in; Muon sqrt(d_out / d_in / max) = sqrt(32 / 64) for each part."""
    for family, name in (("gpt2", "transformer.h.0.attn.c_attn"), ("phi3", "model.layers.0.self_attn.qkv_proj")):
        for optimizer, factor in (("adamw", 0.5), ("muon", math.sqrt(0.5))):
            model = add_multipliers(wide(family), verbose=False)
            width_rules(model, meta(family), optimizer, verbose=False)
            assert specs(model)[name].lr == pytest.approx(factor, rel=1e-12)


def test_parts_of_unequal_factors_are_refused_and_nothing_is_changed() -> None:
    """Key and value of constant 16 rows: Muon sqrt(16 / 64 / 64) over sqrt(16 / 32 / 32), 0.5; the query 0.7071."""
    model = add_multipliers(wide("phi3", num_key_value_heads=2), verbose=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"qkv_proj: its parts need different factors .*muon \(0.7071 and 0.5\)"):
        width_rules(model, meta("phi3"), "muon")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert {spec.width for spec in specs(model).values()} == {None}
    width_rules(model, meta("phi3"), "adamw", verbose=False)


def test_experts_and_their_router_by_hand() -> None:
    """Twice the width with 24 channels an expert: d_in of the first 2 x, of the second 1 x; a router is a head."""
    model = add_multipliers(wide("qwen3_moe"), verbose=False)
    router = model.model.layers[0].mlp.gate.weight.detach().clone()
    width_rules(model, meta("qwen3_moe"), "adamw", "lr_wd", verbose=False)
    found = specs(model)
    experts = "model.layers.0.mlp.experts"
    assert (found[f"{experts}.gate_up_proj"].lr, found[f"{experts}.gate_up_proj"].weight_decay) == (0.5, 2.0)
    assert (found[f"{experts}.down_proj"].lr, found[f"{experts}.down_proj"].weight_decay) == (1.0, 1.0)
    gate = found["model.layers.0.mlp.gate"]
    assert (gate.lr, gate.weight_decay, gate.rescaled) == (0.5, 2.0, pytest.approx(0.5**0.5))
    torch.testing.assert_close(model.model.layers[0].mlp.gate.weight, router * 0.5**0.5)


def test_a_tied_head_has_a_constant_that_survives_merging() -> None:
    """At twice the width logits are halved, and the shared weight trains with the embedding's rate."""
    for kind in ("none", "vector"):
        plain, ids = wide("gpt2"), token_ids()
        model = width_rules(add_multipliers(copy.deepcopy(plain), kind, verbose=False), meta("gpt2"), verbose=False)
        half = plain(ids).logits / 2
        torch.testing.assert_close(model(ids).logits, half)
        assert model.lm_head._parameters["weight"] is model.transformer.wte._parameters["weight"]
        assert (specs(model)["lm_head"].lr, specs(model)["lm_head"].constant) == (1.0, 0.5)

        model(ids, labels=ids).loss.backward()  # the gradient of the shared weight is that of halved logits
        logits = plain(ids).logits / 2
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.testing.assert_close(model.transformer.wte._parameters["weight"].grad, plain.transformer.wte.weight.grad)

        with pytest.raises(UserError, match=r"a tied head has a factor .*; use merge_and_unload"):
            remove_multipliers(model)
        merged = merge_and_unload(copy.deepcopy(model))
        torch.testing.assert_close(merged(ids).logits, half)
        assert merged.config.tie_word_embeddings is False


def test_initial_weights_are_scaled_as_asked_and_once() -> None:
    """At four times the width: all by 1 / 2, head by 1 / 4; or the head alone by 1 / 2; or none."""
    for rescale, hidden, head in (("all", 0.5, 0.25), ("outputs", 1.0, 0.5), (None, 1.0, 1.0)):
        model = add_multipliers(wide("llama", 4), verbose=False)
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            width_rules(model, meta("llama"), rescale=rescale, verbose=False)
            assert add_multipliers(model, verbose=False) is model
        for name, one in model.state_dict().items():
            factor = head if name == "lm_head.weight" else hidden if name.endswith("proj.weight") else 1.0
            assert torch.equal(one, before[name] * factor), name

    model = add_multipliers(wide("llama", 4), "weight_norm", verbose=False)
    before = model.model.layers[0].mlp.gate_proj.weight.detach()
    width_rules(model, meta("llama"), rescale="all", verbose=False)
    torch.testing.assert_close(model.model.layers[0].mlp.gate_proj.weight, before / 2)  # its row norms start from W


def test_a_warning_says_when_weights_do_not_start_as_assumed() -> None:
    """transformers' start at initializer_range, those of `nn.Linear` at 1 / sqrt(3 d_in)."""

    def linear(width: int) -> nn.Module:
        model = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "head": nn.Linear(width, 99)})
        return add_multipliers(model, roles={"up": "up_proj", "head": "lm_head"}, verbose=False)

    for base in (meta("llama"), foreign("llama")):
        with pytest.warns(UserWarning, match="the same std at both widths; pass rescale='all'"):
            width_rules(ours(), base, verbose=False)
    with pytest.warns(UserWarning, match="already; pass rescale='outputs'"):
        width_rules(linear(64), linear(16), rescale="all", verbose=False)
    with warnings.catch_warnings(action="error"):
        width_rules(ours(), meta("llama"), rescale="all", verbose=False)
        width_rules(ours(), foreign("llama"), rescale="all", verbose=False)
        width_rules(ours(), foreign("llama"), rescale=None, verbose=False)
        width_rules(linear(64), linear(16), verbose=False)


def test_at_base_width_nothing_changes_and_narrower_models_get_larger_rates() -> None:
    model = add_multipliers(foreign("llama"), verbose=False)
    before = copy.deepcopy(model.state_dict())
    width_rules(model, meta("llama"), verbose=False)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert {(spec.lr, spec.weight_decay) for spec in specs(model).values()} == {(1.0, 1.0)}
    width_rules(model, wide("llama"), verbose=False)
    assert specs(model)["lm_head"].lr == 2.0


def test_parts_that_were_given_divide_at_base_width_as_in_the_model_or_as_the_base_says() -> None:
    def make(width: int) -> nn.Module:
        return nn.ModuleDict({"attn": nn.ModuleDict({"Wqkv": nn.Linear(width, 2 * width)})})

    roles: Any = {"Wqkv": [("q_proj", 64), ("k_proj", 32), ("v_proj", 32)]}
    model = add_multipliers(make(64), roles=roles, verbose=False)
    width_rules(model, make(32), "muon", verbose=False)
    assert specs(model)["attn.Wqkv"].lr == pytest.approx(math.sqrt(0.5))
    side_by_side: Any = {"Wqkv": [("gate_proj", 1), ("up_proj", 1)]}  # 64 times at width 64, 32 times at base width
    model = add_multipliers(make(64), roles=side_by_side, verbose=False)
    width_rules(model, make(32), "muon", verbose=False)
    assert specs(model)["attn.Wqkv"].lr == pytest.approx(math.sqrt(0.5))
    model = add_multipliers(make(64), roles=roles, verbose=False)
    uneven = add_multipliers(make(32), roles={"Wqkv": [("q_proj", 32), ("k_proj", 24), ("v_proj", 8)]}, verbose=False)
    with pytest.raises(UserError, match="its parts need different factors"):
        width_rules(model, uneven, "muon")
    with pytest.raises(UserError, match="Wqkv: its parts in base_model are unknown; add_multipliers to it, too"):
        width_rules(model, make(15), "muon")


def test_the_table_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    width_rules(add_multipliers(wide("llama"), verbose=False), meta("llama"), rule="lr_wd")
    shown = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split("  ") for line in shown}
    assert [cell.strip() for cell in rows["lm_head"] if cell][1:] == [
        *("lm_head", "64x64", "64x32", "x 0.5", "x 2", "W x 0.7071")
    ]
    assert rows["model.layers.*.mlp.down_proj"][-1].strip() == "as it was"
    width_rules(add_multipliers(wide("gpt2"), verbose=False), meta("gpt2"))
    assert "W_eff x 0.5: weight of transformer.wte, which is tied" in capsys.readouterr().out


def unknown() -> nn.Module:
    model = wide("llama")
    model.model.layers[0].mlp.extra = nn.Linear(64, 64)
    return add_multipliers(model, exclude_modules=["extra"], verbose=False)


def bare() -> nn.Module:
    model = wide("llama")
    model.model.layers[0].mlp.table = nn.Parameter(torch.ones(64, 64))
    return add_multipliers(model, verbose=False)


def with_extra() -> nn.Module:
    base = foreign("llama")
    base.model.layers[0].mlp.extra = nn.Linear(32, 32)
    return base


def with_table() -> nn.Module:
    base = foreign("llama")
    base.model.layers[0].mlp.table = nn.Parameter(torch.ones(32, 32))
    return base


def ours() -> nn.Module:
    return add_multipliers(wide("llama"), verbose=False)


@pytest.mark.parametrize(
    ("make", "base", "choice", "message"),
    [
        (lambda: wide("llama"), lambda: meta("llama"), {}, "model has no roles; call add_multipliers first"),
        (ours, lambda: meta("gpt2"), {}, "lm_head.weight|no such parameter; give the same architecture"),
        (ours, lambda: meta("llama", num_hidden_layers=1), {}, "base_model has no such parameter"),
        (ours, lambda: meta("llama", num_hidden_layers=3), {}, "layers.2.*: model has no such parameter"),
        (unknown, with_extra, {}, "mlp.extra: is a matrix that widens, of no role; pass roles="),
        (bare, with_table, {}, "mlp.table: is a matrix that widens, of no role; pass roles="),
        (ours, lambda: meta("llama"), {"rule": "multiplier"}, "lr_sqrt_wd; lr_wd trains as multiplier does"),
        (ours, lambda: meta("llama"), {"rule": "wd"}, "rule = 'wd': must be lr, lr_wd or lr_sqrt_wd$"),
        (ours, lambda: meta("llama"), {"optimizer": "muno"}, "optimizer = 'muno': must be one of adamw"),
        (ours, lambda: meta("llama"), {"rescale": True}, "rescale = True: must be outputs, all or None"),
        (
            ours,
            lambda: meta("llama"),
            {"optimizer": "hyperball", "rule": "lr_wd"},
            "hyperball.*: has no such width rule",
        ),
        (
            lambda: add_multipliers(wide("llama"), split="rms", verbose=False),
            lambda: meta("llama"),
            {"rescale": "all"},
            "q_proj: multipliers took over its scale",
        ),
    ],
)
def test_refused_in_one_line(make: Any, base: Any, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        width_rules(make(), base(), **choice)
    assert "\n" not in str(error.value)


def test_groups_for_another_optimizer_are_refused() -> None:
    model = width_rules(ours(), meta("llama"), "muon", verbose=False)
    with pytest.raises(UserError, match=r"factors by width are for muon; call width_rules\(optimizer='adamw'\) first"):
        build_param_groups(model, 1e-3)

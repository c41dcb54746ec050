"""Merged models are the trained ones without their multipliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import VOCAB, build

from lit_mult.nn.merging import merged
from lit_mult.nn.multipliers import MultipliedMatrix


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["none", "fixed", "scalar", "vector"]),
    table=st.sampled_from(["full", "minimal"]),
    tied=st.booleans(),
    groups=st.sampled_from([1, 2]),
    width_rule=st.sampled_from(["lr", "multiplier"]),
    scale=st.sampled_from(["1/sqrt(head_dim)", "1/head_dim"]),
    preset=st.sampled_from(["neutral", "falcon-h1-0.5b"]),
    qk_norm=st.booleans(),
)
def test_merging_changes_logits_by_rounding_alone(
    kind: str, table: str, tied: bool, groups: int, width_rule: str, scale: str, preset: str, qk_norm: bool
) -> None:
    model, _ = build(
        {
            "multipliers": kind,
            "placement.table": table,
            "model.tie_embeddings": tied,
            "model.num_key_value_groups": groups,
            "model.qk_norm": qk_norm,
            "parametrization.width_rule": width_rule,
            "parametrization.attention_scale": scale,
            "parametrization.preset": preset,
        }
    )
    plain = merged(model)
    with torch.no_grad():
        expected, got = model(ids()), plain(ids())
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    matrices = [module for module in plain.modules() if isinstance(module, MultipliedMatrix)]
    assert all(m.constant == 1 and m.scalar is None and m.row is None and m.column is None for m in matrices)


def test_the_trained_model_is_left_as_it_is() -> None:
    model, _ = build({"multipliers": "vector", "model.tie_embeddings": True})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.embed_tokens.weight is model.lm_head.weight


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_powers_of_two_merge_without_any_difference(kind: str) -> None:
    model, _ = build(
        {"multipliers": kind, "placement.overrides": {"*": "row+column" if kind == "vector" else "scalar"}}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".row", ".column", ".scalar")):
                powers = torch.randint(-3, 4, parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(2.0**powers)
        assert torch.equal(model(ids()), merged(model)(ids()))

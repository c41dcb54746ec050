"""Redundant multipliers of models of other libraries: every direction leaves the logits, and ours are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign_models import VOCAB, foreign, token_ids

import lit_mult
from lit_mult.checks import lint_placement
from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.method.redundancy import Kind, redundancies


@pytest.mark.parametrize(("family", "table"), [("llama", "full"), ("llama", "minimal"), ("mistral", "full")])
def test_moving_along_a_redundancy_leaves_the_logits(family: str, table: str) -> None:
    model = foreign(family, rms_norm_eps=1e-30, initializer_range=0.2).double()
    lit_mult.add_multipliers(model, table=table, verbose=False)
    parameters, generator = dict(model.named_parameters()), np.random.default_rng(0)
    before = model(token_ids()).logits
    found = lint_placement(model, verbose=False)
    assert {one.kind for one in found} >= {Kind.FACTOR, Kind.NORMALIZATION}
    for redundancy in found:
        shape = tuple(redundancy.sizes[factor] for factor in redundancy.channels)
        logs = redundancy.direction(0.3 * generator.standard_normal(shape))
        state = {name: parameters[name].detach().clone() for name in logs}
        with torch.no_grad():
            for name, log in logs.items():
                parameters[name].mul_(torch.from_numpy(np.array(log)).exp())
            assert not all(torch.equal(parameters[name], was) for name, was in state.items())
            change = (model(token_ids()).logits - before).abs().max()
            assert change < 1e-5 * before.abs().max(), redundancy.powers  # norms of transformers are in float32
            for name, was in state.items():
                parameters[name].copy_(was)


def test_a_llama_has_those_of_our_run() -> None:
    config = RunConfig.from_dict(
        {
            "multipliers": "vector",
            "model": {"d_model": 32, "n_layers": 2, "head_dim": 8, "num_key_value_groups": 2, "mlp_ratio": 1.5},
            "placement": {"overrides": {"*.q_proj": "row+column"}},
        }
    )
    model = lit_mult.add_multipliers(foreign("llama"), placement={"q_proj": "row+column"}, verbose=False)

    def seen(found: list[object]) -> list[tuple[object, ...]]:
        return [
            (
                one.kind,
                {name.removeprefix("model."): power for name, power in one.powers.items()},
                one.freedom,
                one.held,
            )
            for one in found
        ]

    assert seen(lint_placement(model, verbose=False)) == seen(redundancies(config, VOCAB))


def test_the_table_gives_advice(capsys: pytest.CaptureFixture[str]) -> None:
    model = lit_mult.add_multipliers(foreign("llama"), verbose=False)
    lint_placement(model)
    shown = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.row model.layers.*.self_attn.k_proj.row^-1" in shown
    assert "held by multiplier_weight_decay = 0.002; or drop" in shown
    found = lint_placement(model, multiplier_weight_decay=0.0)
    assert "drifts: set multiplier_weight_decay, or drop" in capsys.readouterr().out
    assert not any(one.held for one in found)


def test_other_models_are_refused_in_one_line() -> None:
    for model, said in (
        (
            lit_mult.add_multipliers(foreign("qwen3"), verbose=False),
            "model is a Qwen3ForCausalLM; lint_placement knows",
        ),
        (foreign("llama"), "model has no multipliers; call add_multipliers first"),
        (lit_mult.add_multipliers(foreign("llama", mlp_bias=True), verbose=False), "gate_proj.bias: is a bias"),
    ):
        with pytest.raises(UserError, match=said):
            lint_placement(model)

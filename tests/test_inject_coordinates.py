"""The coordinate check of models that were not built here: verdicts, and the same numbers as of our own Llama."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import VOCAB, foreign, token_ids
from torch import Tensor, nn

import lit_mult
from lit_mult.checks import coord_check
from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows
from lit_mult.data.cache import prepare
from lit_mult.diagnostics.coordinates import measure
from lit_mult.diagnostics.model_coordinates import facts_of, next_token_loss
from lit_mult.errors import UserError
from lit_mult.hf.folder import hf_weights
from lit_mult.nn.merging import merged
from lit_mult.training.module import make_module

SIZES: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": 64, "pad_token_id": None}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(width: int, vocab: int = VOCAB, **changes: Any) -> Any:
    """Heads of size 8; matrices start at 1 / sqrt(d_in), as those of torch do, up to a constant."""
    heads = {"num_attention_heads": width // 8, "num_key_value_heads": width // 8, "head_dim": 8}
    shape = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | heads | shape | changes))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model


def scaled(width: int, optimizer: str = "adamw", rule: str = "lr", kind: str = "vector") -> nn.Module:
    model = lit_mult.add_multipliers(llama(width), kind, verbose=False)
    with torch.device("meta"):
        base = llama(16)
    return lit_mult.width_rules(model, base, optimizer, rule, verbose=False)


def failed(check: Any) -> set[tuple[str, str]]:
    return {(row.kind, row.coordinate) for row in check.exponents.itertuples() if row.verdict == "FAIL"}


@pytest.mark.parametrize(("optimizer", "rule"), [("adamw", "lr"), ("adamw", "lr_sqrt_wd"), ("muon", "lr")])
def test_with_width_rules_it_passes(optimizer: str, rule: str) -> None:
    check = coord_check(
        lambda width: scaled(width, optimizer, rule),
        [64, 128, 256],
        [token_ids(4, 17)],
        lr=0.01,
        optimizer=optimizer,
        steps=2,
        seeds=2,
    )
    assert check.passed, failed(check)
    assert set(check.exponents["kind"]) == {"start", "change", "update", "decay"}
    by_name = check.exponents.set_index(["kind", "coordinate"])["exponent"]
    decay = {("adamw", "lr"): -1.0, ("adamw", "lr_sqrt_wd"): -0.5, ("muon", "lr"): -0.5}[optimizer, rule]
    assert by_name["decay", "model.layers.0.mlp.up_proj"] == pytest.approx(decay, abs=1e-3)
    assert by_name["decay", "model.embed_tokens"] == pytest.approx(0.0, abs=1e-3)


def test_a_tied_head_passes_with_initial_weights_of_the_same_std_at_every_width() -> None:
    """At base width 16 that of GPT-2's matrices is 1 / sqrt(d_in)."""

    def gpt2(width: int) -> Any:
        return foreign("gpt2", n_embd=width, n_head=width // 8, n_layer=1, initializer_range=0.25)

    def make_model(width: int) -> nn.Module:
        model = lit_mult.add_multipliers(gpt2(width), verbose=False)
        return lit_mult.width_rules(model, gpt2(16), rescale="all", verbose=False)

    check = coord_check(make_model, [128, 256, 512], [token_ids(4, 17)], lr=0.01, steps=2, seeds=1)
    assert check.passed, failed(check)
    assert ("decay", "lm_head") in {(row.kind, row.coordinate) for row in check.exponents.itertuples()}


def test_without_width_rules_updates_of_hidden_matrices_grow() -> None:
    check = coord_check(llama, [64, 128, 256], [token_ids(4, 17)], lr=0.01, steps=2, seeds=2)
    assert not check.passed
    hidden = {f"model.layers.0.{name}" for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")}
    assert {("update", name) for name in hidden} <= failed(check)
    assert ("update", "model.embed_tokens") not in failed(check)


def test_it_measures_what_lit_mult_coord_check_does(text_file: Path) -> None:
    """Our Llama's initial weights in Hugging Face's, the same batches, rates and clipping: the same coordinates."""
    config = RunConfig.from_dict(
        {
            "model": {"n_layers": 1, "head_dim": 8, "num_key_value_groups": 1, "mlp_ratio": 2.0},
            "parametrization": {"base_d_model": 8, "width_rule": "lr_wd"},
            "optim": {"lr": 0.01, "vector_lr": 0.02},
            "schedule": {"name": "constant", "warmup_fraction": 0.0},
            "data": {"corpus": str(text_file), "seq_len": 16},
            "train": {"batch_size": 4},
        }
    )
    widths, steps = [16, 32, 64], 2
    ours = {
        (row.size, row.kind, row.coordinate): row.value
        for row in measure(config, "model.d_model", widths, [0], steps, make_module)
    }
    corpus = prepare(config.data)
    windows = TrainWindows(corpus.train, 16, 4, 0)

    def make_model(width: int) -> nn.Module:
        own = make_module(config.with_overrides({"model.d_model": width, "seed": 0}), corpus.vocab_size).model
        fields = {"rms_norm_eps": config.model.norm_eps, "rope_theta": config.model.rope_theta}
        model = llama(width, corpus.vocab_size, **fields)
        model.load_state_dict(hf_weights(merged(own)))
        lit_mult.add_multipliers(model, "none", verbose=False)
        with torch.device("meta"):
            base = llama(8, corpus.vocab_size)
        return lit_mult.width_rules(model, base, rule="lr_wd", rescale=None, verbose=False)  # ours start as muP's do

    def make_optimizer(model: nn.Module) -> Any:
        groups = lit_mult.build_param_groups(model, 0.01, config.optim.weight_decay, vector_lr=0.02)
        return lit_mult.HybridOptimizer(groups, config.optim)

    batches = [torch.from_numpy(windows.batch(step)) for step in range(steps)]
    check = coord_check(
        make_model, widths, batches, make_optimizer=make_optimizer, steps=steps, seeds=1, max_norm=config.optim.clip
    )
    theirs = {
        (row.width, row.kind, row.coordinate.removeprefix("model.").replace("head_input", "norm")): row.value
        for row in check.values.itertuples()
    }
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert theirs[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1", "qwen3_moe"])
def test_other_families_have_coordinates(family: str) -> None:
    def make_model(width: int) -> nn.Module:
        model = lit_mult.add_multipliers(foreign(family), verbose=False)
        return lit_mult.width_rules(model, foreign(family), verbose=False)

    check = coord_check(make_model, [1, 2, 3], [token_ids()], steps=1, seeds=1)
    names = set(check.values["coordinate"])
    block, parts = {
        "gpt2": ("transformer.h.1", {"attn", "mlp"}),
        "falcon_h1": ("model.layers.1", {"self_attn", "mamba", "feed_forward"}),
        "qwen3_moe": ("model.layers.1", {"self_attn", "mlp"}),
    }[family]
    assert {block, "logits", "head_input", "lm_head"} | {f"{block}.{part}" for part in parts} <= names
    updates = set(check.values[check.values["kind"] == "update"]["coordinate"])
    matrices = facts_of(make_model(1)).keys()
    assert matrices - updates == {name for name in matrices if "experts" in name}


def test_what_theory_knows_of_matrices() -> None:
    """A tied head decays with the embedding; experts of constant size have no exponent and are left out."""
    tied = lit_mult.width_rules(
        lit_mult.add_multipliers(foreign("gpt2"), verbose=False), foreign("gpt2"), verbose=False
    )
    assert facts_of(tied)["lm_head"].role == "embedding"

    def make_model(width: int) -> nn.Module:
        sizes = {"hidden_size": width, "num_attention_heads": width // 8, "num_key_value_heads": width // 16}
        model = lit_mult.add_multipliers(foreign("qwen3_moe", **sizes), "none", verbose=False)
        return lit_mult.width_rules(model, foreign("qwen3_moe"), verbose=False)

    check = coord_check(make_model, [16, 32, 64], [token_ids()], steps=1, seeds=1)
    decay = check.exponents[check.exponents["kind"] == "decay"].set_index("coordinate")
    experts = "model.layers.0.mlp.experts"
    assert f"{experts}.down_proj" not in decay.index
    for name in (f"{experts}.gate_up_proj", "model.layers.0.mlp.gate", "lm_head"):
        assert decay.loc[name, "exponent"] == pytest.approx(-1.0, abs=1e-3)
        assert decay.loc[name, "verdict"] == "PASS"


def test_a_loss_of_ones_own_and_bad_input() -> None:
    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch, labels=batch).loss
        return loss

    ids = token_ids(2, 9)
    model = foreign("llama")
    torch.testing.assert_close(loss_of(model, ids), next_token_loss(model, ids))
    check = coord_check(lambda width: foreign("llama"), [1, 2, 3], [ids], loss_of=loss_of, steps=1, seeds=1)
    assert {"logits", "model.layers.1.mlp"} <= set(check.values["coordinate"])

    for arguments, said in (
        (([1, 2], [ids]), "widths = \\[1, 2\\]: must be three or more"),
        (([1, 2, 3], []), "batches = 0: must be at least one"),
    ):
        with pytest.raises(UserError, match=said):
            coord_check(lambda width: foreign("llama"), *arguments)

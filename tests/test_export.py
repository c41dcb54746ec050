"""Exported models: the trained one's logits and tokens under plain transformers, or no folder at all.

Shapes in names: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import initialized
from safetensors.torch import load_file
from tiny_runs import Tiny
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from lit_mult.errors import UserError
from lit_mult.hf import export as export_module
from lit_mult.hf.check import Agreement, agreement
from lit_mult.hf.export import export, write_tokenizer
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.training.folder import RunFolder
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

VOCAB = 256
SHAPE = {
    "model.d_model": 32,
    "model.head_dim": 8,
    "model.n_layers": 2,
    "parametrization.base_d_model": 16,
    "data.seq_len": 16,
}
VECTORS = {"multipliers": "vector", "placement.overrides": {"*": "row+column"}}


@cache
def corpus() -> TokenizedCorpus:
    text = "".join(f"{a} + {b} = {a + b}\n" for a in range(12) for b in range(12))
    tokens = np.frombuffer(text.encode(), np.uint8)
    return TokenizedCorpus(tokens, tokens[:400], VOCAB, "0123456789abcdef", 1.0, ByteTokenizer())


def build(overrides: dict[str, Any]) -> tuple[Llama, RunConfig]:
    """A model with random multipliers and norms, and logits of order 10."""
    config = RunConfig().with_overrides(SHAPE | overrides)
    model = initialized(config, VOCAB).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.copy_(2 ** (0.5 * torch.randn(parameter.shape, generator=generator)))
        ids_BT = torch.arange(64)[None]
        model.norm.weight *= 10 / model(ids_BT).abs().max()
    return model, config


def sample(config: RunConfig) -> torch.Tensor:
    return torch.from_numpy(validation_windows(corpus().val, config.data.seq_len, 16))[:, :-1]


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["none", "fixed", "scalar", "vector"]),
    table=st.sampled_from(["full", "minimal"]),
    everywhere=st.booleans(),
    tied=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    theta=st.sampled_from([1e4, 5e5]),
    width_rule=st.sampled_from(["lr", "multiplier"]),
    scale=st.sampled_from(["1/sqrt(head_dim)", "1/head_dim"]),
    preset=st.sampled_from(["neutral", "falcon-h1-0.5b"]),
    depth_rule=st.sampled_from(["none", "completep"]),
    qk_norm=st.booleans(),
)
def test_an_export_has_the_trained_models_logits(
    kind: str,
    table: str,
    everywhere: bool,
    tied: bool,
    groups: int,
    theta: float,
    width_rule: str,
    scale: str,
    preset: str,
    depth_rule: str,
    qk_norm: bool,
) -> None:
    axes = "scalar" if kind == "scalar" else "row+column"
    model, config = build(
        {
            "multipliers": kind,
            "placement.table": table,
            "placement.overrides": {"*": axes} if everywhere else {},
            "model.tie_embeddings": tied,
            "model.num_key_value_groups": groups,
            "model.rope_theta": theta,
            "model.qk_norm": qk_norm,
            "parametrization.base_d_model": 32,
            "parametrization.width_rule": width_rule,
            "parametrization.attention_scale": scale,
            "parametrization.preset": preset,
            "parametrization.depth_rule": depth_rule,
            "parametrization.base_n_layers": 1,
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "hf"
        said = export(model, config, corpus(), 7, out)
        theirs = AutoModelForCausalLM.from_pretrained(out)
        found = agreement(model, lambda ids_BT: theirs(ids_BT).logits, sample(config))

        card = (out / "README.md").read_text()

    assert f"this is a plain {'Qwen3' if qk_norm else 'Llama'}," in card
    assert ("completep (base depth 1)" in card) == (depth_rule == "completep")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert found == said
    assert 3 < found.largest_logit < 100
    assert found.largest_difference <= 1e-4 * max(1, found.largest_logit / 10)
    assert found.tokens == 16 * 16


def test_powers_of_two_are_folded_without_any_difference(tmp_path: Path) -> None:
    model, config = build(VECTORS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".row", ".column")):
                powers = torch.randint(-3, 4, parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(2.0**powers)

    export(model, config, corpus(), 7, tmp_path / "hf")

    held = load_file(tmp_path / "hf" / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, MultipliedMatrix):
            assert module.row is not None
            assert module.column is not None
            wanted = torch.diag(module.row) @ module.weight @ torch.diag(module.column)
            assert torch.equal(held[name + ".weight" if name == "lm_head" else f"model.{name}.weight"], wanted), name


def drop_a_row(plain: Llama, model: Llama) -> None:
    row = model.layers[1].mlp.up_proj.row
    plain.layers[1].mlp.up_proj.weight = nn.Parameter(plain.layers[1].mlp.up_proj.weight / row[:, None])


def forget_the_scale(plain: Llama, model: Llama) -> None:
    plain.layers[0].self_attn.q_proj.weight.data *= 1.01


def forget_a_norm(plain: Llama, model: Llama) -> None:
    plain.layers[0].input_layernorm.weight.data.fill_(1)


@pytest.mark.parametrize("fault", [drop_a_row, forget_the_scale, forget_a_norm])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_in_one_fold_is_caught_and_leaves_nothing(
    fault: Callable[[Llama, Llama], None], dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = build(VECTORS)

    def faulty(trained: Llama) -> Llama:
        plain = merged(trained)
        with torch.no_grad():
            fault(plain, trained)
        return plain

    monkeypatch.setattr(export_module, "merged", faulty)
    with pytest.raises(UserError, match=r"not exported, its logits differ from the trained model's by \S+ where") as e:
        export(model, config, corpus(), 7, tmp_path / "hf", dtype)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9}}]
)
def test_a_fault_in_the_config_is_caught(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = build(VECTORS)
    right = export_module.hf_config
    monkeypatch.setattr(export_module, "hf_config", lambda *arguments: right(*arguments) | wrong)
    with pytest.raises(UserError, match="not exported, its logits differ"):
        export(model, config, corpus(), 7, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_weights_are_the_rounding_of_the_checked_ones(tmp_path: Path) -> None:
    model, config = build(VECTORS)
    export(model, config, corpus(), 7, tmp_path / "exact")
    said = export(model, config, corpus(), 7, tmp_path / "short", "bfloat16")

    exact = load_file(tmp_path / "exact" / "model.safetensors")
    short = load_file(tmp_path / "short" / "model.safetensors")
    assert exact.keys() == short.keys()
    assert all(torch.equal(short[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").dtype == torch.bfloat16
    # bfloat16 has 8 bits: logits of order 10 move by some hundredths, through two layers.
    assert 1e-3 < said.largest_difference < 1
    assert f"at most {said.largest_difference:.1e}" in (tmp_path / "short" / "README.md").read_text()


def test_the_bound_grows_with_large_logits_only_and_nan_is_never_within_it() -> None:
    fine = Agreement(tokens=1, largest_difference=0.9e-4, largest_logit=1, same_argmax=1)
    assert fine.within_rounding
    assert not dataclasses.replace(fine, largest_difference=1.1e-4).within_rounding
    assert dataclasses.replace(fine, largest_difference=9e-4, largest_logit=100).within_rounding
    nan = agreement(lambda x: torch.full((1, 1, 3), float("nan")), lambda x: torch.ones(1, 1, 3), torch.zeros(1, 1))
    assert not nan.within_rounding
    nan = agreement(lambda x: torch.ones(1, 1, 3), lambda x: torch.full((1, 1, 3), float("nan")), torch.zeros(1, 1))
    assert not nan.within_rounding


def test_plain_transformers_loads_an_export_without_this_package(tmp_path: Path) -> None:
    model, config = build(VECTORS | {"model.num_key_value_groups": 2, "parametrization.base_d_model": 32})
    export(model, config, corpus(), 7, tmp_path / "hf")
    text = "3 + 4 = 7\n"
    code = """
import json, sys
sys.modules["lit_mult"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("hf"), AutoTokenizer.from_pretrained("hf")
asked = tokenizer(sys.argv[1], return_tensors="pt")
made = model.generate(**asked, max_new_tokens=3, do_sample=False)
print(json.dumps([asked["input_ids"].tolist(), model(**asked).logits.tolist(), made.tolist()]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, text], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ids, logits, made = json.loads(done.stdout.splitlines()[-1])
    assert ids == [list(text.encode())]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(torch.tensor(ids)), rtol=0, atol=1e-4)
    assert len(made[0]) <= len(ids[0]) + 3


@cache
def tokenizer_pair(name: str) -> tuple[Tokenizer, Any, Tokenizer]:
    """A tokenizer of ours, its export as transformers loads it, and as we do."""
    texts = ["the cat sat on the mat\n", "the dog sat on the log\n"] * 5
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        match name:
            case "bytes":
                ours: Tokenizer = ByteTokenizer()
            case "bpe":
                ours = HuggingFaceTokenizer.train_bpe(texts, 270)
            case _:
                words = HFTokenizer(models.WordLevel({"<unk>": 0, "cat": 4, "</s>": 7, "<s>": 8}, unk_token="<unk>"))
                words.pre_tokenizer = pre_tokenizers.Whitespace()
                words.add_special_tokens(["<s>", "</s>"])
                words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 8)])
                words.enable_truncation(3)
                words.save(str(folder / "words.json"))
                ours = load_tokenizer(str(folder / "words.json"))
        write_tokenizer(folder, ours, 16)
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
        return ours, AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))


PIECES = st.sampled_from(["the", " cat", "\n", "<|endoftext|>", "</s>", "<s>", "\x00", "Ā", "é"])
TEXTS = st.text() | st.text("the cat\n Ā\x00é,.") | st.lists(PIECES).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["bytes", "bpe", "words"]), TEXTS)
def test_an_exported_tokenizer_gives_the_ids_of_ours(name: str, text: str) -> None:
    ours, theirs, back = tokenizer_pair(name)
    ids = ours.encode(text).tolist()

    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs(text)["input_ids"] == ids  # nothing is put around a text
    assert back.encode(text).tolist() == ids
    assert theirs.decode(ids) == ours.decode(ids)
    if name != "words":  # which knows two words
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", ["bytes", "bpe", "words"])
def test_the_ends_of_an_exported_tokenizer_are_our_separator(name: str) -> None:
    ours, theirs, back = tokenizer_pair(name)

    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id} == {ours.separator_id}
    assert theirs.model_max_length == 16
    assert (back.separator_id, back.vocab_size) == (ours.separator_id, ours.vocab_size)
    if name != "words":  # whose template is left out
        assert back.identity == ours.identity


def test_the_command_exports_a_run_with_its_card(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decay = {"optim.weight_decay_mode": "timescale", "optim.weight_decay": 3.0}
    config = tiny({"multipliers": "vector", "data.tokenizer": "bpe:270", **decay})
    record = run(config, tmp_path / "run")
    out = tmp_path / "new" / "hf"

    assert main(["export", str(tmp_path / "run"), str(out)]) == 0

    shown = capsys.readouterr().out
    assert "differ from the trained model's by at most" in shown
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer_config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    card = (out / "README.md").read_text()
    for said in (
        "# Llama of 1 layer, width ",
        "| size | 1 layer of width ",
        "learnable row + column multipliers (placement full)",
        "arXiv:2601.04890",
        "eq. 2 and 3",
        "| steps | 12 of 12 |",
        "lr 0.015625, weight decay 3 (timescale) |",
        "| tokens | 768, in windows of 16 |",
        f"| corpus | sums.txt (hash {record.corpus_hash}), tokenizer bpe:270 |",
        f"| validation loss | {record.final_loss:.4f} nats per token |",
        f"| config hash | {config.hash} |",
        f"| git commit | {record.git_commit} |",
    ):
        assert said in card
    assert "icense" not in card  # the weights are the user's
    assert str(tmp_path) not in card
    trained = load_trained(tmp_path / "run")
    ids = AutoTokenizer.from_pretrained(out)("1 + 2 = 3\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        torch.testing.assert_close(theirs, trained.model(ids), rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_said_in_one_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    folder, out = tmp_path / "run", tmp_path / "hf"
    run(tiny(), folder)
    said = partial(refused, "export", str(folder), str(out))

    assert "float16" in said("--dtype", "float16")
    assert "no checkpoint of step 5 was kept; kept on the way: none" in said("--checkpoint", "5")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty; name a new folder" in said()
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert "transformers: pip install 'lit-mult[export]'" in said()
    held = torch.load(RunFolder(folder).final_checkpoint, weights_only=True)
    held["state_dict"]["model.norm.weight"][0] = float("nan")
    torch.save(held, RunFolder(folder).final_checkpoint)
    assert "model.norm.weight holds values that are not finite; has the run diverged?" in said()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

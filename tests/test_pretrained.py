"""Runs that start from a Hugging Face Llama: its logits at step 0, pinned content, and one line for what does not fit.

Shapes in names: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import refusal
from tiny_runs import Tiny
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, Interrupted, UserError
from lit_mult.hf.export import export
from lit_mult.hf.folder import content_hash, hf_name
from lit_mult.hf.pretrained import config_part, pinned, start_from_pretrained
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

VOCAB = 256


def save(folder: Path, shard: str = "1GB", qwen3: bool = False, **changes: Any) -> PreTrainedModel:
    """A random model of transformers, with norms that are not 1, saved in a folder."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "initializer_range": 0.2,
    }
    kinds: Any = (Qwen3ForCausalLM, Qwen3Config) if qwen3 else (LlamaForCausalLM, LlamaConfig)
    model: PreTrainedModel = kinds[0](kinds[1](**({"head_dim": 8} | shape | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def configure(folder: Path, **overrides: Any) -> RunConfig:
    return RunConfig.from_dict(config_part(folder)).with_overrides(overrides)


def started(config: RunConfig, vocab_size: int = VOCAB) -> Llama:
    plan = plan_run(config, vocab_size)
    model = Llama(config.model, plan)
    initialize(model, plan, seed=0)
    start_from_pretrained(model, plan, config)
    return model.eval()


def assert_same_logits(ours: Llama, theirs: PreTrainedModel) -> None:
    ids_BT = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted_BTV = theirs(ids_BT).logits
        assert wanted_BTV.abs().max() > 1
        torch.testing.assert_close(ours(ids_BT), wanted_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"multipliers": "none"},
        {"multipliers": "vector"},
        {"multipliers": "scalar", "placement.table": "minimal"},
        {"multipliers": "fixed", "parametrization.preset": "falcon-h1-0.5b"},
        {"multipliers": "vector", "parametrization.preset": "falcon-h1-0.5b", "placement.init": "preset"},
        {"multipliers": "softplus", "parametrization.preset": "falcon-h1-0.5b", "placement.init": "preset"},
        {"parametrization.rule": "mup", "parametrization.width_rule": "multiplier", "parametrization.base_d_model": 16},
    ],
)
def test_a_run_starts_at_the_folders_logits(overrides: dict[str, Any], tmp_path: Path) -> None:
    theirs = save(tmp_path / "hf")
    config = configure(tmp_path / "hf", **overrides)
    ours = started(config)

    assert_same_logits(ours, theirs)
    plan = plan_run(config, VOCAB)
    for name, module in ours.named_modules():
        if isinstance(module, MultipliedMatrix):
            for axis, value in plan.matrices[name].start.items():
                assert (getattr(module, axis.value) == value).all()
            scale = plan.matrices[name].constant * plan.matrices[name].start_factor
            if scale == 1:  # without rounding
                assert torch.equal(module.weight, theirs.state_dict()[hf_name(f"{name}.weight")])


@pytest.mark.parametrize("kind", ["none", "vector"])
def test_a_run_starts_at_the_logits_of_a_qwen3(kind: str, tmp_path: Path) -> None:
    theirs = save(tmp_path / "hf", qwen3=True)
    rules = {"parametrization.depth_rule": "completep", "parametrization.base_n_layers": 1}
    config = configure(tmp_path / "hf", multipliers=kind, **rules)

    assert config.model.qk_norm
    assert_same_logits(started(config), theirs)
    with refusal("model.qk_norm = False: must be True, as in", kind=ConfigError):
        started(configure(tmp_path / "hf", **{"model.qk_norm": False}))
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    save(tmp_path / "sliding", qwen3=True, **sliding)
    with refusal("has sliding_window = 8; only None can be represented", kind=ConfigError):
        configure(tmp_path / "sliding")


@pytest.mark.parametrize("kind", ["none", "vector"])
def test_a_tied_folder_starts_a_tied_run(kind: str, tmp_path: Path) -> None:
    theirs = save(tmp_path / "hf", tie_word_embeddings=True)
    config = configure(tmp_path / "hf", multipliers=kind)
    ours = started(config)

    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert_same_logits(ours, theirs)
    # Another start of the embedding would give the head another scale than the embedding, which share a matrix.
    with pytest.raises(ConfigError, match=r"parametrization\.embedding_std = 1\.0: must be 0\.1767766\d+ for a head"):
        started(config.with_overrides({"parametrization.embedding_std": 1.0}))


def test_shards_and_other_types_are_read(tmp_path: Path) -> None:
    theirs = save(tmp_path / "hf", shard="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_same_logits(started(configure(tmp_path / "hf")), theirs)

    theirs.bfloat16().save_pretrained(tmp_path / "short")
    rounded = LlamaForCausalLM.from_pretrained(tmp_path / "short", dtype=torch.float32)
    assert_same_logits(started(configure(tmp_path / "short")), rounded)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_what_is_exported_can_be_imported_and_trained_on(tokenizer: str, tiny: Tiny, tmp_path: Path) -> None:
    trained = {"multipliers": "vector", "optimizer": "muon", "parametrization.attention_scale": "1/head_dim"}
    trained["data.tokenizer"] = tokenizer
    record = run(tiny(trained | {"train.steps": 40}), tmp_path / "first")
    first, hf = load_trained(tmp_path / "first"), tmp_path / "hf"
    export(first.model, first.config, first.corpus, first.step, hf)
    part = config_part(hf)
    assert part["data"] == {"seq_len": 16, "tokenizer": "bytes" if tokenizer == "bytes" else str(hf)}
    wide = {f"{section}.{name}": value for section, fields in part.items() for name, value in fields.items()}
    config = tiny({"multipliers": "vector"} | wide)

    ids_BT = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            started(config, first.corpus.vocab_size)(ids_BT), first.model(ids_BT), rtol=0, atol=1e-5
        )
    second = run(config, tmp_path / "second")

    assert second.corpus_hash == record.corpus_hash  # the tokenizer came back as it was
    assert second.initial_loss == pytest.approx(record.final_loss, abs=1e-5)
    assert second.status == "completed"
    assert second.final_loss < record.initial_loss
    # Evaluation needs the weights no more, nor the folder unless the tokenizer lies there.
    shutil.rmtree(hf) if tokenizer == "bytes" else (hf / "model.safetensors").unlink()
    assert load_trained(tmp_path / "second").step == 12


def test_a_stopped_run_resumes_to_the_very_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    save(tmp_path / "hf")
    part = {f"model.{name}": value for name, value in config_part(tmp_path / "hf")["model"].items()}
    config = tiny(
        part
        | {
            "multipliers": "vector",
            "parametrization.rule": "standard",
            "data.seq_len": 16,
            "parametrization.base_d_model": 32,
            "train.eval_every": 6,
        }
    )
    undisturbed = run(config, tmp_path / "a")
    asked = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        run(config, tmp_path / "b", should_stop=lambda: next(asked))
    resumed = run(config, tmp_path / "b")

    assert (resumed.initial_loss, resumed.val_curve) == (undisturbed.initial_loss, undisturbed.val_curve)
    # Evaluation needs the folder no more; a run does.
    shutil.rmtree(tmp_path / "hf")
    one, other = (load_trained(tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match=r"model\.pretrained = .*hf'"):
        run(config, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_content_is_pinned_and_the_place_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save(folder)
    config = configure(folder)
    pin = content_hash(folder)
    assert config.model.pretrained == f"{folder}@{pin}"
    bare = config.with_overrides({"model.pretrained": str(folder)})
    assert pinned(bare) == config
    assert pinned(config) is config
    with pytest.raises(ConfigError, match=rf"needs its hash: .*hf@{pin}$"):
        started(bare)

    shutil.copytree(folder, tmp_path / "copy")
    elsewhere = config.with_overrides({"model.pretrained": f"{tmp_path / 'copy'}@{pin}"})
    assert elsewhere.hash == config.hash
    started(elsewhere)

    weights = folder / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(ConfigError, match=rf"its content has changed, and is now .*hf@{content_hash(folder)}$"):
        started(config)
    assert pinned(bare).hash != config.hash


def test_runs_that_start_at_random_keep_the_hash_they_had() -> None:
    assert RunConfig().hash == "47ff211b683b0226"
    assert "pretrained" not in RunConfig().hashed_fields()["model"]
    assert pinned(RunConfig()) == RunConfig()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "has attention_bias = True; only False can be represented"),
        ({"mlp_bias": True}, "has mlp_bias = True"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu'; only 'silu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scales its rotary embedding"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales its rotary embedding"),
        ({"model_type": "mistral"}, "holds a LlamaForCausalLM; only a LlamaForCausalLM or Qwen3ForCausalLM can"),
        ({"model_type": "qwen3"}, "holds a LlamaForCausalLM; only a LlamaForCausalLM or Qwen3ForCausalLM can"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "holds a LlamaForSequenceClassification"),
        ({"head_dim": 16}, "has 4 heads of size 16, which are not its hidden_size = 32"),
        ({"num_key_value_heads": 3}, "has num_key_value_heads = 3, which does not divide its 4 heads"),
        ({"hidden_size": 36, "head_dim": 9}, "config.json is not usable"),
        ({"rms_norm_eps": 0.0}, "cannot be represented: model.norm_eps = 0.0: input should be greater than 0"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"hidden_size": "wide"}, "config.json is not usable"),
        ({"num_hidden_layers": 3}, "lacks the weight model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has a weight that ours has not, model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 80}, "gate_proj.weight is torch.float32 of shape (72, 32), not floats (80, 32)"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    with refusal(said, kind=ConfigError) as caught:
        started(configure(tmp_path))

    assert str(caught.value).startswith(f"model.pretrained = '{tmp_path}'")


def test_folders_without_usable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    def said() -> str:
        with refusal(kind=ConfigError) as caught:
            started(configure(tmp_path))
        return str(caught.value)

    assert "has no config.json" in said()
    save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "its model.safetensors cannot be read" in said()
    weights.rename(tmp_path / "pytorch_model.bin")
    assert "no model.safetensors; pickled ones are refused" in said()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "names '../elsewhere.safetensors', which is not there" in said()
    index.write_text("{}")
    assert "index.json is damaged" in said()
    for content in ("{", "[]", "{}", "[1]"):
        config.write_text(content)
        assert "its config.json is damaged" in said()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.n_layers": 4}, "model.n_layers = 4: must be 2, as in"),
        ({"model.d_model": 64, "model.n_layers": 4}, "model.d_model = 64: must be 32, as in"),
        ({"model.rope_theta": 1e4}, "model.rope_theta = 10000.0: must be 50000.0"),
        ({"model.norm_eps": 1e-5}, "model.norm_eps = 1e-05: must be 1e-06"),
        ({"model.num_key_value_groups": 1}, "model.num_key_value_groups = 1: must be 2"),
        ({"model.tie_embeddings": True}, "model.tie_embeddings = True: must be False"),
        ({"parametrization.attention_scale": "1/head_dim"}, "attention_scale = '1/head_dim': must be 1/sqrt(head_dim)"),
    ],
)
def test_a_config_that_does_not_fit_is_told_the_value(overrides: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(tmp_path)
    with refusal(said, "lit-mult import writes a config that fits", kind=ConfigError):
        started(configure(tmp_path, **overrides))


def test_another_number_of_ids_is_refused(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=300)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'bytes': has 256 ids and must have 300, as in"):
        started(configure(tmp_path))


def test_the_commands_pin_the_folder_and_write_a_config_that_fits(
    tiny_dict: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    save(tmp_path / "hf")
    start, rest, bad = tmp_path / "start.yaml", tmp_path / "rest.yaml", tmp_path / "bad.yaml"
    given = tiny_dict({"multipliers": "vector"})
    del given["model"], given["parametrization"]
    rest.write_text(yaml.safe_dump(given))

    assert main(["import", str(tmp_path / "hf"), str(start)]) == 0
    configs = ["--config", str(start), "--config", str(rest)]
    assert main(["fit", *configs, "--out", str(tmp_path / "run")]) == 0
    held = json.loads((tmp_path / "run" / "record.json").read_text())["config"]
    assert held["model"]["pretrained"] == f"{tmp_path / 'hf'}@{content_hash(tmp_path / 'hf')}"
    # The pin is added where it is left out: the same run, which has finished.
    assert main(["fit", *configs, "--model.pretrained", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == 0
    assert "finished earlier" in capsys.readouterr().out

    assert f"lit-mult import: {start}: File exists" in refused("import", str(tmp_path / "hf"), str(start))
    assert "has no config.json" in refused("import", str(tmp_path), str(bad))
    assert not bad.exists()
    assert "must be 32, as in" in refused("fit", "--model.pretrained", str(tmp_path / "hf"), "--out", str(bad))
    assert "nowhere" in refused("fit", "--model.pretrained", str(tmp_path / "nowhere"), "--out", str(bad))
    assert not bad.exists()

"""Runs that start from a Hugging Face Llama or Qwen3 instead of a random initialization."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_mult import atomic
from lit_mult.config import RunConfig, split_pin
from lit_mult.data.tokenizers import ByteTokenizer, load_tokenizer
from lit_mult.errors import ConfigError
from lit_mult.hf.folder import content_hash, hf_name, read_architecture, read_weights, unusable
from lit_mult.method.plan import MatrixPlan, RunPlan
from lit_mult.nn.llama import Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix

_PLAIN_SCALE = "1/sqrt(head_dim)"


def pinned(config: RunConfig) -> RunConfig:
    """The config with the hash of its pretrained folder added, if it has such a folder and no hash.

    Raises:
        ConfigError: the folder holds no model.
    """
    folder, pin = (None, None) if config.model.pretrained is None else split_pin(config.model.pretrained)
    if folder is None or pin is not None:
        return config
    return config.with_overrides({"model.pretrained": f"{folder}@{content_hash(Path(folder).expanduser())}"})


def config_part(folder: Path) -> dict[str, Any]:
    """The part of a run config that makes a run start from a folder: nested plain values.

    There is one width, so the rule is standard, and `base_d_model` only has to be a valid width. The tokenizer is the
    folder's, if it has one.

    Raises:
        ConfigError: the folder holds no model that ours can represent, or a tokenizer without a separator.
    """
    architecture = read_architecture(folder)
    d_model = architecture.fields["d_model"]
    parametrization = {"rule": "standard", "base_d_model": d_model, "attention_scale": _PLAIN_SCALE}
    if architecture.fields["tie_embeddings"]:
        parametrization["embedding_std"] = 1 / math.sqrt(d_model)  # gives a tied head the embedding's scale
    data: dict[str, Any] = {"seq_len": min(RunConfig().data.seq_len, architecture.max_length)}
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(folder))
        data["tokenizer"] = tokenizer.identity if isinstance(tokenizer, ByteTokenizer) else str(folder)
    model = {"pretrained": f"{folder}@{content_hash(folder)}", **architecture.fields}
    return {"model": model, "parametrization": parametrization, "data": data}


def write_config_part(folder: Path, out: Path) -> None:
    """Write `config_part` as a YAML file for `lit-mult fit --config`.

    Raises:
        ConfigError: as `config_part`.
        FileExistsError: the file exists.
    """
    atomic.write_text(out, yaml.safe_dump(config_part(folder), sort_keys=False), overwrite=False)


@torch.no_grad()
def start_from_pretrained(model: Llama, plan: RunPlan, config: RunConfig) -> None:
    """Load the effective matrices and the norms of `model.pretrained` into an initialized model.

    Multipliers and constants keep their values: W = W_theirs / (constant * start of the multipliers).

    Raises:
        ConfigError: the folder does not match the config's hash or architecture, or cannot be read.
        UserError: the export extra is not installed.
    """
    assert config.model.pretrained is not None
    name, pin = split_pin(config.model.pretrained)
    folder = Path(name).expanduser()
    if (held := content_hash(folder)) != pin:
        fault = f"its content has changed, and is now {name}@{held}" if pin else f"needs its hash: {name}@{held}"
        raise ConfigError("model.pretrained", config.model.pretrained, fault)
    _check(folder, plan, config)
    weights = read_weights(folder)
    for module_name, module in model.named_modules():
        if module_name == "lm_head" and config.model.tie_embeddings:
            weights.pop("lm_head.weight", None)  # a file may repeat the tied weight
        elif isinstance(module, MultipliedMatrix):
            theirs = _take(weights, f"{module_name}.weight", module.weight, folder)
            matrix = plan.matrices[module_name]
            module.weight.copy_(theirs.double() / _scale(matrix))
            module.start_multipliers(matrix)
        elif isinstance(module, RMSNorm):
            theirs = _take(weights, f"{module_name}.weight", module.weight_vector(), folder)
            _check_norm(module_name, module, theirs, folder)
            module.weight.copy_(theirs if module.weight.ndim else theirs[0])
    # Old versions of transformers saved this buffer.
    left = sorted(name for name in weights if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise ConfigError("model.pretrained", str(folder), f"has a weight that ours has not, {left[0]}")


def _check(folder: Path, plan: RunPlan, config: RunConfig) -> None:
    """Raises: ConfigError when a run of the config cannot start with the folder's logits."""
    architecture = read_architecture(folder)
    remedy = f"in {folder} (lit-mult import writes a config that fits)"
    for name, needed in architecture.fields.items():
        if (value := getattr(config.model, name)) != needed:
            raise ConfigError(f"model.{name}", value, f"must be {needed!r}, as {remedy}")
    vocab_size = plan.matrices["embed_tokens"].shape[0]
    if vocab_size != architecture.vocab_size:
        allowed = f"has {vocab_size} ids and must have {architecture.vocab_size}, as {remedy}"
        raise ConfigError("data.tokenizer", config.data.tokenizer, allowed)
    if config.parametrization.attention_scale != _PLAIN_SCALE:
        scale = config.parametrization.attention_scale
        raise ConfigError("parametrization.attention_scale", scale, f"must be {_PLAIN_SCALE}, as {remedy}")
    # A tied head and the embedding share W: both effective matrices are the folder's only at the same scale.
    embedding, head = _scale(plan.matrices["embed_tokens"]), _scale(plan.matrices["lm_head"])
    if config.model.tie_embeddings and not math.isclose(embedding, head, rel_tol=1e-9):
        std = config.parametrization.embedding_std
        allowed = f"must be {std * head / embedding!r} for a head that is tied as {remedy}"
        raise ConfigError("parametrization.embedding_std", std, allowed)


def _check_norm(name: str, norm: RMSNorm, theirs: Tensor, folder: Path) -> None:
    """Raises: ConfigError when the folder's norm weight (D,) does not match the config's kind of this norm."""
    field, usual = ("final_norm", "vector") if name == "norm" else ("block_norms", "learned")
    if not norm.weight.requires_grad and not (theirs == 1).all():
        raise ConfigError(f"model.{field}", "frozen", f"must be {usual}: {name} of {folder} is not 1 everywhere")
    if norm.weight.ndim == 0 and not (theirs == theirs[0]).all():
        raise ConfigError(f"model.{field}", "scalar", f"must be {usual}: {name} of {folder} differs between channels")


def _scale(matrix: MatrixPlan) -> float:
    """W_eff / W at the start."""
    return matrix.constant * matrix.start_factor


def _take(weights: dict[str, Tensor], name: str, ours: Tensor, folder: Path) -> Tensor:
    theirs = weights.pop(hf_name(name), None)
    if theirs is None:
        raise unusable(folder, f"lacks the weight {hf_name(name)}")
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        held = f"{theirs.dtype} of shape {tuple(theirs.shape)}"
        raise unusable(folder, f"its {hf_name(name)} is {held}, not floats {tuple(ours.shape)}")
    return theirs

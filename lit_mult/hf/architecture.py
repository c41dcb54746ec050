"""The shape of a Llama in Hugging Face's terms and in ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_mult.config import ModelConfig, RunConfig
from lit_mult.errors import ConfigError, one_line
from lit_mult.hf.extra import require_export_extra

CONFIG_NAME = "config.json"
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_ROPE_FIELDS = {"rope_type", "type", "rope_theta"}


def hf_config(config: RunConfig, vocab_size: int, separator_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of the run's model once its multipliers are merged."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,  # where readers older than transformers 5 look for it
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": False,  # merging takes a tied head apart
        "attention_dropout": 0.0,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": separator_id,
        "use_cache": True,
    } | _FIXED


@dataclass(frozen=True)
class Architecture:
    """What a config.json says, in our terms."""

    fields: dict[str, Any]
    """Fields of `ModelConfig` by name; those that concern training alone are not among them."""
    vocab_size: int
    max_length: int
    """Tokens of the longest text that the model was made for."""


def read_architecture(folder: Path) -> Architecture:
    """The shape of the model in a Hugging Face folder.

    Raises:
        ConfigError: there is no model, or one that our Llama cannot be.
        UserError: the export extra is not installed.
    """
    require_export_extra()
    from transformers import LlamaConfig

    try:
        data = json.loads((folder / CONFIG_NAME).read_text())
        kind, made_for = data["model_type"], data.get("architectures")
    except OSError:
        raise ConfigError("model.pretrained", str(folder), f"no Hugging Face folder, it has no {CONFIG_NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        allowed = f"its {CONFIG_NAME} is damaged, not the config of a model ({one_line(error)})"
        raise ConfigError("model.pretrained", str(folder), allowed) from None
    if kind != "llama" or made_for not in (None, ["LlamaForCausalLM"]):
        allowed = f"holds a {' '.join(made_for or [kind])}; only a LlamaForCausalLM can be read"
        raise ConfigError("model.pretrained", str(folder), allowed)
    if data.get("quantization_config") is not None:
        raise ConfigError("model.pretrained", str(folder), "is quantized; only plain weights can be read")
    try:
        theirs = LlamaConfig.from_dict(data)  # which knows what older files leave out
        return Architecture(_fields(theirs), int(theirs.vocab_size), int(theirs.max_position_embeddings))
    except _Unlike as error:
        raise ConfigError("model.pretrained", str(folder), str(error)) from None
    except ConfigError as error:
        raise ConfigError("model.pretrained", str(folder), f"cannot be represented: {error}") from None
    except Exception as error:  # transformers has its own for every kind of bad value
        allowed = f"its {CONFIG_NAME} is not usable ({one_line(error)})"
        raise ConfigError("model.pretrained", str(folder), allowed) from None


class _Unlike(Exception):  # noqa: N818 - carries the reason to where the folder is known
    """The model has something that ours has not."""


def _fields(theirs: Any) -> dict[str, Any]:
    for name, needed in _FIXED.items():
        if getattr(theirs, name) != needed:
            raise _Unlike(f"has {name} = {getattr(theirs, name)!r}; only {needed!r} can be represented")
    rope = theirs.rope_parameters
    if rope["rope_type"] != "default" or set(rope) - _ROPE_FIELDS:
        raise _Unlike(f"scales its rotary embedding ({rope}); only the plain one can be represented")
    heads, groups, head_dim = theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim
    if heads * head_dim != theirs.hidden_size:
        said = f"has {heads} heads of size {head_dim}, which are not its hidden_size = {theirs.hidden_size}"
        raise _Unlike(f"{said}; ours has hidden_size / head_dim heads")
    if heads % groups:
        raise _Unlike(f"has num_key_value_heads = {groups}, which does not divide its {heads} heads")
    fields = {
        "d_model": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "head_dim": head_dim,
        "num_key_value_groups": heads // groups,
        "mlp_ratio": theirs.intermediate_size / theirs.hidden_size,
        "rope_theta": float(rope["rope_theta"]),
        "norm_eps": float(theirs.rms_norm_eps),
        "tie_embeddings": bool(theirs.tie_word_embeddings),
    }
    RunConfig.from_dict({"model": fields, "parametrization": {"base_d_model": theirs.hidden_size}})
    return fields


def first_difference(model: ModelConfig, fields: dict[str, Any]) -> str | None:
    """Name of the first field in which a model is not that of a folder."""
    return next((name for name, needed in fields.items() if getattr(model, name) != needed), None)

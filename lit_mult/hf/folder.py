"""Reads a Hugging Face folder of a Llama or Qwen3: its architecture, its weights, and a hash of both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_mult.config import ModelConfig, RunConfig
from lit_mult.errors import ConfigError, UserError, one_line
from lit_mult.nn.llama import Llama

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"


@dataclass(frozen=True)
class Family:
    """One of Hugging Face's architectures that ours can be."""

    model_type: str
    architecture: str
    """Class in transformers."""
    label: str
    fixed: dict[str, Any]
    """Fields of its config with a fixed value in ours."""


LLAMA = Family("llama", "LlamaForCausalLM", "Llama", {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", "Qwen3", {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}
)
_ROPE_FIELDS = {"rope_type", "type", "rope_theta"}


@dataclass(frozen=True)
class Architecture:
    """The architecture in a config.json."""

    fields: dict[str, Any]
    """Fields of `ModelConfig`, without those that affect only training."""
    vocab_size: int
    max_length: int
    """max_position_embeddings."""


def family(model: ModelConfig) -> Family:
    """What a model of ours is, once merged."""
    return QWEN3 if model.qk_norm else LLAMA


def require_export_extra() -> None:
    """Raises: UserError when transformers or safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        needed = error.name or "transformers"
        raise UserError(f"Hugging Face folders need {needed}: pip install 'lit-mult[export]'") from None


def unusable(folder: Path, reason: str) -> ConfigError:
    """The error for a folder that cannot be `model.pretrained`."""
    return ConfigError("model.pretrained", str(folder), reason)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the model in a Hugging Face folder.

    Raises:
        ConfigError: there is no model, or one that ours cannot represent.
        UserError: the export extra is not installed.
    """
    require_export_extra()
    from transformers import CONFIG_MAPPING

    if not (folder / CONFIG_NAME).is_file():
        raise unusable(folder, f"no Hugging Face folder, it has no {CONFIG_NAME}")
    data = _read_json(folder, CONFIG_NAME, needs="model_type")
    made_for = data.get("architectures") or [data["model_type"]]
    found = next((one for one in (LLAMA, QWEN3) if one.model_type == data["model_type"]), None)
    if found is None or made_for not in ([found.model_type], [found.architecture]):
        read = f"{LLAMA.architecture} or {QWEN3.architecture}"
        raise unusable(folder, f"holds a {' '.join(made_for)}; only a {read} can be read")
    if data.get("quantization_config") is not None:
        raise unusable(folder, "is quantized; only plain weights can be read")
    try:
        theirs = CONFIG_MAPPING[found.model_type].from_dict(data)  # has defaults for fields that older files lack
        fields = _model_fields(theirs, found, folder)
        return Architecture(fields, int(theirs.vocab_size), int(theirs.max_position_embeddings))
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many types
        raise unusable(folder, f"its {CONFIG_NAME} is not usable ({one_line(error)})") from None


def _model_fields(theirs: Any, found: Family, folder: Path) -> dict[str, Any]:
    for name, needed in found.fixed.items():
        if getattr(theirs, name) != needed:
            raise unusable(folder, f"has {name} = {getattr(theirs, name)!r}; only {needed!r} can be represented")
    rope = theirs.rope_parameters
    if rope["rope_type"] != "default" or set(rope) - _ROPE_FIELDS:
        raise unusable(folder, f"scales its rotary embedding ({rope}); only the plain one can be represented")
    heads, kv_heads, head_dim = theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim
    if heads * head_dim != theirs.hidden_size:
        reason = f"has {heads} heads of size {head_dim}, which are not its hidden_size = {theirs.hidden_size}"
        raise unusable(folder, f"{reason}; ours has hidden_size / head_dim heads")
    if heads % kv_heads:
        raise unusable(folder, f"has num_key_value_heads = {kv_heads}, which does not divide its {heads} heads")
    fields = {
        "d_model": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "head_dim": head_dim,
        "num_key_value_groups": heads // kv_heads,
        "mlp_ratio": theirs.intermediate_size / theirs.hidden_size,
        "rope_theta": float(rope["rope_theta"]),
        "norm_eps": float(theirs.rms_norm_eps),
        "qk_norm": found is QWEN3,
        "tie_embeddings": bool(theirs.tie_word_embeddings),
    }
    try:
        RunConfig.from_dict({"model": fields, "parametrization": {"base_d_model": theirs.hidden_size}})
    except ConfigError as error:
        raise unusable(folder, f"cannot be represented: {error}") from None
    return fields


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our weights."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_weights(plain: Llama) -> dict[str, Tensor]:
    """The state dict for Hugging Face's model, float32, of one without multipliers (`nn.merging.merged`)."""
    return {hf_name(name): weight.float().contiguous() for name, weight in plain.state_dict().items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in a Hugging Face folder, by Hugging Face's names, in one file or in shards.

    Raises:
        ConfigError: the folder has no weights in safetensors files, or damaged ones.
        UserError: the export extra is not installed.
    """
    require_export_extra()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise unusable(folder, f"its {path.name} cannot be read ({one_line(error)})") from None
    return weights


def content_hash(folder: Path) -> str:
    """16 hex digits of a folder's config.json and weights, independent of its path.

    Raises:
        ConfigError: there is no config.json, or there are no weights.
    """
    whole = hashlib.sha256()
    for path in (folder / CONFIG_NAME, *_weight_files(folder)):
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unusable(folder, f"its {path.name} cannot be read ({error.strerror})") from None
    return whole.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights, in order."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / _INDEX_NAME).is_file():
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "; pickled ones are refused, as loading them runs code" if pickles else ""
        raise unusable(folder, f"has no weights as safetensors, no {WEIGHTS_NAME}{why}")
    try:
        names = sorted(set(_read_json(folder, _INDEX_NAME, needs="weight_map")["weight_map"].values()))
        missing = next((name for name in names if Path(name).name != name or not (folder / name).is_file()), None)
    except (TypeError, AttributeError) as error:
        raise unusable(folder, f"its {_INDEX_NAME} is damaged ({one_line(error)})") from None
    if missing is not None:
        raise unusable(folder, f"its {_INDEX_NAME} names {missing!r}, which is not there")
    return [folder / name for name in names]


def _read_json(folder: Path, name: str, needs: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads((folder / name).read_text())
        data[needs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(folder, f"its {name} is damaged, no JSON object with {needs} ({one_line(error)})") from None
    return data

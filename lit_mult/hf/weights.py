"""The weights of a Hugging Face Llama: their names, their files, and a hash of what lies in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from lit_mult.errors import ConfigError, one_line
from lit_mult.hf.architecture import CONFIG_NAME
from lit_mult.hf.extra import require_export_extra
from lit_mult.nn.llama import Llama

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_name(name: str) -> str:
    """Hugging Face's name of a weight of ours."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_weights(plain: Llama) -> dict[str, Tensor]:
    """The state dict for `LlamaForCausalLM`, float32, of a model without multipliers (`nn.merging.merged`)."""
    return {hf_name(name): weight.float().contiguous() for name, weight in plain.state_dict().items()}


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors."""
    from safetensors.torch import save_file

    save_file(weights, folder / _WHOLE, metadata={"format": "pt"})
    (folder / _WHOLE).chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner's eyes alone


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
    for path in weight_files(folder):
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            allowed = f"its {path.name} cannot be read ({one_line(error)})"
            raise ConfigError("model.pretrained", str(folder), allowed) from None
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights, in order.

    Raises:
        ConfigError: there are none, or the index of the shards is damaged.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / _INDEX).is_file():
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "; pickled ones are refused, as loading them runs code" if pickles else ""
        raise ConfigError("model.pretrained", str(folder), f"has no weights as safetensors, no {_WHOLE}{why}")
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        missing = next((name for name in names if Path(name).name != name or not (folder / name).is_file()), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        allowed = f"its {_INDEX} is damaged ({one_line(error)})"
        raise ConfigError("model.pretrained", str(folder), allowed) from None
    if missing is not None:
        raise ConfigError("model.pretrained", str(folder), f"its {_INDEX} names {missing!r}, which is not there")
    return [folder / name for name in names]


def content_hash(folder: Path) -> str:
    """16 hex digits of a folder's config.json and weights, wherever it lies.

    Raises:
        ConfigError: there is no config.json, or there are no weights.
    """
    whole = hashlib.sha256()
    for path in (folder / CONFIG_NAME, *weight_files(folder)):
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            allowed = f"its {path.name} cannot be read ({error.strerror})"
            raise ConfigError("model.pretrained", str(folder), allowed) from None
    return whole.hexdigest()[:16]

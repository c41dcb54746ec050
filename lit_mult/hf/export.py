"""Exports a trained model as a Hugging Face folder, and checks it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_mult import atomic
from lit_mult.config import RunConfig
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.data.tokenizers import ByteTokenizer, Tokenizer
from lit_mult.errors import UserError, one_line
from lit_mult.hf.card import model_card
from lit_mult.hf.check import Agreement, agreement, load_back
from lit_mult.hf.folder import CONFIG_NAME, WEIGHTS_NAME, family, hf_weights, require_export_extra
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.schema import RunRecord

ExportType = Literal["float32", "bfloat16"]

_WINDOWS = 16  # of validation text, on which models are compared


def export(
    model: Llama,
    config: RunConfig,
    corpus: TokenizedCorpus,
    step: int,
    out: Path,
    dtype: ExportType = "float32",
    record: RunRecord | None = None,
) -> Agreement:
    """Write a model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without lit_mult.

    The merged float32 weights are written, loaded back through transformers, and compared with the trained model on
    validation text; bfloat16 weights are these weights, rounded. The folder appears only if all checks pass.

    The model has its multipliers, and is in float32, on the CPU, in eval mode; `step` and the record are for the model
    card. An existing folder `out` must be empty.

    Returns:
        Agreement of the folder's logits, computed in `dtype`, with the trained model's.

    Raises:
        UserError: `out` exists or cannot be written, a weight is not finite, logits differ by more than rounding, or
            the export extra is not installed.
    """
    require_export_extra()
    ids_BT = torch.from_numpy(validation_windows(corpus.val, config.data.seq_len, _WINDOWS))[:, :-1]
    weights = hf_weights(merged(model))
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{out}: not exported, {name} holds values that are not finite; has the run diverged?")
    fields = hf_config(config, corpus.vocab_size, corpus.tokenizer.separator_id, "float32")
    with _new_folder(out) as scratch:
        write_tokenizer(scratch, corpus.tokenizer, config.data.seq_len)
        _write_model(scratch, fields, weights)
        exact = agreement(model, load_back(scratch, weights), ids_BT)
        if not exact.within_rounding:
            raise UserError(
                f"{out}: not exported, its logits differ from the trained model's by {exact.largest_difference:.2g} "
                f"where rounding explains {exact.bound:.2g} (largest logit {exact.largest_logit:.3g})"
            )
        written = exact
        if dtype != "float32":
            weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
            _write_model(scratch, fields | {"dtype": dtype}, weights)
            written = agreement(model, load_back(scratch, weights), ids_BT)
        card = model_card(config, corpus.hash, step, record, dtype, exact, written)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return written


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: is {'a file' if out.is_file() else 'not empty'}; name a new folder")
    try:
        with atomic.new_folder(out) as scratch:
            yield scratch
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or one_line(error)})") from None


def hf_config(config: RunConfig, vocab_size: int, separator_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of the merged model."""
    model = config.model
    return {
        "architectures": [family(model).architecture],
        "model_type": family(model).model_type,
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
        "rope_theta": model.rope_theta,  # for transformers before version 5
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": False,  # merging unties the head
        "attention_dropout": 0.0,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": separator_id,
        "use_cache": True,
    } | family(model).fixed


def _write_model(folder: Path, fields: dict[str, Any], weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(folder.stat().st_mode & 0o666)  # safetensors writes with mode 600
    _write_json(folder / CONFIG_NAME, fields)
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; `max_length` is the context length in training.

    `AutoTokenizer.from_pretrained(folder)` then gives the ids of `tokenizer.encode`. A post-processor, which would add
    tokens that the model has never seen, is removed. The bos, eos and pad tokens are the separator.
    """
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None})
    separator = tokenizer.decode([tokenizer.separator_id])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "clean_up_tokenization_spaces": False,
        # Special tokens are not recognized in texts, as in training; but a NUL is the byte 0.
        "split_special_tokens": not isinstance(tokenizer, ByteTokenizer),
        "model_max_length": max_length,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")

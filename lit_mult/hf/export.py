"""A trained model as a Hugging Face folder, checked before it appears."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.errors import UserError, one_line
from lit_mult.hf.agreement import Agreement, agreement
from lit_mult.hf.architecture import CONFIG_NAME, hf_config
from lit_mult.hf.card import model_card
from lit_mult.hf.extra import require_export_extra
from lit_mult.hf.tokenizer import write_tokenizer
from lit_mult.hf.weights import hf_weights, write_weights
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged
from lit_mult.schema import RunRecord

ExportType = Literal["float32", "bfloat16"]

_TYPES: dict[ExportType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    """Write a model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load with no code of ours.

    The merged float32 weights are written, loaded back through transformers and compared with the trained model on
    validation text; bfloat16 ones are then the rounding of the very weights that were compared, bit for bit. The folder
    appears when all of that has held, and otherwise not at all.

    Args:
        model: the trained model with its multipliers, in float32, on the CPU, in eval mode.
        config: of the run that trained it.
        corpus: of the run.
        step: optimizer steps that the model has had.
        out: folder to make; a folder that is there must be empty.
        dtype: of the weights.
        record: of the run, for the model card.

    Returns:
        How the folder's logits, computed in `dtype`, agree with the trained model's.

    Raises:
        UserError: `out` is taken or cannot be written, a weight is not finite, logits differ by more than rounding, or
            the export extra is not installed.
    """
    require_export_extra()
    ids_BT = torch.from_numpy(validation_windows(corpus.val, config.data.seq_len, _WINDOWS))[:, :-1]
    weights = hf_weights(merged(model))
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{out}: not exported, {name} holds values that are not finite; has the run diverged?")
    shape = hf_config(config, corpus.vocab_size, corpus.tokenizer.separator_id, "float32")
    with _appearing(out) as scratch:
        write_tokenizer(scratch, corpus.tokenizer, config.data.seq_len)
        _write_model(scratch, shape, weights)
        exact = agreement(model, _loaded(scratch, weights), ids_BT)
        if not exact.within_rounding:
            raise UserError(
                f"{out}: not exported, its logits differ from the trained model's by {exact.largest_difference:.2g} "
                f"where rounding explains {exact.bound:.2g} (largest logit {exact.largest_logit:.3g})"
            )
        written = exact
        if dtype != "float32":
            weights = {name: weight.to(_TYPES[dtype]) for name, weight in weights.items()}
            _write_model(scratch, shape | {"dtype": dtype}, weights)
            written = agreement(model, _loaded(scratch, weights), ids_BT)
        card = model_card(config, corpus.hash, step, record, dtype, exact, written)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return written


def _write_model(folder: Path, shape: dict[str, Any], weights: dict[str, Tensor]) -> None:
    write_weights(folder, weights)
    (folder / CONFIG_NAME).write_text(json.dumps(shape, indent=2))
    ends = {name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))


def _loaded(folder: Path, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The model in a folder as transformers loads it: ids (B, T) -> logits (B, T, V).

    Raises:
        UserError: it cannot be loaded, or its weights are not, bit for bit, those that were written.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"not exported, transformers cannot load it ({one_line(error)})") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    held = model.state_dict()
    for name in sorted(held.keys() | weights.keys()):
        same = name in held and name in weights and held[name].dtype == weights[name].dtype
        if not (same and torch.equal(held[name], weights[name])):
            raise UserError(f"not exported, transformers loads another {name} than was written")

    def logits(ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = model(ids_BT, use_cache=False).logits
        return logits_BTV

    return logits


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its name at the end, or is removed."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: is {'a file' if out.is_file() else 'not empty'}; name a new folder")
    scratch = out.absolute().with_name(f".{out.absolute().name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        scratch.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or one_line(error)})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Our tokenizers as files that transformers reads, with the same ids for every text."""

from __future__ import annotations

import json
from pathlib import Path

from lit_mult.data.tokenizers import ByteTokenizer, Tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    `AutoTokenizer.from_pretrained(folder)` then gives the ids of `tokenizer.encode` for every text, and adds none:
    what a template would put around a text (a post-processor) is left out, as the model has never seen it. Begin, end
    and padding are all the separator.

    Args:
        folder: where to write.
        tokenizer: the tokenizer of the run.
        max_length: tokens of the longest text that the model was trained on.
    """
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    held = json.loads(path.read_text(encoding="utf-8"))
    held["post_processor"] = None
    path.write_text(json.dumps(held, ensure_ascii=False, indent=2), encoding="utf-8")
    separator = tokenizer.decode([tokenizer.separator_id])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "clean_up_tokenization_spaces": False,
        # A text that spells out a special token stays text, as in training; but a NUL is the byte 0.
        "split_special_tokens": not isinstance(tokenizer, ByteTokenizer),
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

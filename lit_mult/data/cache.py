"""The token cache: `prepare` turns the data settings into two memory-mapped streams of token ids.

An entry is a folder: train.bin and val.bin (little-endian unsigned integers), meta.json, and tokenizer.json if the
tokenizer was trained on the corpus. It is written atomically; of several processes that write it, the first wins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_mult import atomic
from lit_mult.config import DataConfig
from lit_mult.data.batches import Tokens
from lit_mult.data.corpus import Corpus, open_corpus, spooled
from lit_mult.data.encoding import encode_documents, split_documents, token_file, training_texts
from lit_mult.data.tokenizers import HuggingFaceTokenizer, Tokenizer, bpe_size, load_tokenizer
from lit_mult.errors import UserError, one_line

Report = Callable[[str], None]

# A tokenizer, or the size of the byte-level BPE to train on the corpus.
_Wanted = Tokenizer | int

_FORMAT = 1  # increase when the same settings would give other files
_META, _TOKENIZER, _SPOOL = "meta.json", "tokenizer.json", "documents.jsonl"


@dataclass(frozen=True)
class TokenizedCorpus:
    """Token ids of a corpus, split into training and validation; each document is followed by a separator."""

    train: Tokens
    """Read-only memory map, shape (training tokens,): uint16, or uint32 for more than 65536 ids."""
    val: Tokens
    """Read-only memory map, shape (validation tokens,)."""
    vocab_size: int
    """All ids are below it."""
    hash: str
    """16 hex digits of the documents, their split and the tokenizer."""
    val_bytes_per_token: float
    """UTF-8 bytes of the validation documents over validation tokens. Separators count as tokens of 0 bytes, so that
    bits per byte = loss / ln(2) / val_bytes_per_token includes the ends of documents."""
    tokenizer: Tokenizer


def prepare(config: DataConfig, report: Report | None = None) -> TokenizedCorpus:
    """The tokens of a corpus, from the cache or tokenized into it; `report` gets progress lines.

    Memory is bounded by the largest document, not the corpus. A damaged entry is rewritten.

    Raises:
        UserError: the corpus or the tokenizer is not valid, they do not match, or the cache cannot be written.
    """
    report = report or (lambda line: None)
    wanted = bpe_size(config.tokenizer) or load_tokenizer(config.tokenizer)
    corpus = open_corpus(config)
    cache = cache_dir(config)
    entry = cache / _key(config, corpus, wanted)
    if cached := _open(entry, wanted):
        report(f"tokens of {config.corpus}: from {entry}")
        return cached
    try:
        with atomic.new_folder(entry, keep=lambda other: _open(other, wanted) is not None) as folder:
            _build(folder, corpus, wanted, config.val_fraction, report)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left; free some, or" if full else f"cannot be written ({one_line(error)});"
        remedy = "set data.cache_dir or LIT_MULT_CACHE to another folder"
        raise UserError(f"data.cache_dir: {cache}: {what} {remedy}") from None
    if cached := _open(entry, wanted):
        return cached
    raise UserError(f"data.cache_dir: {entry} is damaged although just written; is another program using the folder?")


def cache_dir(config: DataConfig) -> Path:
    """data.cache_dir, or LIT_MULT_CACHE, or lit_mult in the user's cache folder."""
    if configured := config.cache_dir or os.environ.get("LIT_MULT_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit_mult"


def _key(config: DataConfig, corpus: Corpus, wanted: _Wanted) -> str:
    tokenizer = f"bpe:{wanted}" if isinstance(wanted, int) else wanted.identity
    parts = [_FORMAT, corpus.identity, tokenizer, config.val_fraction, config.max_documents, config.text_field]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(folder: Path, corpus: Corpus, wanted: _Wanted, val_fraction: float, report: Report) -> None:
    """Write an entry's files."""
    if corpus.remote:
        report(f"downloading {corpus.label}")
        corpus = spooled(corpus, folder / _SPOOL)
    report(f"splitting {corpus.label}")
    split = split_documents(corpus.documents(), val_fraction)
    tokenizer = wanted
    if isinstance(tokenizer, int):
        report(f"training a tokenizer of {tokenizer} ids on {corpus.label}")
        trained = HuggingFaceTokenizer.train_bpe(training_texts(corpus.documents(), split), tokenizer)
        trained.save(folder / _TOKENIZER)
        tokenizer = trained
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    encoded = encode_documents(corpus.documents(), split, tokenizer, np.dtype(dtype), folder, report)
    (folder / _SPOOL).unlink(missing_ok=True)
    meta = {
        "hash": hashlib.sha256(f"{encoded.content_hash} {tokenizer.identity}".encode()).hexdigest()[:16],
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "val_bytes_per_token": encoded.val_bytes / encoded.val_tokens,
        "sizes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / _META).write_text(json.dumps(meta, indent=1))


def _open(entry: Path, wanted: _Wanted) -> TokenizedCorpus | None:
    """The corpus in a cache entry; None if the entry is missing or damaged."""
    try:
        meta = json.loads((entry / _META).read_text())
        if any((entry / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        return TokenizedCorpus(
            train=np.memmap(token_file(entry, "train"), meta["dtype"], "r"),
            val=np.memmap(token_file(entry, "val"), meta["dtype"], "r"),
            vocab_size=meta["vocab_size"],
            hash=meta["hash"],
            val_bytes_per_token=meta["val_bytes_per_token"],
            tokenizer=HuggingFaceTokenizer.from_file(entry / _TOKENIZER) if isinstance(wanted, int) else wanted,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None

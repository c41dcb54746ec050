"""Documents to files of token ids, one for training and one for validation: one pass, bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from lit_mult.data.corpus import Document
from lit_mult.data.tokenizers import Ids, Tokenizer
from lit_mult.errors import UserError

Side = Literal["train", "val"]

_DIGESTS = 1 << 64
# Characters. Tokenizers need some hundred bytes for each, so a long document goes to them in pieces, cut at line ends.
_PIECE = 1 << 20
_BATCH = 1 << 22
_REPORT_EVERY = 100_000_000


@dataclass(frozen=True)
class Split:
    """A document is for validation if its digest is below the threshold; a single text is cut instead.

    The digest depends only on the text, so that copies of a document are on one side, and the split depends neither on
    the order of the documents nor on other documents.
    """

    threshold: int
    """Digests below it are for validation; 0 to 2**64."""
    cut: float | None = None
    """Share of the text, at its end, for validation, if the corpus has only one distinct text."""

    def parts(self, text: str) -> list[tuple[Side, str]]:
        """The side of a document; for a single text, both sides with their parts."""
        if self.cut is None:
            return [("val" if digest(text) < self.threshold else "train", text)]
        at = len(text) - max(1, round(len(text) * self.cut))
        return [("train", text[:at]), ("val", text[at:])]


def digest(text: str) -> int:
    """Uniform in [0, 2**64): the first 8 bytes of the SHA-256 of the UTF-8 bytes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_documents(documents: Iterable[Document], val_fraction: float) -> Split:
    """A split with about val_fraction of the distinct documents for validation; one pass, constant memory.

    If a side of a small corpus would be empty, it gets the text with the lowest digest (validation) or the highest.
    """
    lowest, highest = _DIGESTS, -1
    for document in documents:
        value = digest(document.text)
        lowest, highest = min(lowest, value), max(highest, value)
    if lowest == highest:
        return Split(0, cut=val_fraction)
    # Above the lowest digest and not above the highest: neither side is empty.
    return Split(min(max(int(val_fraction * _DIGESTS), lowest + 1), highest))


@dataclass(frozen=True)
class Encoded:
    """What was written."""

    content_hash: str
    """Of the texts and the side each is on, in order."""
    val_tokens: int
    """Separators included."""
    val_bytes: int
    """UTF-8 bytes of the validation texts."""


@dataclass(frozen=True)
class _Piece:
    side: Side
    text: str
    ends_document: bool


@dataclass
class _Sink:
    """The file of one side, and counts of its content."""

    file: BinaryIO
    dtype: np.dtype[Any]
    tokens: int = 0
    bytes: int = 0

    def write(self, ids: Ids) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)


def token_file(folder: Path, side: Side) -> Path:
    """Path of the tokens of a side in a cache entry."""
    return folder / f"{side}.bin"


def training_texts(documents: Iterable[Document], split: Split) -> Iterator[str]:
    """The texts on the training side, long ones in pieces."""
    for document in documents:
        yield from (piece.text for piece in _pieces(document, split) if piece.side == "train")


def encode_documents(
    documents: Iterable[Document],
    split: Split,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    folder: Path,
    report: Callable[[str], None],
) -> Encoded:
    """Write the token files of both sides into a folder, with a separator after each document.

    Raises:
        UserError: the tokenizer does not match the text.
        OSError: the folder cannot be written.
    """
    content = hashlib.sha256()
    separator = np.array([tokenizer.separator_id], np.uint32)
    unknown = reported = 0

    def pieces() -> Iterator[_Piece]:
        for document in documents:
            for side, text in split.parts(document.text):
                content.update(side.encode() + hashlib.sha256(text.encode()).digest())
            yield from _pieces(document, split)

    with token_file(folder, "train").open("wb") as train_file, token_file(folder, "val").open("wb") as val_file:
        train, val = _Sink(train_file, dtype), _Sink(val_file, dtype)
        for batch in _batches(pieces()):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                _check_ids(ids, tokenizer)
                unknown += 0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))
                sink = val if piece.side == "val" else train
                sink.write(ids)
                sink.bytes += len(piece.text.encode())
                if piece.ends_document:
                    sink.write(separator)
            _check_known(unknown, train.tokens + val.tokens)
            if train.bytes + val.bytes >= reported + _REPORT_EVERY:
                reported = train.bytes + val.bytes
                report(f"tokenized {reported / 1e6:,.0f} MB")
    report(f"tokens: {train.tokens:,} for training, {val.tokens:,} for validation")
    return Encoded(content.hexdigest(), val.tokens, val.bytes)


def _pieces(document: Document, split: Split) -> Iterator[_Piece]:
    """The parts of a document; parts longer than `_PIECE` are cut at a line end, or anywhere in a longer line."""
    for side, text in split.parts(document.text):
        start = 0
        while len(text) - start > _PIECE:
            end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
            yield _Piece(side, text[start:end], ends_document=False)
            start = end
        yield _Piece(side, text[start:], ends_document=True)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Batches of pieces, with `_BATCH` characters or slightly more; the last may be smaller."""
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_ids(ids: Ids, tokenizer: Tokenizer) -> None:
    # A larger id would wrap around in the file's integers, or fall outside the model's embedding.
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        fault = f"gives id {ids.max()}, but its vocabulary ends at {tokenizer.vocab_size - 1}"
        raise UserError(f"data.tokenizer: {fault}; take another tokenizer")


def _check_known(unknown: int, tokens: int) -> None:
    if unknown > tokens / 2:
        fault = f"does not fit the corpus: {unknown / tokens:.0%} of the tokens are the unknown token"
        raise UserError(f"data.tokenizer: {fault}; take bytes, bpe:SIZE or a tokenizer of the corpus's language")

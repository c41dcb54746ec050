"""From text to token ids and back: bytes, byte-level BPE trained on the corpus, or a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from lit_mult.errors import ConfigError, one_line

Ids = npt.NDArray[np.unsignedinteger[Any]]

SEPARATORS = tuple(
    "<|endoftext|> <|end_of_text|> </s> <eos> <|eos|> [EOS] <|im_end|> <｜end▁of▁sentence｜> [SEP] <sep>".split()  # noqa: RUF001
)
"""Tokens that end a document; a Hugging Face tokenizer's separator is the first of these that it has."""
_UNKNOWNS = ("<unk>", "[UNK]", "<|unk|>", "<UNK>")
_NUL = "\x00"
_BPE_SMALLEST = 256 + 1  # every byte, and the separator


class Tokenizer(Protocol):
    """Token ids of texts. The separator follows each document of a token stream; `encode` does not add it."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all ids are below it."""

    @property
    def identity(self) -> str:
        """Different for tokenizers that may give different ids."""

    @property
    def separator_id(self) -> int:
        """Id of the token that ends a document."""

    @property
    def unknown_id(self) -> int | None:
        """Id of unknown text; None if the tokenizer covers all text."""

    def encode(self, text: str) -> Ids:
        """Ids of a text, shape (tokens,)."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` of each text, in parallel if the tokenizer can."""

    def decode(self, ids: Iterable[int], plain: bool = False) -> str:
        """Text of ids, with invalid UTF-8 replaced; plain: without special tokens."""

    def save(self, path: Path) -> None:
        """Write the tokenizer.json, from which `load_tokenizer` gives the tokenizer back."""


class ByteTokenizer:
    """The UTF-8 bytes of a text: 256 ids, no other symbol.

    The separator is NUL, which text files do not hold. A NUL in JSONL, parquet or a data set stays a NUL, and a
    model sees a border of documents there.
    """

    vocab_size = 256
    identity = "bytes"
    separator_id = 0
    unknown_id = None

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], plain: bool = False) -> str:
        wanted = bytes(int(token) for token in ids if not (plain and token == self.separator_id))
        return wanted.decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the tokenizer.json: byte-level BPE without merges, id = byte."""
        tokenizer = HFTokenizer(models.BPE(_byte_vocabulary(), []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(_NUL, normalized=False, special=True)])
        path.write_text(tokenizer.to_str(), encoding="utf-8")


def _byte_vocabulary() -> dict[str, int]:
    """The symbol that stands for each byte in byte-level BPE; NUL, which is a special token, stands for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
    del symbols[chr(256)]
    return {_NUL: 0, **symbols}


class HuggingFaceTokenizer:
    """A tokenizer of the tokenizers library, used on plain text.

    Special tokens are neither added nor recognized in the text ("</s>" is plain text), and truncation and padding are
    off.

    Raises:
        ConfigError: the tokenizer has none of `SEPARATORS`.
    """

    def __init__(self, tokenizer: HFTokenizer, name: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        separators = [vocabulary[token] for token in SEPARATORS if token in vocabulary]
        if not separators:
            fault = f"has no token that ends a document, none of {' '.join(SEPARATORS)}"
            raise ConfigError("data.tokenizer", name, f"{fault}; add one or take another tokenizer")
        self._tokenizer = tokenizer
        self.vocab_size = max(vocabulary.values()) + 1  # not the number of tokens: ids may have gaps
        self.separator_id = separators[0]
        unknown = getattr(tokenizer.model, "unk_token", None)
        known_as = [vocabulary[token] for token in (unknown, *_UNKNOWNS) if token in vocabulary]
        self.unknown_id = known_as[0] if known_as else None
        self.identity = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def train_bpe(cls, texts: Iterable[str], size: int) -> Self:
        """Byte-level BPE with up to `size` ids (fewer if the texts run out of pairs); lossless and deterministic."""
        tokenizer = HFTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[SEPARATORS[0]],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, f"bpe:{size}")

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a tokenizer.json. Raises: ConfigError when the file is not valid."""
        return cls(_read(path), str(path))

    def save(self, path: Path) -> None:
        """Write the tokenizer.json."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], plain: bool = False) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=plain))


def _read(path: Path) -> HFTokenizer:
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        fault = f"cannot be read as a tokenizer.json ({one_line(error)})"
        raise ConfigError("data.tokenizer", str(path), fault) from None


def bpe_size(spec: str) -> int | None:
    """SIZE of bpe:SIZE; None for another kind of tokenizer.

    Raises:
        ConfigError: SIZE is no number, or too small for every byte and the separator.
    """
    if not spec.startswith("bpe:"):
        return None
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit()) or int(size) < _BPE_SMALLEST:
        allowed = f"SIZE of bpe:SIZE must be a whole number from {_BPE_SMALLEST} on (every byte and the separator)"
        raise ConfigError("data.tokenizer", spec, allowed)
    return int(size)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that needs no training: bytes, hf:NAME, or the path of a tokenizer.json or its folder.

    Raises:
        ConfigError: there is no such tokenizer, or it has no separator.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("hf:"):
        try:
            tokenizer = HFTokenizer.from_pretrained(spec.removeprefix("hf:"))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError("data.tokenizer", spec, f"cannot be loaded ({one_line(error)})") from None
        return HuggingFaceTokenizer(tokenizer, spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        allowed = "no such tokenizer; give bytes, bpe:SIZE, hf:NAME, or the path of a tokenizer.json or its folder"
        raise ConfigError("data.tokenizer", spec, allowed)
    tokenizer = _read(path)
    if tokenizer.get_vocab(with_added_tokens=True) == _byte_vocabulary():
        return ByteTokenizer()  # as it was saved
    return HuggingFaceTokenizer(tokenizer, str(path))

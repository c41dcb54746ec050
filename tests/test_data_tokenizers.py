"""Tokenizers: lossless where they claim to be, deterministic, and clear about what they refuse."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from lit_mult.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, bpe_size, load_tokenizer
from lit_mult.errors import ConfigError

TRAINING = ["the cat sat on the mat\n", "the dog sat on the log\n"] * 5


@cache
def trained() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_bpe(TRAINING, 270)


def word_level(path: Path, vocabulary: dict[str, int]) -> Path:
    tokenizer = HFTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes_give_every_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.astype(np.uint16)) == text  # as the cache holds them


@settings(deadline=None)
@given(st.text() | st.text("the cat\n <|endoftext|>"))
def test_bpe_gives_every_text_back(text: str) -> None:
    tokenizer = trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator_id not in ids
    assert len(ids) == 0 or ids.max() < tokenizer.vocab_size


def test_bpe_spelled_out_separator_stays_text() -> None:
    tokenizer = trained()
    assert tokenizer.separator_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.separator_id]) == "<|endoftext|>"


def test_bpe_learns_pairs_and_is_deterministic() -> None:
    tokenizer = trained()
    assert tokenizer.vocab_size == 270
    assert tokenizer.unknown_id is None
    # 270 - 257 = 13 merges; "at", the most frequent pair but those of "the", is surely among them.
    assert len(tokenizer.encode("the cat")) < len(b"the cat")
    assert HuggingFaceTokenizer.train_bpe(iter(TRAINING), 270).identity == tokenizer.identity
    assert HuggingFaceTokenizer.train_bpe(TRAINING, 271).identity != tokenizer.identity


def test_bpe_smallest_size_has_no_merges() -> None:
    tokenizer = HuggingFaceTokenizer.train_bpe(TRAINING, 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("the cät")) == len("the cät".encode())


def test_bpe_survives_its_file(tmp_path: Path) -> None:
    trained().save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert loaded.identity == trained().identity
        np.testing.assert_array_equal(loaded.encode("the <|endoftext|> mat"), trained().encode("the <|endoftext|> mat"))


def test_encode_batch_is_encode_of_each() -> None:
    texts = ["the cat", "", "sät\n"]
    for tokenizer in (ByteTokenizer(), trained()):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_huggingface_file_without_its_truncation_padding_and_gaps(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(word_level(tmp_path / "t.json", {"<unk>": 0, "cat": 4, "</s>": 7})))
    assert tokenizer.encode("cat cat dog cat").tolist() == [4, 4, 0, 4]
    assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.unknown_id) == (8, 7, 0)


def test_huggingface_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = word_level(tmp_path / "t.json", {"<unk>": 0, "<eos>": 1})
    hub = SimpleNamespace(from_pretrained=lambda name: HFTokenizer.from_file(str(path)) if name == "a/b" else None)
    monkeypatch.setattr("lit_mult.data.tokenizers.HFTokenizer", hub)
    assert load_tokenizer("hf:a/b").separator_id == 1


def test_bpe_size() -> None:
    assert bpe_size("bpe:512") == 512
    assert bpe_size("bytes") is None
    for spec in ("bpe:256", "bpe:", "bpe:big", "bpe:-512", "bpe:5e3"):
        with pytest.raises(ConfigError, match=r"data\.tokenizer = 'bpe:.*whole number from 257 on"):
            bpe_size(spec)


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"model": {"type": "none"}}))
    no_end = word_level(tmp_path / "no_end.json", {"<unk>": 0, "cat": 1})
    for spec, said in [
        ("byte", "no such tokenizer; give bytes, bpe:SIZE, hf:NAME"),
        (str(tmp_path), "no such tokenizer"),  # a folder without a tokenizer.json
        (str(tmp_path / "bad.json"), "cannot be read as a tokenizer.json"),
        (str(no_end), "no token that ends a document, none of <|endoftext|>"),
        ("hf:no such name!", "cannot be loaded"),  # refused for its characters, before any request
    ]:
        with refusal(said) as caught:
            load_tokenizer(spec)
        assert str(caught.value).startswith(f"data.tokenizer = {spec!r}: ")

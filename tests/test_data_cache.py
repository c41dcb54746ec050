"""The token cache: what is in the two streams, the split, and an entry that is whole or not there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_corpus import offline, write_jsonl, write_parquet
from test_data_tokenizers import word_level

from lit_mult.config import DataConfig
from lit_mult.data import cache, encoding
from lit_mult.data.batches import Tokens
from lit_mult.data.cache import TokenizedCorpus, cache_dir, prepare
from lit_mult.data.corpus import Document
from lit_mult.data.encoding import digest, split_documents
from lit_mult.data.tokenizers import HuggingFaceTokenizer
from lit_mult.errors import ConfigError, UserError

__all__ = ["offline"]

TEXTS = [f"document {i} äöü\n" for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)


def config(corpus: object, **settings: Any) -> DataConfig:
    """Settings with the cache beside the corpus's folder."""
    folder = Path(str(corpus).removeprefix("hf:")).parent
    return DataConfig(
        **{"corpus": str(corpus), "cache_dir": str(folder.parent / "cache"), "val_fraction": 0.25, **settings}
    )


def documents(tokens: Tokens, tokenizer: Any) -> list[str]:
    """The texts in a token stream, which ends with a separator as each document does."""
    ends = np.flatnonzero(tokens == tokenizer.separator_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(ids[:-1]) for ids in np.split(tokens, ends + 1)[:-1]]


def both(prepared: TokenizedCorpus) -> tuple[list[str], list[str]]:
    return documents(prepared.train, prepared.tokenizer), documents(prepared.val, prepared.tokenizer)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_streams_hold_each_document_once_in_order(corpus: Path, tokenizer: str) -> None:
    prepared = prepare(config(corpus, tokenizer=tokenizer))
    train, val = both(prepared)
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]
    assert val == [text for text in TEXTS if text in val]
    assert prepared.train.dtype == np.uint16
    assert not prepared.train.flags.writeable
    assert isinstance(prepared.val, np.memmap)
    assert prepared.vocab_size == prepared.tokenizer.vocab_size


def test_bytes_per_token_counts_separators_as_tokens(corpus: Path) -> None:
    prepared = prepare(config(corpus))
    _, val = both(prepared)
    size = sum(len(text.encode()) for text in val)
    assert prepared.val_bytes_per_token == size / (size + len(val))


def test_second_time_comes_from_the_cache(corpus: Path) -> None:
    for tokenizer in ("bytes", "bpe:300"):
        lines: list[str] = []
        first = prepare(config(corpus, tokenizer=tokenizer), lines.append)
        assert lines[-1].startswith("tokens: ")
        lines.clear()
        second = prepare(config(corpus, tokenizer=tokenizer), lines.append)
        assert len(lines) == 1
        assert ": from " in lines[0]
        np.testing.assert_array_equal(first.train, second.train)
        assert first.tokenizer.identity == second.tokenizer.identity
        assert (first.hash, first.val_bytes_per_token) == (second.hash, second.val_bytes_per_token)


def test_bpe_sees_no_validation_text(tmp_path: Path) -> None:
    texts = [f"{'abcdefghij'[i]}{'abcdefghij'[i]}" * 9 for i in range(10)]
    prepared = prepare(config(write_jsonl(tmp_path / "in" / "a.jsonl", texts), tokenizer="bpe:400"))
    train, val = both(prepared)
    # Every text has letters of its own: training texts were merged to few ids, validation texts stay bytes.
    assert len(prepared.val) == sum(len(text) + 1 for text in val)
    assert len(prepared.train) < sum(len(text) + 1 for text in train) / 2


def test_hash_tells_documents_split_and_tokenizer_apart(corpus: Path, tmp_path: Path) -> None:
    base = prepare(config(corpus)).hash
    others = [config(corpus, tokenizer="bpe:300"), config(corpus, val_fraction=0.5), config(corpus, max_documents=39)]
    changed = write_jsonl(tmp_path / "in" / "b.jsonl", [*TEXTS[:-1], "other"])
    hashes = {base, *(prepare(other).hash for other in [*others, config(changed)])}
    assert len(hashes) == 5
    assert prepare(config(write_jsonl(tmp_path / "in" / "c.jsonl", TEXTS, "body"), text_field="body")).hash == base


@pytest.mark.usefixtures("offline")
def test_hash_does_not_depend_on_how_the_documents_were_read(tmp_path: Path) -> None:
    base = prepare(config(write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)))
    write_parquet(tmp_path / "parquet" / "a.parquet", TEXTS)
    for source in ("in", "parquet"):
        for streaming in (False, True):
            settings = {"streaming": streaming, "max_documents": 40, "cache_dir": str(tmp_path / "cache")}
            prepared = prepare(config(f"hf:{tmp_path / source}", **settings))
            assert prepared.hash == base.hash
            np.testing.assert_array_equal(prepared.train, base.train)
    assert not list((tmp_path / "cache").rglob("documents.jsonl"))


# ---- the split


def sides(texts: Sequence[str], val_fraction: float) -> tuple[set[str], set[str]]:
    split = split_documents([Document("", text) for text in texts], val_fraction)
    parts = [part for text in texts for part in split.parts(text)]
    return {text for side, text in parts if side == "train"}, {text for side, text in parts if side == "val"}


def test_split_is_by_content_alone() -> None:
    texts = [f"text {i % 200}" for i in range(400)]  # each twice
    train, val = sides(texts, 0.25)
    assert not train & val
    assert sides(texts[::-1], 0.25) == (train, val)
    # 200 distinct texts: binomial with mean 50 and standard deviation 6.1, so five deviations to either side.
    assert 20 <= len(val) <= 80
    assert sides([*texts, "one more"], 0.25)[1] - {"one more"} == val


def test_split_of_a_small_corpus_leaves_no_side_empty() -> None:
    texts = ["a", "b", "c", "b"]
    lowest, _, highest = sorted({"a", "b", "c"}, key=digest)
    assert sides(texts, 1e-9) == ({"a", "b", "c"} - {lowest}, {lowest})
    assert sides(texts, 1 - 1e-9) == ({highest}, {"a", "b", "c"} - {highest})


def test_lone_text_is_cut_at_its_end() -> None:
    assert sides(["0123456789"], 0.2) == ({"01234567"}, {"89"})
    assert sides(["0123456789"], 0.01) == ({"012345678"}, {"9"})  # at least a character
    assert sides(["0123456789"] * 3, 0.2) == ({"01234567"}, {"89"})  # copies are cut alike


def test_lone_document_of_one_character(tmp_path: Path) -> None:
    prepared = prepare(config(write_jsonl(tmp_path / "in" / "a.jsonl", ["x"])))
    assert both(prepared) == ([""], ["x"])


def test_long_documents_are_encoded_in_pieces(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config(corpus))
    monkeypatch.setattr(encoding, "_PIECE", 5)
    monkeypatch.setattr(encoding, "_BATCH", 12)
    pieces = prepare(config(corpus, cache_dir=str(corpus.parent / "other")))
    np.testing.assert_array_equal(whole.train, pieces.train)
    assert (whole.hash, whole.val_bytes_per_token) == (pieces.hash, pieces.val_bytes_per_token)
    assert both(prepare(config(corpus, tokenizer="bpe:300")))[0] == both(whole)[0]


# ---- an entry is whole, or it is not there


def entries(corpus: Path) -> list[Path]:
    return sorted((corpus.parent.parent / "cache").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing", "meta", "tokenizer"])
def test_damaged_entry_is_written_anew(corpus: Path, damage: str) -> None:
    prepared = prepare(config(corpus, tokenizer="bpe:300"))
    train = np.array(prepared.train)
    (entry,) = entries(corpus)
    if damage == "truncated":
        (entry / "train.bin").write_bytes((entry / "train.bin").read_bytes()[:-2])
    elif damage == "missing":
        (entry / "val.bin").unlink()
    elif damage == "meta":
        (entry / "meta.json").write_text('{"hash": ')
    else:
        (entry / "tokenizer.json").write_text(" " * (entry / "tokenizer.json").stat().st_size)
    np.testing.assert_array_equal(prepare(config(corpus, tokenizer="bpe:300")).train, train)
    assert entries(corpus) == [entry]


def test_loser_of_a_race_uses_the_winners_entry(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, winners = cache._build, []

    def build_late(*arguments: Any) -> None:
        build(*arguments)
        monkeypatch.setattr(cache, "_build", build)
        prepare(config(corpus))  # another writer comes first
        (entry,) = (path for path in entries(corpus) if not path.name.startswith("."))
        winners.append((entry / "train.bin").stat().st_ino)

    monkeypatch.setattr(cache, "_build", build_late)
    prepared = prepare(config(corpus))
    (entry,) = entries(corpus)
    assert [(entry / "train.bin").stat().st_ino] == winners
    train, val = both(prepared)
    assert sorted(train + val) == sorted(TEXTS)


def test_two_processes_at_once(corpus: Path) -> None:
    code = (
        "import sys; from lit_mult.config import DataConfig; from lit_mult.data.cache import prepare\n"
        "config = DataConfig.model_validate_json(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "print(prepare(config).hash)"
    )
    command = [sys.executable, "-c", code, config(corpus).model_dump_json()]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [prepare(config(corpus)).hash] * 2
    assert len(entries(corpus)) == 1


def test_failure_leaves_nothing_behind(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding._Sink, "write", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*cache: no space left; free some, or set data\.cache_dir"):
        prepare(config(corpus))
    assert entries(corpus) == []


def test_folder_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"data\.cache_dir: .*cannot be written \(.*set data\.cache_dir or LIT_MULT_CACHE"
    ):
        prepare(config(corpus, cache_dir=str(tmp_path / "file" / "cache")))


def test_bad_corpus_leaves_nothing_behind(corpus: Path) -> None:
    corpus.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"data\.corpus: .*a\.jsonl:2: field 'text' holds int, not text"):
        prepare(config(corpus))
    assert entries(corpus) == []


def test_cache_dir_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_MULT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir(DataConfig()) == Path("/xdg/lit_mult")
    monkeypatch.setenv("LIT_MULT_CACHE", "/mine")
    assert cache_dir(DataConfig()) == Path("/mine")
    assert cache_dir(DataConfig(cache_dir="/set")) == Path("/set")
    monkeypatch.delenv("LIT_MULT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir(DataConfig()) == Path.home() / ".cache" / "lit_mult"


# ---- tokenizers that do not fit


def test_tokenizer_that_knows_few_of_the_words(corpus: Path, tmp_path: Path) -> None:
    # Whitespace cuts "document 7 äöü" into three words, of which it knows "document" alone: two of four tokens are
    # unknown with the separator counted; without "document" it is three of four.
    vocabulary = {"<unk>": 0, "</s>": 1, "document": 2}
    prepared = prepare(config(corpus, tokenizer=str(word_level(tmp_path / "t.json", vocabulary))))
    assert prepared.train[:4].tolist() == [2, 0, 0, 1]
    del vocabulary["document"]
    with pytest.raises(UserError, match=r"data\.tokenizer: does not fit the corpus: 75% of the tokens are the unknown"):
        prepare(config(corpus, tokenizer=str(word_level(tmp_path / "t.json", vocabulary))))


def test_large_vocabulary_takes_wider_integers(corpus: Path, tmp_path: Path) -> None:
    path = word_level(tmp_path / "t.json", {"<unk>": 0, "</s>": 1, "document": 1 << 16})
    prepared = prepare(config(corpus, tokenizer=str(path)))
    assert prepared.train.dtype == np.uint32
    assert prepared.train[0] == 1 << 16


def test_ids_beyond_the_vocabulary_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HuggingFaceTokenizer, "encode_batch", lambda self, texts: [np.array([9], np.uint32)] * len(texts)
    )
    path = word_level(tmp_path / "t.json", {"<unk>": 0, "</s>": 1})
    with pytest.raises(UserError, match=r"data\.tokenizer: gives id 9, but its vocabulary ends at 1"):
        prepare(config(corpus, tokenizer=str(path)))


def test_bad_size_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="from 257 on"):
        prepare(DataConfig(corpus="/nowhere", tokenizer="bpe:100"))


def test_meta_is_plain_json(corpus: Path) -> None:
    prepared = prepare(config(corpus))
    (entry,) = entries(corpus)
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["hash"] == prepared.hash
    assert meta["sizes"] == {"train.bin": 2 * len(prepared.train), "val.bin": 2 * len(prepared.val)}

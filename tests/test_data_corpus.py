"""Corpora: what each kind yields, in which order, and what it says of bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from lit_mult.config import DataConfig
from lit_mult.data.corpus import open_corpus
from lit_mult.errors import ConfigError, UserError
from lit_mult.mini.benchmark import training_documents

TEXTS = ["first\n", "zweite äöü\n", "third 三\n"]


def texts(corpus: str | Path, **settings: Any) -> list[str]:
    return [document.text for document in open_corpus(DataConfig(corpus=str(corpus), **settings)).documents()]


def identity(corpus: str | Path, **settings: Any) -> str:
    return open_corpus(DataConfig(corpus=str(corpus), **settings)).identity


def write_jsonl(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"id": range(len(texts)), field: texts}), path)
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face data sets from local files only, cached in tmp_path; they read the environment when imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_home")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_stdlib_is_library_code_in_sorted_order() -> None:
    documents = list(open_corpus(DataConfig()).documents())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_stdlib_skips_files_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.py").write_bytes(b"# \xe9\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "a.txt").write_text("no Python")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("c = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert texts("stdlib") == ["a = 1\n"]


def test_folder_in_sorted_order_without_hidden_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_bytes(b"two\r\n")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("hidden")
    (tmp_path / ".hidden").write_bytes(b"\0")
    write_jsonl(tmp_path / "d.jsonl", ["three", "", "four"])
    write_parquet(tmp_path / "e.parquet", ["five", "six"])
    documents = list(open_corpus(DataConfig(corpus=str(tmp_path))).documents())
    assert [document.text for document in documents] == ["one", "two\r\n", "three", "four", "five", "six"]
    assert [document.name for document in documents][1:3] == ["b/x.md", "d.jsonl:1"]


def test_single_files_and_their_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü")
    assert texts(tmp_path / "a.txt") == ["äöü"]
    assert texts(write_jsonl(tmp_path / "a.jsonl", TEXTS, "body"), text_field="body") == TEXTS
    assert texts(write_parquet(tmp_path / "a.parquet", TEXTS, "body"), text_field="body") == TEXTS


def test_parquet_is_read_in_order_over_batches(tmp_path: Path) -> None:
    many = [str(i) for i in range(3000)]  # rows are read 1024 at a time
    assert texts(write_parquet(tmp_path / "a.parquet", many)) == many


def test_max_documents_counts_documents_from_the_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "a", "b", "c"])
    assert texts(path, max_documents=2) == ["a", "b"]
    assert texts(path, max_documents=9) == ["a", "b", "c"]


def test_identity_follows_content_not_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    before = identity(path)
    path.touch()
    assert identity(path) == before
    write_jsonl(path, [*TEXTS[:2], "Third 三\n"])  # same size
    assert identity(path) != before


def test_corpus_can_be_read_again(tmp_path: Path) -> None:
    corpus = open_corpus(DataConfig(corpus=str(write_jsonl(tmp_path / "a.jsonl", TEXTS))))
    assert list(corpus.documents()) == list(corpus.documents())


BAD_FILES = [
    ("empty.txt", b"", "is empty"),
    ("nul.txt", b"ab\0c", "NUL at byte 2"),
    ("latin1.txt", b"ab\xe9c", "not UTF-8 (byte 2)"),
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', "bad.jsonl:3: is not JSON"),
    ("list.jsonl", b"[1]\n", "list.jsonl:1: is a JSON list"),
    ("field.jsonl", b'{"body": "a", "id": 1}\n', "no field 'text'; set data.text_field to one of body, id"),
    ("null.jsonl", b'{"text": null}\n', "holds NoneType, not text"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    ("latin1.jsonl", b'{"text": "\xe9"}\n', "latin1.jsonl:1: is not UTF-8"),
    ("blank.jsonl", b"\n\n", "is empty"),
    ("bad.parquet", b"PAR1 or not", "not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_file_is_named_with_its_fault(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with refusal(str(tmp_path / name), said) as caught:
        texts(tmp_path / name)
    assert str(caught.value).startswith("data.corpus: ")


def test_missing_corpus_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpus: .*none: no such file or folder; give a path, stdlib or hf:"):
        texts(tmp_path / "none")
    with pytest.raises(UserError, match="holds no documents"):
        texts(tmp_path)


def test_parquet_without_the_field_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no field 'text'; set data\.text_field to one of id, body"):
        texts(write_parquet(tmp_path / "a.parquet", TEXTS, "body"))


@pytest.mark.parametrize(("module", "corpus"), [("pyarrow", "a.parquet"), ("datasets", "hf:some/name")])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, corpus: str) -> None:
    if corpus.endswith(".parquet"):
        (tmp_path / corpus).write_bytes(b"PAR1")
        corpus = str(tmp_path / corpus)
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(UserError, match=r"pip install 'lit-mult\[data\]'"):
        texts(corpus)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_gives_the_documents_of_the_files(tmp_path: Path, write: Any, streaming: bool) -> None:
    write(tmp_path / "set" / f"a.{write.__name__.removeprefix('write_')}", [*TEXTS, "", "fourth"], "body")
    settings = {"streaming": streaming, "text_field": "body"}
    corpus = f"hf:{tmp_path / 'set'}"
    assert texts(corpus, max_documents=9, **settings) == [*TEXTS, "fourth"]
    assert texts(corpus, max_documents=2, **settings) == TEXTS[:2]
    with pytest.raises(UserError, match=r"no field 'text'; set data\.text_field to one of id, body"):
        texts(corpus, max_documents=9, streaming=streaming)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_identity_follows_local_content(tmp_path: Path, streaming: bool) -> None:
    corpus, settings = f"hf:{tmp_path / 'set'}", {"streaming": streaming, "max_documents": 2}
    path = write_jsonl(tmp_path / "set" / "a.jsonl", TEXTS)
    before = identity(corpus, **settings)
    assert identity(corpus, **settings) == before
    write_jsonl(path, [*TEXTS, "more"])
    assert identity(corpus, **settings) != before


def test_streaming_needs_max_documents() -> None:
    with pytest.raises(ConfigError, match=r"data\.streaming = True: needs data\.max_documents"):
        texts("hf:some/name", streaming=True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_failures_are_one_line(tmp_path: Path, streaming: bool) -> None:
    write_jsonl(tmp_path / "set" / "a.jsonl", TEXTS)
    for corpus, split in [("hf:nobody/nothing", "train"), (f"hf:{tmp_path / 'set'}", "dev")]:
        with refusal("data.corpus: hf:", "cannot be loaded as a data set"):
            texts(corpus, streaming=streaming, max_documents=9, hf_split=split)
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"data\.corpus: hf:"):
        texts(f"hf:{tmp_path / 'set'}", streaming=streaming, max_documents=9)


@pytest.mark.parametrize("share", ["0.5", ".8"])
def test_a_mixture_has_the_base_first_and_then_its_share_of_the_benchmarks_training_text(
    tmp_path: Path, share: str
) -> None:
    (tmp_path / "a.txt").write_text("alpha\n" * 2000)
    (tmp_path / "b.txt").write_text("beta\n" * 2000)
    mixture = open_corpus(DataConfig(corpus=f"{tmp_path}+mini:{share}"))
    found = list(mixture.documents())
    assert [document.name for document in found[:3]] == ["a.txt", "b.txt", "mini:0"]
    characters = [len(document.text) for document in found]
    assert sum(characters[2:]) / sum(characters) == pytest.approx(float(share), abs=0.005)
    assert [document.text for document in mixture.documents()] == [document.text for document in found]
    assert found[2].text == next(training_documents())


def test_mixtures_have_identities_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    names = [str(tmp_path), f"{tmp_path}+mini:0.5", f"{tmp_path}+mini:0.25"]
    assert len({open_corpus(DataConfig(corpus=name)).identity for name in names}) == 3
    same = [f"{tmp_path}+mini:0.5", f"{tmp_path}+mini:.50"]
    assert len({open_corpus(DataConfig(corpus=name)).identity for name in same}) == 1


@pytest.mark.parametrize("share", ["0", "1", "1.5", "half", "", "-0.5", "0.0", "1e-1"])
def test_a_share_outside_0_to_1_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match="SHARE of BASE\\+mini:SHARE must lie between 0 and 1"):
        open_corpus(DataConfig(corpus=f"stdlib+mini:{share}"))


def test_the_base_of_a_mixture_may_be_cut(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 500)
    found = list(open_corpus(DataConfig(corpus=f"{tmp_path}+mini:0.5", max_documents=2)).documents())
    assert [document.name for document in found[:3]] == ["a.txt", "b.txt", "mini:0"]

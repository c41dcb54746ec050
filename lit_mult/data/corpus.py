"""From the data settings to an ordered stream of documents: `open_corpus`."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from lit_mult.config import DataConfig
from lit_mult.data.documents import (
    Document,
    corpus_error,
    hash_files,
    list_files,
    missing_field,
    one_line,
    read_file,
    row_document,
)
from lit_mult.errors import ConfigError
from lit_mult.mini import VERSION as MINI_VERSION
from lit_mult.mini.training import documents as mini_documents

__all__ = ["Corpus", "Document", "open_corpus", "spooled"]

# Left out of the standard library: what distributions package apart (or build: _sysconfigdata holds paths of the
# machine it was built on), tests, bundled programs, and the character tables of encodings.
_STDLIB_WITHOUT = {
    *("site-packages", "dist-packages", "distutils", "tkinter", "ensurepip", "lib2to3", "__pycache__", "__phello__"),
    *("test", "tests", "idle_test", "idlelib", "turtledemo", "encodings"),
}
_STDLIB_WITHOUT_PREFIX = ("config-", "_sysconfigdata")
_MIXED_IN = "+mini:"


@dataclass(frozen=True)
class Corpus:
    """An ordered stream of documents that can be read again and again."""

    label: str
    """What the user called it."""
    identity: str
    """Changes when the content does, as far as can be told without reading a remote data set."""
    source: Callable[[], Iterator[Document]]
    """Starts the stream anew."""
    max_documents: int | None = None
    """Length at which the stream is cut."""
    remote: bool = False
    """Each reading is a download."""

    def documents(self) -> Iterator[Document]:
        """The documents in order, at most max_documents of them; those without a character are skipped.

        Raises:
            UserError: the corpus cannot be read, is malformed or holds no document.
        """
        empty = True
        for document in islice((document for document in self.source() if document.text), self.max_documents):
            empty = False
            yield document
        if empty:
            raise corpus_error(self.label, "is empty, it holds no documents; give a corpus with text in it")


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that the settings name: stdlib, a file or folder, or a Hugging Face data set, or a mixture with one.

    Files are hashed here (their contents are the identity), and read later, by `Corpus.documents`. A document must
    fit in memory; a corpus need not.

    Raises:
        UserError: there is no such corpus.
        ConfigError: a streamed data set without data.max_documents, or a share that is none.
    """
    if _MIXED_IN in config.corpus:
        return _open_mixture(config)
    if config.corpus == "stdlib":
        return _open_stdlib(config)
    if config.corpus.startswith("hf:"):
        return _open_huggingface(config)
    return _open_path(config)


def spooled(corpus: Corpus, path: Path) -> Corpus:
    """The same documents, downloaded once into a JSONL file at path and read from there."""
    with path.open("w", encoding="utf-8") as file:
        for document in corpus.documents():
            file.write(json.dumps({"text": document.text}) + "\n")
    return Corpus(corpus.label, corpus.identity, lambda: read_file(path, corpus.label, "text"))


def _open_stdlib(config: DataConfig) -> Corpus:
    """The running Python's standard library; its text depends on the Python version, and the identity with it."""

    def skip(part: str) -> bool:
        return part in _STDLIB_WITHOUT or part.startswith(_STDLIB_WITHOUT_PREFIX)

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(name, path) for name, path in list_files(root, skip) if path.suffix == ".py"]

    def source() -> Iterator[Document]:
        for name, path in files:
            try:
                yield Document(name, path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue

    return Corpus("stdlib", f"stdlib:{hash_files(files)}", source, config.max_documents)


def _open_mixture(config: DataConfig) -> Corpus:
    """BASE+mini:SHARE: the base, then as much of the benchmark's training text as makes it that share of characters."""
    name, _, share = config.corpus.rpartition(_MIXED_IN)
    if not re.fullmatch(r"0?\.\d+", share) or float(share) == 0:
        raise ConfigError("data.corpus", config.corpus, "SHARE of BASE+mini:SHARE must lie between 0 and 1, as 0.5")
    base = open_corpus(config.model_copy(update={"corpus": name}))

    def source() -> Iterator[Document]:
        characters = 0
        for document in base.documents():
            characters += len(document.text)
            yield document
        wanted = characters * float(share) / (1 - float(share))
        for number, text in enumerate(mini_documents()):
            if wanted <= 0:
                return
            wanted -= len(text)
            yield Document(f"mini:{number}", text)

    identity = f"{base.identity}+mini-{MINI_VERSION}:{float(share)}"
    return Corpus(config.corpus, identity, source, remote=base.remote)


def _open_path(config: DataConfig) -> Corpus:
    path = Path(config.corpus).expanduser()
    if path.is_dir():
        files = list_files(path, skip=lambda part: part.startswith("."))
    elif path.is_file():
        files = [(path.name, path)]
    else:
        raise corpus_error(config.corpus, "no such file or folder; give a path, stdlib or hf:NAME")

    def source() -> Iterator[Document]:
        for name, file in files:
            yield from read_file(file, name, config.text_field)

    return Corpus(config.corpus, f"files:{hash_files(files)}", source, config.max_documents)


def _open_huggingface(config: DataConfig) -> Corpus:
    name = config.corpus.removeprefix("hf:")
    if config.streaming and config.max_documents is None:
        raise ConfigError("data.streaming", True, "needs data.max_documents, the number of documents to stream")

    def load() -> Any:
        try:
            import datasets
        except ImportError:
            raise corpus_error(config.corpus, "needs datasets: pip install 'lit-mult[data]'") from None
        try:
            return datasets.load_dataset(name, config.hf_config, split=config.hf_split, streaming=config.streaming)
        except Exception as error:  # the loaders raise anything, from ValueError to errors of the HTTP client
            said = f"cannot be loaded as a data set ({one_line(error)}); check data.hf_config and data.hf_split too"
            raise corpus_error(config.corpus, said) from None

    def read(dataset: Any) -> Iterator[Document]:
        rows = iter(_only_field(dataset, config))
        for number in count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a stream fails in as many ways as load_dataset does
                raise corpus_error(config.corpus, f"failed at row {number} ({one_line(error)})") from None
            yield row_document(row, config.text_field, f"{config.corpus} row {number}", f"{name}:{number}")

    if not config.streaming:
        dataset = load()
        return Corpus(config.corpus, f"hf:{dataset._fingerprint}", lambda: read(dataset), config.max_documents)
    # Nothing cheap tells whether a remote data set has changed; of a local one the files do.
    local = hash_files(list_files(Path(name), skip=lambda part: False)) if Path(name).is_dir() else None
    settings = json.dumps([name, config.hf_config, config.hf_split, config.max_documents, local])
    identity = f"hf-stream:{hashlib.sha256(settings.encode()).hexdigest()}"
    return Corpus(config.corpus, identity, lambda: read(load()), config.max_documents, remote=True)


def _only_field(dataset: Any, config: DataConfig) -> Any:
    """The data set without its other columns, which would be decoded for nothing; streams may not know theirs."""
    fields = dataset.column_names
    if fields is None:
        return dataset
    if config.text_field not in fields:
        raise missing_field(config.corpus, config.text_field, fields)
    return dataset.select_columns([config.text_field])

"""From the data settings to an ordered stream of documents (`open_corpus`), read from text, JSONL and parquet."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from lit_mult.config import DataConfig
from lit_mult.errors import ConfigError, UserError, one_line
from lit_mult.mini import VERSION as MINI_VERSION
from lit_mult.mini.benchmark import training_documents

# Excluded from the standard library: parts that distributions package separately (or build: _sysconfigdata has paths of
# the build machine), tests, bundled programs, and character tables of encodings.
_STDLIB_WITHOUT = {
    *("site-packages", "dist-packages", "distutils", "tkinter", "ensurepip", "lib2to3", "__pycache__", "__phello__"),
    *("test", "tests", "idle_test", "idlelib", "turtledemo", "encodings"),
}
_STDLIB_WITHOUT_PREFIX = ("config-", "_sysconfigdata")
_MIXED_IN = "+mini:"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text; its name, the source, affects no result."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """An ordered stream of documents that can be read repeatedly."""

    label: str
    """data.corpus, for messages."""
    identity: str
    """Changes with the content; for remote data sets, with their settings only."""
    source: Callable[[], Iterator[Document]]
    """Starts the stream."""
    max_documents: int | None = None
    """Length at which the stream is cut."""
    remote: bool = False
    """Each reading is a download."""

    def documents(self) -> Iterator[Document]:
        """The documents in order, at most max_documents of them, without empty ones.

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
    """The corpus of the settings: stdlib, a file or folder, a Hugging Face data set, or a mixture with one.

    Files are hashed here, for the identity, and read by `Corpus.documents`. A document must fit in memory; a corpus
    need not.

    Raises:
        UserError: there is no such corpus.
        ConfigError: a streamed data set without data.max_documents, or an invalid share.
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
    """The running Python's standard library, which depends on the Python version."""

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
    """BASE+mini:SHARE: the base, then the benchmark's training text up to that share of all characters."""
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
        for number, text in enumerate(training_documents()):
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
        except Exception as error:  # loaders raise many types, from ValueError to HTTP errors
            reason = f"cannot be loaded as a data set ({one_line(error)})"
            raise corpus_error(config.corpus, f"{reason}; check data.hf_config and data.hf_split too") from None

    def read(dataset: Any) -> Iterator[Document]:
        rows = iter(_only_field(dataset, config))
        for number in count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # as for load_dataset
                raise corpus_error(config.corpus, f"failed at row {number} ({one_line(error)})") from None
            yield row_document(row, config.text_field, f"{config.corpus} row {number}", f"{name}:{number}")

    if not config.streaming:
        dataset = load()
        return Corpus(config.corpus, f"hf:{dataset._fingerprint}", lambda: read(dataset), config.max_documents)
    # There is no cheap check whether a remote data set has changed; for a local one, its files are hashed.
    local = hash_files(list_files(Path(name), skip=lambda part: False)) if Path(name).is_dir() else None
    settings = json.dumps([name, config.hf_config, config.hf_split, config.max_documents, local])
    identity = f"hf-stream:{hashlib.sha256(settings.encode()).hexdigest()}"
    return Corpus(config.corpus, identity, lambda: read(load()), config.max_documents, remote=True)


def _only_field(dataset: Any, config: DataConfig) -> Any:
    """The data set without other columns, which need not be decoded; streams may not know their columns."""
    fields = dataset.column_names
    if fields is None:
        return dataset
    if config.text_field not in fields:
        raise missing_field(config.corpus, config.text_field, fields)
    return dataset.select_columns([config.text_field])


def corpus_error(where: object, what: str) -> UserError:
    """The error for a part of the corpus."""
    return UserError(f"data.corpus: {where}: {what}")


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """Documents of one file: a line each (.jsonl), a row each (.parquet), else the whole file as one.

    Raises:
        UserError: the file is not text, is malformed, or lacks the text field.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, name, text_field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, name, text_field)
        else:
            yield Document(name, decode_utf8(path.read_bytes(), path))
    except OSError as error:
        raise corpus_error(path, f"cannot be read ({one_line(error)})") from None


def decode_utf8(data: bytes, where: object) -> str:
    """Decode UTF-8 text. Raises: UserError when it is binary or not UTF-8."""
    if (at := data.find(0)) >= 0:
        raise corpus_error(where, f"is binary (NUL at byte {at}); give UTF-8 text, .jsonl or .parquet")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise corpus_error(where, f"is not UTF-8 (byte {error.start}); convert it to UTF-8") from None


def row_document(row: Mapping[str, Any], text_field: str, where: str, name: str) -> Document:
    """The document in one row. Raises: UserError when the field is missing or not text."""
    if text_field not in row:
        raise missing_field(where, text_field, row)
    text = row[text_field]
    if not isinstance(text, str):
        raise corpus_error(where, f"field {text_field!r} holds {type(text).__name__}, not text; set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise corpus_error(where, f"field {text_field!r} holds half a surrogate pair, which is not text") from None
    return Document(name, text)


def missing_field(where: object, text_field: str, fields: Iterable[str]) -> UserError:
    """The error for a missing text field; lists the existing ones."""
    return corpus_error(
        where, f"no field {text_field!r}; set data.text_field to one of {', '.join(fields) or '(none)'}"
    )


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of names and contents of files, read in blocks."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise corpus_error(path, f"cannot be read ({one_line(error)})") from None
    return digest.hexdigest()


def list_files(root: Path, skip: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """Files below root as (posix name relative to root, path), sorted; `skip` gets the name of each file and folder."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not skip(name)]
        paths += [Path(folder, name) for name in files if not skip(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(decode_utf8(line, where))
            except ValueError as error:
                raise corpus_error(where, f"is not JSON ({one_line(error)}); fix or drop the line") from None
            if not isinstance(row, dict):
                raise corpus_error(where, f"is a JSON {type(row).__name__}, not an object with a field {text_field!r}")
            yield row_document(row, text_field, where, f"{name}:{number}")


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise corpus_error(path, "reading parquet needs pyarrow: pip install 'lit-mult[data]'") from None
    try:
        with pq.ParquetFile(path) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise missing_field(path, text_field, fields)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield row_document(row, text_field, f"{path} row {number}", f"{name}:{number}")
    except pa.ArrowException as error:
        raise corpus_error(path, f"is not a readable parquet file ({one_line(error)})") from None

"""Documents, and the readers that draw them from text, JSONL and parquet files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_mult.errors import UserError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text; the name says where it comes from and plays no part in any result."""

    name: str
    text: str


def corpus_error(where: object, what: str) -> UserError:
    """The one-line complaint about the corpus: where, what is wrong there, and how to mend it."""
    return UserError(f"data.corpus: {where}: {what}")


def one_line(error: Exception) -> str:
    """What an exception says, on one line and not too long."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:297] + "..."


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
    """Text of UTF-8 bytes; bytes that cannot be text raise `UserError`."""
    if (at := data.find(0)) >= 0:
        raise corpus_error(where, f"is binary (NUL at byte {at}); give UTF-8 text, .jsonl or .parquet")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise corpus_error(where, f"is not UTF-8 (byte {error.start}); convert it to UTF-8") from None


def row_document(row: Mapping[str, Any], text_field: str, where: str, name: str) -> Document:
    """The document in one record; a missing field, or one that is not text, raises `UserError`."""
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
    """The complaint about a text field that is not there; names those that are."""
    return corpus_error(
        where, f"no field {text_field!r}; set data.text_field to one of {', '.join(fields) or '(none)'}"
    )


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of names and contents of files, read in blocks: memory does not grow with a file."""
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
    """Files below root as (posix name relative to root, path), sorted; skip judges the name of each file and folder."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(folder, name) for name in files if not skip(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(decode_utf8(line, where))
            except ValueError as error:
                raise corpus_error(where, f"is not JSON ({one_line(error)}); mend or drop the line") from None
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

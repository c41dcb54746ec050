"""Atomic writes: files and folders appear complete or not at all, even if the writer is killed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A scratch path beside `path` to write to; at the end of the block the file is renamed to `path`.

    Raises:
        FileExistsError: the file exists by then, and `overwrite` is False.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            scratch.replace(path)
        else:
            _link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file. Raises: as `new_file`."""
    with new_file(path, overwrite=overwrite) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path, *, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A scratch folder beside `path`; at the end of the block it is renamed to `path`, unless an exception was raised.

    Args:
        path: the folder to make; an existing one must be empty.
        keep: called with a folder that another process has created meanwhile: True keeps it and drops ours, False
            replaces it (as damaged or outdated). Without `keep` such a folder is an error.

    Raises:
        OSError: `path` is a file or a folder that is not empty by then, or cannot be written.
    """
    scratch = scratch_path(path)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        while True:
            try:
                scratch.replace(path)
                return
            except OSError as error:
                if keep is None or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if keep(path):
                return
            # Renaming is atomic: only one of several writers moves the stale folder away.
            with suppress(FileNotFoundError):
                path.rename(stale := scratch_path(path))
                shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link(scratch: Path, path: Path) -> None:
    """Rename without replacing an existing file; the error has that file's path."""
    try:
        os.link(scratch, path)
    except FileExistsError as error:
        raise FileExistsError(error.errno, error.strerror, str(path)) from None


def remove_scratch(path: Path) -> None:
    """Remove the scratch files of killed writers of `path`; call only when no process writes it."""
    for scratch in path.parent.glob(f".{path.name}.*"):
        scratch.unlink()


def scratch_path(path: Path) -> Path:
    """A unique hidden name beside `path`."""
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}")

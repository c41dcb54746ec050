"""Files and folders that appear complete or not at all, whatever kills the process that writes them."""

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
    """A scratch path beside `path` to write to; at the end of the block the file takes its name.

    Raises:
        FileExistsError: there is such a file by then and it is not to be overwritten.
        OSError: the place cannot be written.
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
    """A scratch folder beside `path` to fill; at the end of the block it takes its name, unless an exception ends it.

    Args:
        path: the folder to make; one that is there must be empty.
        keep: asked about a folder that another process has put there in the meantime: True keeps it and drops ours,
            False replaces it (it is damaged or out of date). Without it such a folder is an error.

    Raises:
        OSError: there is a folder that is not empty (or a file) by then, or `path` cannot be written.
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
            # Renaming is atomic: of several writers that find the same folder one takes it away.
            with suppress(FileNotFoundError):
                path.rename(stale := scratch_path(path))
                shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link(scratch: Path, path: Path) -> None:
    """Give a file its name; unlike a rename, refuses to replace a file, which the error then names."""
    try:
        os.link(scratch, path)
    except FileExistsError as error:
        raise FileExistsError(error.errno, error.strerror, str(path)) from None


def remove_scratch(path: Path) -> None:
    """Remove what writers of `path` that were killed have left; nobody may be writing it."""
    for scratch in path.parent.glob(f".{path.name}.*"):
        scratch.unlink()


def scratch_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses; hidden, so that readers pass over it."""
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}")

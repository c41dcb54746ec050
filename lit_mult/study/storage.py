"""Optuna storages by URL, with one-line errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import SQLAlchemyError

from lit_mult.errors import UserError

_LOCK_SECONDS = 10
"""Age at which a journal's lock counts as left by a killed process."""


def open_storage(url: str | Path, *, replace_damaged: bool = False) -> BaseStorage:
    """Open a storage, or create it.

    Args:
        url: `grpc://host:port` (a server of `optuna.storages.run_grpc_proxy_server`), a database URL that SQLAlchemy
            knows (`sqlite:///study.db`, `postgresql://user@host/db`), or the path of a journal file.
        replace_damaged: rename a journal that cannot be read (to *.damaged) and begin a new one.

    Raises:
        UserError: the storage cannot be reached or read, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the sweep has its own progress display
    with failing_in_one_line(url):
        if isinstance(url, Path) or "://" not in url:
            return _journal(Path(url).absolute(), replace_damaged)
        try:
            parts = urlsplit(url)
            if parts.scheme == "grpc":
                return _grpc(parts.hostname or "localhost", parts.port or 13000)
            # Several writers: wait for a locked SQLite file, and renew connections that a server dropped.
            options = {"connect_args": {"timeout": 100}} if parts.scheme == "sqlite" else {"pool_pre_ping": True}
            return RDBStorage(_with_driver(url), engine_kwargs=options)
        except ValueError as error:  # the port is not a number
            raise UserError(f"storage {url}: {_first_line(error)}") from None


@contextmanager
def failing_in_one_line(url: str | Path) -> Iterator[None]:
    """Turn errors of storages into a UserError."""
    grpc_error = getattr(sys.modules.get("grpc"), "RpcError", StorageInternalError)
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, ImportError, OSError, json.JSONDecodeError, grpc_error) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        message = getattr(cause, "orig", None) or getattr(cause, "details", lambda: None)() or cause
        raise UserError(f"storage {url}: {_first_line(message)}") from error


class _RepairingLock(JournalFileSymlinkLock):
    """A journal's lock that truncates a torn last line when it is acquired.

    A full disk or a killed writer leaves such a line. Readers skip it, together with anything appended to it.
    """

    def acquire(self) -> bool:
        super().acquire()
        try:
            with Path(self._lock_target_file).open("r+b") as file:
                if (size := file.seek(0, os.SEEK_END)) and file.seek(size - 1) and file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        with suppress(RuntimeError):  # another process took the lock while this one was suspended
            super().release()


def _journal(path: Path, replace_damaged: bool) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = path.open("rb").read(4096).strip(b"\0") if path.exists() else b""
    if b'"op_code"' not in head and not b'{"op_code"'.startswith(head):
        raise UserError(f"storage {path}: is not an Optuna journal; a database needs a URL, as in sqlite:///FILE")
    # An absolute path, as the lock is a symbolic link: a relative link would dangle, and never be removed as stale.
    lock = _RepairingLock(str(path), grace_period=_LOCK_SECONDS)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock))  # replays the file, except for a bad last line
        *_, last = [b"{}\n", *path.read_bytes().splitlines(keepends=True)]
        if last.endswith(b"\n"):
            json.loads(last)
        return storage
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # raised by Optuna's replay of a bad line
        if not replace_damaged:
            raise UserError(f"storage {path}: damaged ({_first_line(error)}); stop the other sweeps first") from None
        path.replace(path.with_name(f"{path.name}.damaged"))
        return _journal(path, replace_damaged=False)


def _grpc(host: str, port: int) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    storage = GrpcStorageProxy(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=30)
    except ConnectionError:
        raise OSError(f"no server answers at {host}:{port}") from None
    return storage


def _with_driver(url: str) -> str:
    """Use psycopg 3 for `postgresql://`; SQLAlchemy's default is psycopg2."""
    scheme, rest = url.split("://", 1)
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else url


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""Leases: files that say who works on what, and whether that process is still there.

A lease is a JSON file that its holder created, keeps locked and touches now and then. On the holder's own machine the
lock tells whether it lives (the kernel drops the lock with the process); from another machine, where locks may not be
seen, the file's age tells. This asks of the results folder no more than creation that fails when the file exists,
so it works the same whatever storage Optuna uses.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from lit_mult import atomic

LEASE_SECONDS = 60.0
"""A holder on another machine that has not touched its file for so long is taken for dead."""


@cache
def machine() -> str:
    """Name of this machine: the host's, and what tells apart two hosts (or containers) of the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:  # not on Linux
        boot = ""
    return f"{socket.gethostname()}/{boot}"


class Lease:
    """A lease that this process holds, from its creation until it is closed or the process ends."""

    def __init__(self, path: Path, content: dict[str, Any], successor: Path | None = None) -> None:
        """Create the file; `content` goes into it beside machine, pid and time.

        `successor` is the lease of whoever takes this process for dead, as may happen when it or its machine stood
        still for a while: `lost` says whether it has been seen.

        Raises:
            FileExistsError: somebody has created this lease before.
            OSError: the place cannot be written.
        """
        self.path, self.successor, self.lost = path, successor, False
        self.content = {
            "machine": machine(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            **content,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locked and complete before it appears under its name, or it could be taken for a dead one.
        scratch = atomic.scratch_path(path)
        try:
            self._file = scratch.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write()
            os.link(scratch, path)
        except BaseException:
            if hasattr(self, "_file"):
                self._file.close()
            raise
        finally:
            scratch.unlink(missing_ok=True)
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, name=f"lease {path.stem}", daemon=True).start()

    def close(self, ended: str, reason: str = "") -> None:
        """End the lease; the file stays and says how it ended."""
        self._closed.set()
        self.content |= {"ended": ended, "reason": reason}
        with suppress(OSError):  # a full disk: it will read as that of a process that died
            self._write()
            self._file.close()

    def _write(self) -> None:
        self._file.seek(0)
        json.dump(self.content, self._file)
        self._file.truncate()
        self._file.flush()

    def _refresh(self) -> None:
        while not self._closed.wait(LEASE_SECONDS / 6):
            with suppress(OSError):
                os.utime(self.path)
                self.lost = self.successor is not None and self.successor.exists()


def read_lease(path: Path) -> dict[str, Any]:
    """Content of a lease file; empty where it has gone or is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_alive(path: Path) -> bool:
    """Whether the holder of a lease file is still there and has not closed it."""
    try:
        with path.open() as file:
            content = read_lease(path)
            if "ended" in content:
                return False
            if content.get("machine", machine()) != machine():
                return _now_beside(path) - path.stat().st_mtime < LEASE_SECONDS
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False


def _now_beside(path: Path) -> float:
    """Time by the clock of the file system, as the machines' own may differ."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        return os.fstat(file.fileno()).st_mtime

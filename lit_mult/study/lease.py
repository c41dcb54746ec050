"""Leases: files that show which process works on what, and whether that process is alive.

The holder creates a JSON file, keeps it locked and refreshes its modification time. On the holder's machine the lock
shows whether the process is alive (the kernel releases it with the process); on other machines, where locks may not be
visible, the file's age does. All this needs of the results folder is exclusive file creation, and it works with any
Optuna storage.
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
"""A lease held on another machine expires when its file has not been refreshed for so long."""


@cache
def machine() -> str:
    """Host name and boot id, which distinguishes hosts (or containers) of the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:  # not on Linux
        boot = ""
    return f"{socket.gethostname()}/{boot}"


class Lease:
    """A lease that this process holds until it is closed or the process ends."""

    def __init__(self, path: Path, content: dict[str, Any], successor: Path | None = None) -> None:
        """Create the file, with `content`, machine, pid and time.

        `successor` is the next lease on the same work. Another process creates it when this lease expired, as when this
        process was suspended; `lost` is True once the file exists.

        Raises:
            FileExistsError: the lease exists already.
            OSError: the folder cannot be written.
        """
        self.path, self.successor, self.lost = path, successor, False
        self.content = {
            "machine": machine(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            **content,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locked and complete before it gets its name, or others could consider it expired.
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
        """End the lease; the file stays and records how it ended."""
        self._closed.set()
        self.content |= {"ended": ended, "reason": reason}
        with suppress(OSError):  # on a full disk the lease reads as one of a process that died
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
    """Content of a lease file; empty when it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_alive(path: Path) -> bool:
    """Whether the holder of a lease file is alive and has not closed it."""
    try:
        with path.open() as file:
            content = read_lease(path)
            if "ended" in content:
                return False
            if content.get("machine", machine()) != machine():
                return _file_system_time(path) - path.stat().st_mtime < LEASE_SECONDS
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False


def _file_system_time(path: Path) -> float:
    """Time by the clock of the file system: clocks of the machines may differ."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        return os.fstat(file.fileno()).st_mtime

"""The report of a study that runs, as a page of a local server, which is made anew as records come in.

The server answers three addresses on this machine alone: the page, the state of the study and the data of the page. No
path of the study folder has an address. What a record or the analysis of half a study gets wrong is shown as a problem,
and the last report stays.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lit_mult.analysis.page.document import document
from lit_mult.analysis.page.payload import INTERACTIVE, Payload, payload
from lit_mult.analysis.report import drawn, read_content
from lit_mult.errors import UserError
from lit_mult.layout import step_of
from lit_mult.study.cells import StudyCells
from lit_mult.study.folder import StudyFolder
from lit_mult.study.search import cost
from lit_mult.study.status import StudyStatus, seconds_since, study_status
from lit_mult.training.folder import RunFolder

HOST = "127.0.0.1"
_INTERVAL = 2.0
_SHARE = 0.1
"""Of the time, which reading the folder and making the page may take: the machine is for the sweep."""


class Watch:
    """What the server says of a study; reads its folder, writes nothing."""

    def __init__(self, folder: Path, retries: int) -> None:
        """Raises: UserError when the folder holds no study."""
        self.folder, self.retries = StudyFolder(folder), retries
        cells = StudyCells(self.folder.spec(), self.folder)
        costs = [(known, cost(known.point.first_cell().config)) for known in cells.points]
        self._costs = {cell: of_cell for known, of_cell in costs for cell in known.cells}
        self._cost = sum(known.n_cells * of_cell for known, of_cell in costs)
        self._mean_cost = self._cost / cells.n_cells
        self.page: Payload | None = None
        self._problems: tuple[str, ...] = ()
        self._records: frozenset[Any] = frozenset()
        self._state, self._read_at, self._reading = dict[str, Any](), -float("inf"), threading.Lock()
        self._closed = threading.Event()

    def state(self) -> dict[str, Any]:
        """Cells by status, running ones with where, since when and their last checkpoint; time left, problems.

        Read anew when that is due: after two seconds, or ten times what reading took.
        """
        with self._reading:
            if time.monotonic() >= self._read_at:
                start = time.monotonic()
                self._state = self._read_state()
                self._read_at = time.monotonic() + max(_INTERVAL, (time.monotonic() - start) / _SHARE)
        version = self.page.version if self.page else ""
        return self._state | {"version": version, "problems": [*self._problems, *self._state["problems"]]}

    def refresh(self) -> None:
        """Make the page anew if there are other records than the last time."""
        if (records := self._listed()) == self._records:
            return
        self._records = records
        damaged = list[str]()
        try:
            content = read_content(self.folder.path, damaged.append)
            self.page = payload(drawn(content, but=INTERACTIVE))
        except UserError as error:
            damaged.append(f"no newer report: {error}")
        # A part of a report may not be ready for a study of which half is there; the sweep and the page go on.
        except Exception as error:
            damaged.append(f"no newer report: {type(error).__name__}: {error}")
        self._problems = tuple(damaged)

    def keep_fresh(self) -> None:
        """`refresh` until `close`, within its share of the time."""
        while not self._closed.is_set():
            start = time.monotonic()
            self.refresh()
            self._closed.wait(max(_INTERVAL, (time.monotonic() - start) / _SHARE))

    def close(self) -> None:
        self._closed.set()

    def _listed(self) -> frozenset[Any]:
        found = set()
        for path in self.folder.records():
            with suppress(OSError):  # renamed meanwhile
                found.add((path.name, path.stat().st_mtime_ns))
        return frozenset(found)

    def _read_state(self) -> dict[str, Any]:
        try:
            status = study_status(self.folder.path, self.retries)
        # Files come and go while they are read; the last state stays.
        except Exception as error:
            return self._state | {"problems": [str(error)]} if self._state else _nothing_known(str(error))
        running = [
            {
                "cell": attempt.cell,
                "machine": attempt.machine,
                "pid": attempt.pid,
                "seconds": seconds_since(attempt.since),
            }
            | {"step": self._step(attempt.cell) or attempt.from_step or None}
            for attempt in status.running
        ]
        return {
            "name": status.name,
            "cells": status.cells,
            "ended": dict(status.ended),
            "running": running,
            "waiting": status.waiting,
            "interrupted": status.interrupted,
            "failed": status.failed,
            "sweeps": len(status.sweeps),
            "seconds_left": self._seconds_left(status),
            "problems": [],
        }

    def _step(self, cell: str) -> int | None:
        checkpoint = RunFolder(self.folder.cell(cell).path).newest_checkpoint()
        return step_of(checkpoint) if checkpoint else None

    def _seconds_left(self, status: StudyStatus) -> float | None:
        """By the cost of the planned cells and of the records since the oldest running sweep began.

        Cells that were sampled or added have the mean cost. None without a sweep, or before its first record.
        """
        spent = max((seconds_since(lease.get("since")) or 0.0 for lease in status.sweeps), default=0.0)
        begun = time.time() - spent
        ended = {Path(name).stem: changed / 1e9 for name, changed in self._listed()}
        costs = {cell: self._costs.get(cell, self._mean_cost) for cell in {*ended, *status.failed}}
        made = sum(costs[cell] for cell, changed in ended.items() if changed >= begun)
        return spent * max(0.0, self._cost - sum(costs.values())) / made if spent and made else None


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        # A page of another origin may point a name of its own to this address; it cannot change the Host header.
        if self.headers.get("Host") not in self.server.names:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"ask for 127.0.0.1\n")
        elif (make := self.server.answers.get(self.path)) is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is / alone\n")
        else:
            kind, text = make()
            self._answer(HTTPStatus.OK, kind, text.encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.end_headers()
        with suppress(ConnectionError):  # the reader has closed the page
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watch: Watch, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.names = {f"{host}:{self.server_port}" for host in (HOST, "localhost")}
        self.answers: dict[str, Callable[[], tuple[str, str]]] = {
            "/": lambda: ("text/html", document(watch.page, live=True)),
            "/state.json": lambda: ("application/json", json.dumps(watch.state())),
            "/page.json": lambda: ("application/json", json.dumps(watch.page.as_dict() if watch.page else {})),
        }


class Server:
    """A server of a study's page in threads of its own, from the start to the end of a `with` block."""

    def __init__(self, folder: Path | str, port: int = 0, retries: int = 0) -> None:
        """`port` 0: a free one.

        Raises:
            UserError: the folder holds no study, or the port is no port, or taken.
        """
        if not 0 <= port <= 65535:
            raise UserError(f"--port {port}: must be from 0 (a free one) to 65535")
        self._watch = Watch(Path(folder), retries)
        try:
            self._server = _Server(self._watch, port)
        except OSError as error:
            reason = "in use; 0 takes a free one" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port {port}: {reason}") from None
        self.address = f"http://{HOST}:{self._server.server_port}/"
        work = (self._watch.keep_fresh, lambda: self._server.serve_forever(poll_interval=0.1))
        self._threads = [threading.Thread(target=target, daemon=True) for target in work]

    def __enter__(self) -> Server:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.close()
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Until the process is interrupted."""
        threading.Event().wait()


def _nothing_known(problem: str) -> dict[str, Any]:
    numbers = {"cells": 0, "waiting": 0, "sweeps": 0, "seconds_left": None}
    return {"name": "", "ended": {}, "running": [], "interrupted": {}, "failed": {}, "problems": [problem], **numbers}

"""`lit-mult watch`: a page that follows its study, from a server that says nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from record_data import make_record
from refusals import refusal
from tiny_runs import MakeStudy

from lit_mult.config import RunConfig
from lit_mult.schema import CellInfo
from lit_mult.study import watch as watching
from lit_mult.study.folder import StudyFolder
from lit_mult.study.search import cost
from lit_mult.study.spec import StudySpec
from lit_mult.study.watch import Server, Watch


@pytest.fixture
def folder(study_dict: MakeStudy, tmp_path: Path) -> StudyFolder:
    """A study of ten cells without a record."""
    folder = StudyFolder(tmp_path / "study")
    with folder.locked():
        folder.claim(StudySpec.from_dict(study_dict()), [])
    return folder


def cells_of(folder: StudyFolder) -> list[Any]:
    return [cell for point in folder.spec().points() for n in point.grid() for cell in [point.cell(n, 0)]]


def end(folder: StudyFolder, cell: Any, loss: float = 2.0) -> Path:
    """Write the record of a cell, as if it had been trained."""
    config = RunConfig()
    factors, nuisance = (
        {"optimizer": "adamw", "model.d_model": 64},
        {"optim.lr": 2.0 ** -len(folder.records()), "seed": 0},
    )
    info = CellInfo(study="tiny", cell=cell.id, arm="muP", sampler="grid", factors=factors, nuisance=nuisance)
    config = config.with_overrides(factors | nuisance)
    make_record(config, loss, cell=info).write(folder.record(cell.id))
    return folder.record(cell.id)


@pytest.fixture
def server(folder: StudyFolder) -> Iterator[Server]:
    with Server(folder.path) as server:
        yield server


def ask(server: Server, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    """The answer to a path as it stands: no client tidies up its dots."""
    connection = HTTPConnection("127.0.0.1", urlsplit(server.address).port or 0, timeout=20)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_waits_for_the_first_record(server: Server) -> None:
    answer, page = ask(server, "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b'data-live=""' in page
    assert b"connect-src 'self'" in page
    state = json.loads(ask(server, "/state.json")[1])
    assert (state["name"], state["cells"], state["waiting"], state["ended"]) == ("tiny", 10, 10, {})
    assert (state["version"], state["problems"], state["seconds_left"], state["sweeps"]) == ("", [], None, 0)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/study.json", "/records/", "/?x=1",
        "/index.html", "/state.json/..", "/page.json#x",
    ],
)  # fmt: skip
def test_no_other_address_exists(server: Server, path: str) -> None:
    answer, content = ask(server, path)
    assert (answer.status, content) == (404, b"there is / alone\n")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1", "127.0.0.1:1"])
def test_a_name_that_someone_points_here_gets_nothing(server: Server, host: str) -> None:
    for path in ("/", "/state.json", "/page.json"):
        answer, content = ask(server, path, Host=host)
        assert (answer.status, content) == (403, b"ask for 127.0.0.1\n")


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_record_makes_a_report_and_a_damaged_one_a_problem(folder: StudyFolder) -> None:
    watch = Watch(folder.path, retries=3)
    first, second, third = cells_of(folder)[:3]
    end(folder, first)
    watch.refresh()
    page = watch.page
    assert page is not None
    assert watch.state()["version"] == page.version
    watch.refresh()
    assert watch.page is page  # nothing is new
    folder.record(second.id).write_text('{"schema_version": 1, "stat')  # torn
    end(folder, third)
    watch.refresh()
    assert watch.page is not None
    assert watch.page.version != page.version
    (problem,) = watch.state()["problems"]
    assert second.id in problem
    assert "damaged, not JSON" in problem
    page = watch.page
    folder.record(first.id).write_text("{}")
    folder.record(third.id).write_text("[]")
    watch.refresh()
    assert watch.page is page  # the last whole report stays
    assert "no newer report: " in watch.state()["problems"][-1]


def test_an_analysis_that_fails_does_not_end_the_watch(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("vectors")

    watch = Watch(folder.path, retries=3)
    monkeypatch.setattr(watching, "read_content", fail)
    end(folder, cells_of(folder)[0])
    watch.refresh()
    assert watch.state()["problems"] == ["no newer report: KeyError: 'vectors'"]


def test_the_state_says_who_runs_what_and_how_long_it_takes(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed, interrupted, running = cells_of(folder)[:4]
    for cell, outcome in ((failed, "failed"), (interrupted, "stopped")):
        lease = folder.attempts.begin(cell.id, 0)
        assert lease is not None
        lease.close(outcome, "RuntimeError: out of luck")
    lease, sweep = folder.attempts.begin(running.id, 6), folder.join()
    end(folder, done)
    monkeypatch.setattr(watching, "seconds_since", lambda since: 120.0)

    state = Watch(folder.path, retries=3).state()

    assert state["ended"] == {"completed": 1}
    assert state["failed"] == {failed.id: "RuntimeError: out of luck"}
    assert state["interrupted"] == {interrupted.id: 0}
    assert (state["waiting"], state["sweeps"]) == (7, 1)
    (cell,) = state["running"]
    assert (cell["cell"], cell["step"], cell["seconds"], cell["pid"]) == (running.id, 6, 120.0, os.getpid())
    # One record in 120 s; what neither ended nor failed is to come, and wide cells take longer.
    costs = {cell.id: cost(cell.config) for cell in cells_of(folder)}
    to_come = sum(of_cell for cell, of_cell in costs.items() if cell not in (done.id, failed.id))
    assert len(set(costs.values())) > 1
    assert state["seconds_left"] == pytest.approx(120.0 * to_come / costs[done.id])
    assert lease is not None
    lease.close("stopped")
    sweep.close("done")


def test_bad_input_is_refused(folder: StudyFolder, tmp_path: Path) -> None:
    with refusal("holds no study"):
        Server(tmp_path / "nowhere")
    with refusal("--port 70000: must be from 0 (a free one) to 65535"):
        Server(folder.path, 70000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with refusal(f"--port {taken.getsockname()[1]}: in use"):
            Server(folder.path, taken.getsockname()[1])


def test_the_command_prints_its_address_and_ends_with_ctrl_c(folder: StudyFolder) -> None:
    command = [sys.executable, "-m", "lit_mult", "watch", str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        connection = HTTPConnection("127.0.0.1", urlsplit(address).port or 0, timeout=20)
        connection.request("GET", "/state.json")
        assert json.loads(connection.getresponse().read())["cells"] == 10
        process.send_signal(signal.SIGINT)  # which a shell's background jobs ignore
        try:
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, output, errors) == (0, "", "")

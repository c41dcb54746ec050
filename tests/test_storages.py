"""The same study over every kind of storage, two sweeps at once, and storages that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from refusals import refusal
from study_data import assert_undisturbed, outcomes
from tiny_runs import MakeStudy

from lit_mult.errors import UserError
from lit_mult.layout import find_records
from lit_mult.study import stack as stacks
from lit_mult.study.job import Job
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import open_storage
from lit_mult.study.sweep import sweep


@pytest.fixture
def study_dict(small_study_dict: MakeStudy) -> MakeStudy:
    """A study of 2 arms x 2 rates x 2 seeds: 8 cells of 2 steps."""
    return partial(small_study_dict, seeds=[0, 1], budget={"steps": 2, "batch_size": 4})


def trials(storage: str) -> Counter[tuple[str, str]]:
    """How many trials are in which state, by cell."""
    opened = open_storage(storage)
    found = [trial for study in opened.get_all_studies() for trial in opened.get_all_trials(study._study_id)]
    return Counter((trial.state.name, trial.user_attrs["cell"]) for trial in found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "elsewhere" / "shared.journal")


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


_GRPC_SERVER = """
import sys, optuna
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend

run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), host="localhost", port=int(sys.argv[2]))
"""


@pytest.fixture
def grpc_server(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a proxy server over a journal, in a process of its own: always of the same journal, at the same port."""
    pytest.importorskip("grpc")
    port, started = _free_port(), []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-c", _GRPC_SERVER, str(tmp_path / "journal"), str(port)]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        started[-1].url = f"grpc://localhost:{port}"  # type: ignore[attr-defined]
        return started[-1]

    yield start
    for server in started:
        server.kill()
        server.wait()


@pytest.fixture
def grpc(grpc_server: Callable[[], Any]) -> str:
    return str(grpc_server().url)


@pytest.fixture
def postgres() -> Iterator[str]:
    """A server of its own in a folder of its own, which listens on a socket there."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on the PATH")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # not below tmp_path, which nobody else may enter
    command: list[str] = []
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        command = ["runuser", "-u", "nobody", "--"]
        shutil.chown(folder, "nobody")

    def run(*arguments: str) -> None:
        # Not captured through pipes, which the server would inherit and keep open.
        with (folder.with_name(f"{folder.name}.log")).open("a") as log:
            subprocess.run([*command, *arguments], check=True, stdout=log, stderr=log, cwd="/", timeout=100)

    data = str(folder / "data")
    try:
        run("initdb", "--pgdata", data, "--username", "lit", "--auth", "trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        run("pg_ctl", "--pgdata", data, "--options", options, "--wait", "start")
        yield f"postgresql://lit@/postgres?host={folder}"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            run("pg_ctl", "--pgdata", data, "--mode", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.log").unlink()


@pytest.mark.parametrize("kind", ["journal", "sqlite", "grpc", pytest.param("postgres", marks=pytest.mark.slow)])
def test_a_study_is_the_same_over_every_storage(
    spec: StudySpec, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    storage = request.getfixturevalue(kind)
    result = sweep(spec, tmp_path / "out", workers=0, storage=storage)

    assert (result.ran, result.failures) == (8, {})
    assert trials(storage) == {("COMPLETE", path.stem): 1 for path in find_records(tmp_path / "out")}
    assert not (tmp_path / "out" / "optuna.journal").exists()
    assert_undisturbed(spec, tmp_path / "out")
    # A record that is lost is made again, and the storage takes it.
    find_records(tmp_path / "out")[5].unlink()
    assert sweep(spec, tmp_path / "out", workers=0, storage=storage).ran == 1
    assert outcomes(tmp_path / "out") == outcomes(tmp_path / "whole")


def test_a_study_moves_to_another_storage(spec: StudySpec, tmp_path: Path, sqlite: str) -> None:
    sweep(spec, tmp_path / "out", workers=0)

    assert sweep(spec, tmp_path / "out", workers=0, storage=sqlite).ran == 0
    assert trials(sqlite) == {("COMPLETE", path.stem): 1 for path in find_records(tmp_path / "out")}


_SWEEP = """
import json, sys
from lit_mult.study.files import load_study
from lit_mult.study.sweep import sweep

study, out, storage = sys.argv[1:]
print(json.dumps(sweep(load_study(study), out, workers=2, storage=storage).ran))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgres", "grpc"])
def test_two_sweeps_at_once_share_the_cells(
    study_dict: MakeStudy, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    storage = request.getfixturevalue(kind)
    study = study_dict(seeds=[0, 1, 2, 3], budget={"steps": 120, "batch_size": 4})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))

    command = [sys.executable, "-c", _SWEEP, str(path), str(tmp_path / "out"), storage]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in both]

    assert [process.returncode for process in both] == [0, 0], said
    assert not any(word in err for _, err in said for word in ("Traceback", "rror", "trying again")), said
    ran = [json.loads(out) for out, _ in said]
    assert sum(ran) == 16
    assert min(ran) > 0  # at once, not one after the other
    assert trials(storage) == {("COMPLETE", path.stem): 1 for path in find_records(tmp_path / "out")}
    assert_undisturbed(StudySpec.from_dict(study), tmp_path / "out")


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("postgresql://lit@localhost:1/lit", "connection failed"),
        ("postgresql://lit@no-such-host.invalid/lit", "no-such-host"),
        ("postgresql://lit@localhost:abc/lit", "abc"),
        ("grpc://localhost:1", "no server answers at localhost:1"),
        ("grpc://localhost:abc", "abc"),
        ("nosql://here", "nosql"),
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
        ("sqlite:///{tmp}/text.txt", "file is not a database"),
        ("{tmp}/text.txt", "is not an Optuna journal"),
        ("{tmp}/one_line", "is not an Optuna journal"),
        ("{tmp}/study.db", "is not an Optuna journal"),
        ("{tmp}", "Is a directory"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_in_one_line(
    study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, said: str
) -> None:
    if storage.startswith("grpc"):
        pytest.importorskip("grpc")
        real = optuna.storages.GrpcStorageProxy.wait_server_ready
        wait = lambda self, timeout: real(self, timeout=0.1)  # noqa: E731
        monkeypatch.setattr(optuna.storages.GrpcStorageProxy, "wait_server_ready", wait)
    files = tmp_path / "files"
    files.mkdir()
    (files / "text.txt").write_text("mine\n" * 300)
    (files / "one_line").write_text("mine, and without an end of its line")
    open_storage(f"sqlite:///{files / 'study.db'}")
    before = {path.name: path.read_bytes() for path in files.iterdir()}

    spec = StudySpec.from_dict(study_dict(arms={"muP": {}}, nuisance={}, seeds=[0]))

    with refusal(said):
        sweep(spec, tmp_path / "out", workers=0, storage=storage.format(tmp=files))

    assert {path.name: path.read_bytes() for path in files.iterdir()} == before  # not the user's to lose
    assert not (tmp_path / "out" / "sweeps").exists() or not list((tmp_path / "out" / "sweeps").iterdir())
    assert sweep(spec, tmp_path / "out", workers=0).ran == 1  # the folder can be swept over another storage


def test_a_storage_belongs_to_one_folder(study_dict: MakeStudy, tmp_path: Path, sqlite: str) -> None:
    spec = StudySpec.from_dict(study_dict())
    sweep(spec, tmp_path / "out", workers=0, storage=sqlite)

    with pytest.raises(UserError, match=r"--storage: holds tiny/muP of another results folder"):
        sweep(spec, tmp_path / "other", workers=0, storage=sqlite)

    assert not list((tmp_path / "other" / "sweeps").iterdir())
    other = StudySpec.from_dict(study_dict(name="another"))  # another study may share it
    assert sweep(other, tmp_path / "another", workers=0, storage=sqlite).ran == 8


def test_a_server_that_goes_away_ends_the_sweep_in_one_line(
    spec: StudySpec, tmp_path: Path, grpc_server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, server = spec, grpc_server()
    real = stacks.run_job

    def third_time_unlucky(job: Job, post: Any, stop: Any) -> Any:
        if len(find_records(tmp_path / "out")) == 2:
            server.kill()
            server.wait()
        return real(job, post, stop)

    monkeypatch.setattr(stacks, "run_job", third_time_unlucky)
    with pytest.raises(UserError) as error:
        sweep(spec, tmp_path / "out", workers=0, storage=server.url)

    assert str(error.value).startswith(f"storage {server.url}: ")
    assert "\n" not in str(error.value)
    again = grpc_server()
    assert sweep(spec, tmp_path / "out", workers=0, storage=again.url).ran == 5  # the third has its record
    assert {state for state, _ in trials(again.url)} <= {"COMPLETE", "FAIL"}

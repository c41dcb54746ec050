"""Sweeps on Ray: what one process gives, to the bit, also when a node is lost or the sweep is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from study_data import losses, states
from tiny_runs import MakeStudy

from lit_mult.errors import Interrupted, UserError
from lit_mult.layout import find_records, step_of
from lit_mult.schema import RunRecord
from lit_mult.study import executors
from lit_mult.study.attempts import Attempt
from lit_mult.study.folder import StudyFolder
from lit_mult.study.search import Ticket
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.folder import RunFolder


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray, which neither writes outside a folder of its own nor listens to, or calls, another machine."""
    folder = tempfile.mkdtemp(dir="/tmp")  # a socket's path must be short
    settings = {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",  # or a token is written to the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",  # the default gives way to whatever else a machine does
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield pytest.importorskip("ray")
    sys.modules["ray"].shutdown()
    signal.signal(signal.SIGTERM, handler)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(ray: Any) -> Iterator[Any]:
    """A cluster of a head, where the driver is, and another node, with a CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # a folder that went while it was looked through
            if found := condition():
                return found
        time.sleep(0.02)
    raise TimeoutError


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # has ended
        return 0


@pytest.mark.slow
def test_a_sweep_on_ray_gives_what_one_process_gives(ray: Any, spec: StudySpec, tmp_path: Path) -> None:
    result = sweep(spec, tmp_path / "ray", workers=2, executor="ray")

    assert (result.ran, result.failures) == (10, {})
    assert not ray.is_initialized()
    sweep(spec, tmp_path / "here", workers=0)
    assert losses(tmp_path / "ray") == losses(tmp_path / "here")  # to the bit: one thread each


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
def test_a_lost_node_costs_no_cell(cluster: Any, study_dict: MakeStudy, tmp_path: Path) -> None:
    study = study_dict(budget={"steps": 250, "batch_size": 4})
    study["base"]["train"]["checkpoint_every"] = 20
    spec = StudySpec.from_dict(study)
    folder = StudyFolder(tmp_path / "ray")
    (node,) = cluster.worker_nodes
    raylet = node.all_processes["raylet"][0].process.pid

    def begun_there() -> Attempt | None:
        """An attempt under way on the node, with a checkpoint and long to go, when other cells are done."""
        for cell in folder.attempts.cells() if find_records(folder.path) else ():
            checkpoint = RunFolder(folder.cell(cell).path).newest_checkpoint()
            attempt = folder.attempts.of(cell)[-1:]
            if checkpoint and step_of(checkpoint) < 150 and attempt and parent(attempt[0].pid) == raylet:
                return attempt[0]
        return None

    lost = []

    def lose() -> None:
        attempt = wait_for(begun_there)
        for process in (raylet, attempt.pid):  # at once, as with a machine: the one would follow the other in a while
            os.kill(process, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        lost.append(attempt.cell)

    loser = threading.Thread(target=lose)
    loser.start()
    result = sweep(spec, folder.path, executor="ray", address=cluster.address)
    loser.join()

    assert (result.ran, result.failures) == (10, {})
    assert states(folder.journal) == {"COMPLETE": 10}
    assert folder.record(lost[0]).is_file()
    assert not any(folder.attempts.folder.iterdir())
    sweep(spec, tmp_path / "here", workers=0)
    assert losses(folder.path) == losses(tmp_path / "here")


@pytest.mark.slow
def test_a_sweep_on_ray_that_is_stopped_goes_on_from_a_checkpoint(
    ray: Any, study_dict: MakeStudy, tmp_path: Path
) -> None:
    arms = {"vectors": {"multipliers": "vector", "optim.lr": 0.03}}
    study = study_dict(arms=arms, factors={"model.d_model": [16]}, budget={"steps": 1500, "batch_size": 4})
    spec = StudySpec.from_dict(study)
    folder = StudyFolder(tmp_path / "ray")

    def stop() -> None:
        (cell,) = wait_for(lambda: list(folder.attempts.cells()))
        wait_for(lambda: folder.cell(cell).path.is_dir())
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted):
        sweep(spec, folder.path, executor="ray")
    stopper.join()

    (checkpoint,) = folder.path.glob("cells/*/checkpoints/*")
    assert 0 < int(checkpoint.stem.removeprefix("step=")) < 1500
    (attempt,) = folder.attempts.of(checkpoint.parts[-3])
    assert attempt.state == "stopped"
    assert "RUNNING" not in states(folder.journal)
    assert sweep(spec, folder.path, executor="ray").ran == 1
    sweep(spec, tmp_path / "here", workers=0)
    assert losses(folder.path) == losses(tmp_path / "here")


@pytest.mark.slow
def test_a_cell_on_ray_hears_that_it_is_pruned(
    ray: Any, study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_dict(
        arms={"muP": {"multipliers": "fixed"}},
        factors={"model.d_model": [8]},
        nuisance={"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        sampler="random",
        pruner={"name": "median"},
        budget={"steps": 40, "batch_size": 4, "trials": 2},
    )
    study["base"]["train"]["eval_every"] = 10
    curves: list[Any] = []

    def verdict(ticket: Ticket, curve: list[tuple[int, float]]) -> bool:
        curves.append(curve)
        return len(curve) == 2

    monkeypatch.setattr(Ticket, "should_prune", verdict)
    result = sweep(StudySpec.from_dict(study), tmp_path / "ray", workers=1, executor="ray")

    assert (result.ran, result.pruned) == (2, 2)
    records = [RunRecord.read(path) for path in find_records(tmp_path / "ray")]
    assert [record.steps for record in records] == [20, 20]
    assert len(curves) == 4


@pytest.mark.slow
def test_no_cluster_where_the_address_says_is_told_in_one_line(ray: Any, spec: StudySpec, tmp_path: Path) -> None:
    for address in ("auto", "nowhere", "127.0.0.1:9"):
        with pytest.raises(UserError, match=rf"^--address {address}: cannot connect to a Ray cluster \(.+\)$"):
            sweep(spec, tmp_path / "out", executor="ray", address=address)


def test_an_executor_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def connect(workers, cells, trainer, address): ...\n")
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path)])

    assert executors.names() == ["in_process", "local", "mine", "ray"]
    assert executors.load("mine").__module__ == "lit_mult.study.executors.mine"
    with pytest.raises(UserError, match="--executor nope: must be one of in_process, local, mine, ray"):
        executors.load("nope")


def test_an_address_needs_the_ray_executor(spec: StudySpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--address auto: needs --executor ray"):
        sweep(spec, tmp_path / "out", address="auto")


def test_ray_not_installed_is_told_in_one_line(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(UserError, match=r"ray is not installed; pip install 'lit-mult\[ray\]'"):
        sweep(spec, tmp_path / "out", executor="ray")

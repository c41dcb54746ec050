"""Leases and attempts: who lives, who may begin, and when a cell is given up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lit_mult.study import lease as leases
from lit_mult.study.attempts import Attempts
from lit_mult.study.lease import LEASE_SECONDS, Lease, is_alive, machine, read_lease

# Holds a lease until it is killed, and says when it has it.
_HOLDER = """
import sys
from pathlib import Path
from lit_mult.study.attempts import Attempts

lease = Attempts(Path(sys.argv[1])).begin("cell", int(sys.argv[2]))
print("held" if lease else "refused", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that begins an attempt at the cell and holds it."""
    started = []

    def start(from_step: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, str(tmp_path), str(from_step)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _on_file(folder: Path, number: int, *, from_step: int = 0, ended: str = "", of: str = "", reason: str = "") -> Path:
    """Write an attempt as one of another time left it: `ended` is how, none a death."""
    content = {"machine": of or machine(), "pid": 1, "since": "2026-01-01T00:00:00+00:00", "from_step": from_step}
    path = folder / f"cell.{number}.json"
    path.write_text(json.dumps(content | ({"ended": ended, "reason": reason} if ended else {})))
    return path


def test_a_lease_lives_until_it_is_closed(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "a.json", {"from_step": 7})

    assert is_alive(lease.path)
    assert read_lease(lease.path)["from_step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]  # the scratch file has gone
    with pytest.raises(FileExistsError):
        Lease(tmp_path / "a.json", {})
    lease.close("done", "at last")

    assert not is_alive(lease.path)
    assert (read_lease(lease.path)["ended"], read_lease(lease.path)["reason"]) == ("done", "at last")
    assert not is_alive(tmp_path / "never.json")


def test_a_lease_dies_with_its_process(holder: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = holder(from_step=4)
    attempts = Attempts(tmp_path)

    (attempt,) = attempts.of("cell")
    assert (attempt.state, attempt.number, attempt.pid, attempt.from_step) == ("running", 1, process.pid, 4)
    assert attempts.is_running("cell")
    assert attempts.begin("cell", 4) is None  # refused while it runs
    process.kill()
    process.wait()

    assert not attempts.is_running("cell")
    assert [one.state for one in attempts.of("cell")] == ["died"]
    second = attempts.begin("cell", 8)
    assert second is not None
    assert second.path.name == "cell.2.json"
    assert [(one.state, one.from_step) for one in attempts.of("cell")] == [("died", 4), ("running", 8)]
    second.close("stopped")


def test_a_stopped_process_still_holds_its_lease(holder: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Stood still, not dead: on its own machine the lock tells, however old the file."""
    process = holder()
    process.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / "cell.1.json", (0, 0))

    assert Attempts(tmp_path).is_running("cell")
    assert Attempts(tmp_path).begin("cell", 0) is None


def test_attempts_are_numbered_and_forgotten_together(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "attempts")
    for number in range(1, 12):  # beyond 9: by number, not by name
        lease = attempts.begin("cell", number)
        assert lease is not None
        assert lease.path.name == f"cell.{number}.json"
        lease.close("stopped")
    other = attempts.begin("cell-2", 0)  # a cell whose name begins alike
    assert other is not None
    other.close("stopped")

    assert [one.number for one in attempts.of("cell")] == list(range(1, 12))
    assert list(attempts.cells()) == ["cell", "cell-2"]
    attempts.clear("cell")
    assert list(attempts.cells()) == ["cell-2"]


def _race(folder: Path, mine: Connection) -> None:
    attempts = Attempts(folder)
    for cell in iter(mine.recv, None):
        lease = attempts.begin(cell, 0)
        mine.send(lease is not None)
        mine.recv()  # both have answered
        if lease is not None:
            lease.close("done")


def test_of_two_processes_that_want_a_cell_exactly_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    racers = [context.Process(target=_race, args=(tmp_path, theirs), daemon=True) for _, theirs in pipes]
    for racer in racers:
        racer.start()
    ours = [mine for mine, _ in pipes]

    won = []
    for number in range(200):
        # Half of the cells have an attempt on file that has died: then they race for the second.
        if number % 2:
            (tmp_path / f"cell{number}.1.json").write_text(json.dumps({"machine": machine(), "pid": 1}))
        for mine in ours:
            mine.send(f"cell{number}")
        won.append([mine.recv() for mine in ours])
        for mine in ours:
            mine.send("go on")
    for mine in ours:
        mine.send(None)
    for racer in racers:
        racer.join(10)

    assert [sum(pair) for pair in won] == [1] * 200
    assert len(list(tmp_path.iterdir())) == 200 + 100  # no third attempt, no scratch file


def test_deaths_from_the_same_step_are_counted(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    assert attempts.given_up("cell", retries=0) is None

    for number in (1, 2):
        _on_file(tmp_path, number, from_step=40)
    assert attempts.given_up("cell", retries=2) is None
    _on_file(tmp_path, 3, from_step=40)
    assert attempts.given_up("cell", retries=2) == "its process died 3 times after step 40"
    assert attempts.given_up("cell", retries=3) is None


def test_progress_forgives_the_deaths_before(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for number, step in enumerate([0, 0, 0, 20, 20], start=1):
        _on_file(tmp_path, number, from_step=step)

    assert attempts.given_up("cell", retries=2) is None
    _on_file(tmp_path, 6, from_step=20)
    assert attempts.given_up("cell", retries=2) == "its process died 3 times after step 20"


def test_stops_on_request_are_not_deaths(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for number, ended in enumerate(["", "stopped", "", "stopped", "stopped"], start=1):
        _on_file(tmp_path, number, ended=ended)

    assert [one.state for one in attempts.of("cell")] == ["died", "stopped", "died", "stopped", "stopped"]
    assert attempts.given_up("cell", retries=2) is None
    _on_file(tmp_path, 6)
    assert attempts.given_up("cell", retries=2) == "its process died 3 times after step 0"


def test_a_failure_of_its_own_is_final(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    _on_file(tmp_path, 1, ended="failed", reason="RuntimeError: out of luck")

    assert attempts.given_up("cell", retries=9) == "RuntimeError: out of luck"
    _on_file(tmp_path, 2)  # tried again all the same, and died
    assert attempts.given_up("cell", retries=9) is None


@pytest.mark.parametrize("content", ["", "{", '{"machine": ', "[1]", "\x00\x00"])
def test_a_damaged_lease_is_one_of_the_dead(tmp_path: Path, content: str) -> None:
    (tmp_path / "cell.1.json").write_text(content)
    attempts = Attempts(tmp_path)

    (attempt,) = attempts.of("cell")
    assert (attempt.state, attempt.from_step) == ("died", 0)
    assert attempts.given_up("cell", retries=0) is not None
    lease = attempts.begin("cell", 0)
    assert lease is not None
    assert lease.path.name == "cell.2.json"
    lease.close("done")


def test_a_lease_of_another_machine_is_judged_by_its_age(tmp_path: Path) -> None:
    path = _on_file(tmp_path, 1, of="elsewhere/12345678")
    attempts = Attempts(tmp_path)

    assert is_alive(path)
    assert attempts.begin("cell", 0) is None
    old = time.time() - LEASE_SECONDS - 5
    os.utime(path, (old, old))
    assert not is_alive(path)
    assert [one.state for one in attempts.of("cell")] == ["died"]
    lease = attempts.begin("cell", 0)
    assert lease is not None
    lease.close("done")


def test_a_lease_of_another_machine_that_was_closed_is_not_alive(tmp_path: Path) -> None:
    assert not is_alive(_on_file(tmp_path, 1, of="elsewhere/12345678", ended="stopped"))


def test_a_holder_keeps_its_lease_young_and_sees_that_it_was_overtaken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    lease = Attempts(tmp_path).begin("cell", 0)
    assert lease is not None
    os.utime(lease.path, (0, 0))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not lease.path.stat().st_mtime:
        time.sleep(0.01)

    assert time.time() - lease.path.stat().st_mtime < 5
    assert not lease.lost
    _on_file(tmp_path, 2, of="elsewhere/12345678")  # whoever took this process for dead
    while time.monotonic() < deadline and not lease.lost:
        time.sleep(0.01)
    assert lease.lost
    lease.close("stopped")
    assert Attempts(tmp_path).is_running("cell")

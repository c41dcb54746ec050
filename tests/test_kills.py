"""A study outlives a full disk and its killer, with the records that an undisturbed one has."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from study_data import assert_undisturbed, outcomes, states, workers_of
from test_recovery import study_dict  # noqa: F401 - a fixture
from tiny_runs import MakeStudy

from lit_mult.study import lease as leases
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep

# Kills a sweep before the first change of a file, before the second and so on, and sweeps to the end after each. Prints
# the changes before which it did and, for each study, what can be told of it. Forks, as the imports take longest.
_KILLED_AT_EVERY_CHANGE = r"""
import json, os, sys
from pathlib import Path
import lit_mult.training.run
from lit_mult.study import storage
from lit_mult.study.files import load_study
from lit_mult.study.sweep import sweep

spec, folder = load_study(sys.argv[1]), Path(sys.argv[2])
storage._LOCK_SECONDS = 1  # of a killed sweep
left, killed = None, None

def count(event, arguments):
    global left
    changes = event in ("os.link", "os.symlink", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(folder)):
        changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if left is not None and changes:
        left -= 1
        if left < 0:
            os.write(killed, f"{event} {arguments[0]}".encode())
            os._exit(9)

def forked(out, changes=None):
    global left
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{out}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        left = changes
        code = 70
        try:
            sweep(spec, out, workers=0)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

sys.addaudithook(count)
points = []
while not points or points[-1]["killed"]:
    out = folder / str(len(points))
    read, killed = os.pipe()
    codes = [forked(out, len(points))]
    os.close(killed)
    if codes[0]:
        codes.append(forked(out))
    points.append({"killed": os.read(read, 1000).decode(), "codes": codes})
print(json.dumps(points))
"""


@pytest.mark.slow
def test_a_sweep_may_be_killed_before_any_change_of_a_file(study_dict: MakeStudy, tmp_path: Path) -> None:  # noqa: F811
    study = study_dict(arms={"vectors": {"multipliers": "vector"}}, nuisance={}, budget={"steps": 10, "batch_size": 4})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    (tmp_path / "outs").mkdir()

    command = [sys.executable, "-W", "ignore", "-c", _KILLED_AT_EVERY_CHANGE, str(path), str(tmp_path / "outs")]
    points = json.loads(subprocess.run(command, check=True, timeout=1500, stdout=subprocess.PIPE).stdout)

    assert len(points) > 60
    sweep(StudySpec.from_dict(study), tmp_path / "whole", workers=0)
    for number, point in enumerate(points):
        out = tmp_path / "outs" / str(number)
        said = out.with_name(f"{number}.log").read_text()
        assert point["codes"] == ([9, 0] if point["killed"] else [0]), (point, said)
        assert "Traceback" not in said, (point, said)
        assert outcomes(out) == outcomes(tmp_path / "whole"), point
        assert not list(out.rglob("*.damaged")), point
        left = [path for folder in ("attempts", "sweeps", "cells") for path in (out / folder).glob("[!.]*")]
        assert not left, (point, left)
        found = states(out / "optuna.journal")
        assert (found.pop("COMPLETE"), found.keys() <= {"FAIL"}) == (1, True), point


# A full disk

# Runs in a mount namespace of its own: a study on a small file system that becomes full at one moment after the other,
# and is emptied again after each. Forks, as the imports take longest.
_FULL_DISK = r"""
import importlib, json, os, shutil, subprocess, sys, zipfile
from pathlib import Path
import lit_mult.cli, lit_mult.training.run
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord

study, disk, kept = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
out, journal, ballast = disk / "out", disk / "out" / "optuna.journal", disk / "ballast"
os.environ["LIT_MULT_CACHE"] = str(disk / "cache")
lit_mult.cli._print_report = lambda folder: None

def fill_before(module, name, moment=lambda *arguments: True):
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    def wrapped(*arguments, **options):
        if not ballast.exists() and moment(*arguments):
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return real(*arguments, **options)
    setattr(owner, name, wrapped)

MOMENTS = {
    "cache": ("lit_mult.data.cache", "_build"),
    "plan": ("lit_mult.study.folder", "StudyFolder.claim"),
    "sweep": ("lit_mult.study.folder", "StudyFolder.join"),
    "attempt": ("lit_mult.study.attempts", "Attempts.begin"),
    "config": ("lit_mult.training.folder", "RunFolder.claim"),
    "checkpoint": ("lit_mult.training.checkpoints", "save_checkpoint"),
    "record": ("lit_mult.schema", "RunRecord.write"),
    # Where a line crosses the end of a block, so that it is written in part.
    "journal": (
        "optuna.storages.journal",
        "JournalFileBackend.append_logs",
        lambda backend, logs: journal.stat().st_size % 4096 + len(json.dumps(logs)) > 4200,
    ),
}

def sweep(moment, log):
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
        if moment:
            fill_before(*moment)
        code = 70
        try:
            code = lit_mult.cli.main(["sweep", study, "--out", str(out), "--workers", "0"])
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
for name, moment in {**MOMENTS, "room": None}.items():
    seen = {
        "code": sweep(moment, kept / name),
        "filled": ballast.exists(),
        "checkpoints": [zipfile.is_zipfile(path) for path in out.glob("cells/*/checkpoints/step*")],
        "records": [RunRecord.read(path).status for path in find_records(out)],
        "torn_journal": journal.exists() and not journal.read_bytes().endswith(b"\n"),
        "left": [str(path) for folder in ("cells", "attempts", "sweeps") for path in (out / folder).glob("*")],
        "damaged": [str(path) for path in out.rglob("*.damaged")],
    }
    (kept / f"{name}.seen").write_text(json.dumps(seen))
    ballast.unlink(missing_ok=True)
shutil.copytree(out / "records", kept / "records")
"""


def test_a_full_disk_is_one_line_and_nothing_lost(study_dict: MakeStudy, tmp_path: Path) -> None:  # noqa: F811
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    try:
        mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(disk)]
        subprocess.run(mount, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("a small file system needs unshare, of Linux")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error.stderr.strip()}")
    study, dictionary = tmp_path / "study.yaml", study_dict(seeds=[0, 1])
    study.write_text(yaml.safe_dump(dictionary))

    command = ["unshare", "-rm", sys.executable, "-c", _FULL_DISK, str(study), str(disk), str(kept)]
    subprocess.run(command, check=True, timeout=200)

    seen = {path.stem: json.loads(path.read_text()) for path in kept.glob("*.seen")}
    for moment in ("cache", "plan", "sweep", "attempt", "config", "checkpoint", "record", "journal"):
        said = (kept / moment).read_text()
        lines = [line for line in said.splitlines() if "elapsed" not in line]
        assert seen[moment]["filled"], moment
        assert (seen[moment]["code"], len(lines)) == (2, 1), said
        assert lines[0].startswith("lit-mult sweep: ")
        assert "no space left" in lines[0].lower()
        assert str(disk) in lines[0]
        assert all(seen[moment]["checkpoints"]), moment
        assert seen[moment]["damaged"] == []
    assert seen["journal"]["torn_journal"]
    assert seen["room"]["code"] == 0, (kept / "room").read_text()
    assert (seen["room"]["left"], seen["room"]["damaged"]) == ([], [])
    assert_undisturbed(StudySpec.from_dict(dictionary), kept)


# The killer


class Study:
    """A sweep on the command line that is started again and again, with what it says on stderr."""

    def __init__(self, study: Path, folder: Path, options: list[str]) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "lit_mult", "sweep", str(study), "--out", str(folder / "out")]
        self.command = [*command, "--workers", "2", "--retries", "20", *options]
        self.codes: list[int] = []
        self.resumed: set[tuple[str, int]] = set()
        """Attempts that were seen to begin from a checkpoint: cell and step."""
        self._stderr: IO[bytes] = (folder / "stderr").open("ab")
        self.start()

    def start(self) -> None:
        # A shell may have started the tests in the background, where SIGINT is ignored, and children inherit that.
        heard: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdout=null, stderr=self._stderr, cwd=self.folder, **heard)

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def records(self) -> int:
        return len(list((self.folder / "out" / "records").glob("*.json")))

    def ended(self) -> bool:
        """Whether the command has ended; notes what it left, and which attempts go on from a checkpoint."""
        for path in (self.folder / "out" / "attempts").glob("[!.]*.json"):
            if step := leases.read_lease(path).get("from_step"):
                self.resumed.add((path.name, step))
        return self.process.poll() is not None

    def hears_sigint(self) -> bool:
        """Whether Python has come to the command; before, its own start-up would print a traceback."""
        try:
            return "pydantic_core" in Path(f"/proc/{self.process.pid}/maps").read_text()
        except OSError:
            return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr.close()


# Who is hit by what, in a random order: 24 blows, most of them deadly.
_BLOWS = [
    *[("command", signal.SIGKILL)] * 5,
    *[("command", signal.SIGTERM)] * 4,
    *[("command", signal.SIGINT)] * 4,
    *[("worker", signal.SIGKILL)] * 7,
    *[("worker", signal.SIGTERM)] * 3,
    *[("worker", signal.SIGINT)] * 1,
]


def _survive(study: Study, chance: random.Random, seconds: float) -> None:
    """Let a study be hit by all the blows, at random times, starting it again whenever it has ended."""
    blows = _BLOWS.copy()
    chance.shuffle(blows)
    deadline = time.monotonic() + seconds

    def wait(limit: float, records: int) -> bool:
        """Wait for the first of so many seconds, so many records in all, and the end of the command."""
        until = time.monotonic() + limit
        while not study.ended():
            if time.monotonic() >= until or study.records() >= records:
                return True
            assert time.monotonic() < deadline, f"{len(blows)} blows left, {study.records()} records: {study.said}"
            time.sleep(0.02)
        return False

    while True:
        # Soon after the blow before, some time after, or in the midst of cells; and however fast the machine, before
        # the study's end.
        pause = chance.choice([chance.uniform(0, 0.5), chance.uniform(0, 10), seconds, seconds])
        alive = wait(pause, study.records() + chance.choice([1, 2])) if blows else wait(seconds, sys.maxsize)
        if not alive or not wait(chance.uniform(0, 0.5), sys.maxsize):
            study.codes.append(study.process.returncode)
            if study.process.returncode == 0:
                break
            study.start()
            continue
        whom, what = blows[-1]
        victims = [study.process.pid] if whom == "command" else workers_of(study.process.pid)
        if not victims or (what == signal.SIGINT and whom == "command" and not study.hears_sigint()):
            continue  # still starting
        try:
            os.kill(chance.choice(victims), what)
        except ProcessLookupError:
            continue
        blows.pop()
    assert not blows, f"the study ended with {len(blows)} blows left: make it longer"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_study_survives_its_killer(study_dict: MakeStudy, tmp_path: Path, storage: str) -> None:  # noqa: F811
    # 72 cells of a second or so, with checkpoints that a stopped or killed one goes on from.
    base = study_dict()["base"]
    base["train"]["checkpoint_every"] = 20
    nuisance = {"optim.lr": {"log2": [-10, -9, -8, -7, -6, -5, -4, -3, -2]}}
    dictionary = study_dict(base=base, nuisance=nuisance, seeds=[0, 1, 2, 3], budget={"steps": 150, "batch_size": 4})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(dictionary))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = Study(path, tmp_path, ["--storage", url] if storage == "sqlite" else [])
    try:
        _survive(study, random.Random(0), seconds=1500)
    finally:
        study.close()

    assert set(study.codes) <= {0, 130, -signal.SIGKILL, -signal.SIGTERM}, study.said
    assert "Traceback" not in study.said
    assert "Exception ignored" not in study.said
    assert study.resumed
    out = tmp_path / "out"
    assert_undisturbed(StudySpec.from_dict(dictionary), out)
    assert len(outcomes(out)) == 72
    assert not list(out.rglob("*.damaged"))
    left = [path for folder in ("attempts", "sweeps", "cells") for path in (out / folder).iterdir()]
    assert not [path for path in left if not path.name.startswith(".")]
    found = states(url if storage == "sqlite" else out / "optuna.journal")
    assert found.keys() <= {"COMPLETE", "FAIL"}
    assert found["COMPLETE"] >= 72

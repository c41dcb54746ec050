"""`lit-mult doctor` and `lit-mult --version`: what this machine has, what is broken, what pays."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_mult.cli import machine, main

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit code and JSON of `doctor` in an empty folder, with facts of the machine replaced."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "speed", lambda: {"float32": 100.0, "bfloat16": 300.0})

    def run(**facts: Any) -> tuple[int, dict[str, Any]]:
        for name, value in facts.items():
            monkeypatch.setattr(machine, name, lambda value=value: value)
        code = main(["doctor", "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_the_version_names_torch_its_device_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    device = r".+" if torch.cuda.is_available() else rf"CPU, {torch.get_num_threads()} threads"
    python = re.escape(platform.python_version())
    assert re.fullmatch(rf"lit-mult \d\S* · torch \d\S* \({device}\) · Python {python}\n", said)


def test_the_version_names_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100", "NVIDIA H100", "NVIDIA A100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert "(2 x NVIDIA H100, NVIDIA A100)" in machine.headline()


def test_memory_that_the_system_does_not_tell_is_left_out(capsys: pytest.CaptureFixture[str], doctor: Doctor) -> None:
    code, found = doctor(processor=machine.processor() | {"free_memory_gib": float("nan")})
    assert (code, found["processor"]["free_memory_gib"]) == (0, None)
    assert main(["doctor"]) == 0
    assert re.search(r"^memory +[\d.]+ GiB$", capsys.readouterr().out, re.M)


def test_a_machine_that_passes_its_tests_is_well(doctor: Doctor, tmp_path: Path) -> None:
    code, found = doctor()

    assert (code, found["problems"]) == (0, [])
    assert found["versions"]["torch"] == {"version": torch.__version__, "supported": ">=2.9", "fits": True}
    assert found["versions"]["python"]["supported"] == ">=3.11"
    assert found["results"]["path"] == str(tmp_path / "results")
    assert found["cache"]["path"] == os.environ["LIT_MULT_CACHE"]
    assert found["offline"] is True  # as the tests are
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_gives_exit_code_1(doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"torch": {"version": "2.0.1", "supported": ">=2.9", "fits": False}}
    code, found = doctor(
        versions=old,
        token_cache={"path": "/cache", "size_gib": 0.0, "writable": False, "free_gib": 9.0},
        results={"path": "/full/results", "writable": True, "free_gib": 0.25},
    )

    assert code == 1
    assert found["problems"] == [
        "torch 2.0.1: must be >=2.9: pip install 'torch>=2.9'",
        "/cache: cannot be written; set LIT_MULT_CACHE to another folder",
        "/full/results: 0.2 GiB are left; free some, or give --out another folder",
    ]
    assert main(["doctor"]) == 1
    assert [f"broken: {line}" in capsys.readouterr().out for line in found["problems"][:1]] == [True]


def test_a_folder_without_permission_cannot_be_written(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    code, found = doctor()
    assert code == 1
    assert [line.split(": ")[1] for line in found["problems"]] == [
        "cannot be written; set LIT_MULT_CACHE to another folder",
        "cannot be written; give --out another folder",
    ]


def test_advice_fits_the_machine(doctor: Doctor) -> None:
    quiet = machine.processor() | {"load": 0.0, "cores": 2}
    gpu = [{"name": "H100", "memory_gib": 80.0, "bf16": True}]
    lacking: dict[str, list[str]] = {extra: [] for extra in machine.EXTRAS} | {"ray": ["ray"]}

    _, cpu_only = doctor(processor=quiet, gpus=[], compiler=None, missing_of_extras=lacking)
    _, with_gpu = doctor(gpus=gpu, compiler="/usr/bin/g++")
    _, slow_bf16 = doctor(speed={"float32": 300.0, "bfloat16": 60.0})
    _, busy = doctor(processor=quiet | {"load": 8.0})

    assert any("a worker of one thread on each core" in line and "--vectorize 9" in line for line in cpu_only["advice"])
    assert any("it needs a C++ compiler" in line for line in cpu_only["advice"])
    assert any("3.0 times as fast" in line and "bf16-mixed" in line for line in cpu_only["advice"])
    assert any(line.startswith("pip install 'lit-mult[ray]'") for line in cpu_only["advice"])
    assert any("--vectorize auto" in line for line in with_gpu["advice"])
    assert not any("C++" in line for line in with_gpu["advice"])
    assert any("leave --trainer.precision at 32-true" in line for line in slow_bf16["advice"])
    assert any("load 8 on 2 cores" in line for line in busy["advice"])


def test_an_extra_is_measured_by_all_that_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "0.1" if name in ("safetensors", "ray") else real(name))
    missing = machine.missing_of_extras()

    # eval is made of export, and paper of eval; nothing else needs safetensors.
    for extra, lacking in missing.items():
        assert ("safetensors" in lacking) == (extra in ("export", "eval", "paper"))
        assert ("ray" in lacking) == (extra == "ray")


def test_the_speed_of_products_is_that_of_their_flops() -> None:
    measured = machine.speed()
    assert measured.keys() == {"float32", "bfloat16"}
    # 2^28 operations in one product: between a slow core under load, and any machine there is.
    assert all(0.1 < rate < 1e7 for rate in measured.values())

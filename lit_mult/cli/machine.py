"""What this machine has for lit-mult: versions, processors, speed, extras, folders. Plain values; nothing is kept."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    "data": "data sets of Hugging Face and diagnostics in parquet",
    "export": "export to and import from Hugging Face",
    "eval": "evaluate, through lm-eval",
    "paper": "the paper's seven benchmarks",
    "ray": "sweep --executor ray",
    "postgresql": "sweep --storage postgresql://...",
    "dashboard": "optuna-dashboard",
    "notebooks": "JupyterLab, for the notebooks",
}
"""Extra -> what it brings."""
_GIB = 2**30
_SIDE = 512
"""Of the square matrices whose product is timed."""
_REPEATS, _SECONDS = 10, 0.3
"""Fewest products that are timed, and the time that they take together at least; the first ones start threads."""


def headline() -> str:
    """`lit-mult 0.1.0 · torch 2.13.0 (CPU, 2 threads) · Python 3.11.7`; with GPUs their names in place of the CPU."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counts = {name: names.count(name) for name in names}
    devices = [f"{count} x {name}" if count > 1 else name for name, count in counts.items()]
    device = ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads"
    own, of_torch = _version("lit-mult") or "unknown", torch.__version__.removesuffix("+cpu")
    return f"lit-mult {own} · torch {of_torch} ({device}) · Python {platform.python_version()}"


def versions() -> dict[str, dict[str, Any]]:
    """Package -> its version, the supported range, and whether the one lies in the other; Python among them."""
    return {
        requirement.name: {
            "version": _version(requirement.name),
            "supported": str(requirement.specifier),
            "fits": _fits(requirement),
        }
        for requirement in _requirements("")
    }


def missing_of_extras() -> dict[str, list[str]]:
    """Extra -> those of its packages that are not installed, or not in the supported range."""
    return {
        extra: [requirement.name for requirement in _requirements(extra) if not _fits(requirement)] for extra in EXTRAS
    }


def processor() -> dict[str, Any]:
    """Name, cores of this process, torch's threads, load, instructions for bfloat16, memory in GiB (free: unused)."""
    import torch

    from lit_mult.study.machine import cores
    from lit_mult.training.recording import describe_device

    return {
        "name": describe_device(torch.device("cpu")).removeprefix("cpu: ").rpartition(",")[0],
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "bf16_instructions": sorted({"amx_bf16", "avx512_bf16", "bf16"} & _cpu_flags()),
        "memory_gib": _memory("SC_PHYS_PAGES"),
        "free_memory_gib": _memory("SC_AVPHYS_PAGES"),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB, and whether bfloat16 is supported, of every visible GPU."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    # bfloat16 came with compute capability 8.0.
    return [{"name": gpu.name, "memory_gib": gpu.total_memory / _GIB, "bf16": gpu.major >= 8} for gpu in found]


def speed() -> dict[str, float]:
    """Type -> GFLOP/s of the product of two square matrices, the best of several.

    On the first GPU where there is one.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8 * _SIDE if device == "cuda" else _SIDE
    found = {}
    for name in ("float32", "bfloat16"):
        x = torch.ones(side, side, dtype=getattr(torch, name), device=device)
        times: list[float] = []
        while len(times) < _REPEATS or sum(times) < _SECONDS:
            start = time.perf_counter()
            x @ x
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[name] = 2 * side**3 / min(times) / 1e9
    return found


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile uses."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def token_cache() -> dict[str, Any]:
    """Where the token cache is, and see `_folder`; its size in GiB."""
    from lit_mult.config import DataConfig
    from lit_mult.data.cache import cache_dir

    folder = cache_dir(DataConfig())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return _folder(folder) | {"size_gib": size / _GIB}


def results() -> dict[str, Any]:
    """Where `sweep` writes by default; see `_folder`."""
    return _folder(Path("results").absolute())


def _folder(path: Path) -> dict[str, Any]:
    """Whether files can be written there (or where it would be made), and the space left in GiB."""
    place = next(parent for parent in (path, *path.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            writable = True
    except OSError:
        writable = False
    return {"path": str(path), "writable": writable, "free_gib": shutil.disk_usage(place).free / _GIB}


def _version(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _fits(requirement: Requirement) -> bool:
    installed = _version(requirement.name)
    return installed is not None and requirement.specifier.contains(installed, prereleases=True)


def _requirements(extra: str) -> Iterator[Requirement]:
    """What an extra adds, by the extras that it is made of; without an extra, what every installation needs."""
    from packaging.requirements import Requirement

    try:
        about = metadata("lit-mult")
    except PackageNotFoundError:  # run from its folder
        return
    if not extra:
        yield Requirement(f"python{about['Requires-Python']}")
    for requirement in map(Requirement, about.get_all("Requires-Dist") or ()):
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not is_needed or (extra and requirement.marker is None):
            continue
        if requirement.name == "lit-mult":
            for other in requirement.extras:
                yield from _requirements(other)
        else:
            yield requirement


def _cpu_flags() -> set[str]:
    try:  # Linux only
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def _memory(pages: str) -> float:
    """Of the machine, or of the container where that is less, GiB; NaN where the system does not say."""
    try:
        memory = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / _GIB
    except (OSError, ValueError):
        return math.nan
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()) / _GIB)
    except (OSError, ValueError):  # no such limit
        return memory

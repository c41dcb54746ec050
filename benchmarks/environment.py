"""What a benchmark ran on: the lines above a table, and the head of its JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from lit_mult.training.recording import describe_device, git_commit, versions


def environment(device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Device (with the threads of a CPU), versions, commit and the settings given; plain values."""
    commit = git_commit()
    return {
        "device": describe_device(torch.device(device)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit,
        "settings": settings,
    }


def headline(about: dict[str, Any]) -> str:
    """One line for the head of a table."""
    settings = ", ".join(f"{name} {value}" for name, value in about["settings"].items() if value is not None)
    revision, dirty, _ = str(about["commit"]).partition("+")
    commit = f"{revision[:10]}{'+dirty' if dirty else ''}"
    return f"{about['device']}; torch {about['versions']['torch']}, commit {commit}; {settings}\n"


def write_json(path: Path | None, about: dict[str, Any], results: Any) -> None:
    """Write both, where a path is given."""
    if path is not None:
        path.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")

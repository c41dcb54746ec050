"""What the tests of tiny runs share: types of the fixtures, weights, and callbacks that end a run on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_mult.config import RunConfig
from lit_mult.training.folder import RunFolder

Tiny = Callable[..., RunConfig]
MakeStudy = Callable[..., dict[str, Any]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(RunFolder(folder).final_checkpoint, weights_only=True)["state_dict"])


def stop_at(step: int, number: signal.Signals = signal.SIGTERM) -> Callable[[int, float], None]:
    return lambda at, loss: os.kill(os.getpid(), number) if at == step else None


def die_at(step: int) -> Callable[..., None]:
    """For a run, called with (step, loss), or for a stack, called with (member, step, loss)."""

    def die(*progress: Any) -> None:
        if progress[-2] == step:
            raise KeyError("as if the process had died")

    return die

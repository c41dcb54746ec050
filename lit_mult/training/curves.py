"""What a run has shown so far: its loss curves, its time, and whether and why it has ended early."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lit_mult.config import TrainConfig

Curve = list[tuple[int, float]]
"""(optimizer step, loss in nats per token)."""


@dataclass
class Curves:
    """The history of one run; goes through checkpoints."""

    config: TrainConfig
    train: Curve = field(default_factory=list)
    val: Curve = field(default_factory=list)
    """From step 0."""
    diverged: bool = False
    pruned: bool = False
    ended_at: int | None = None
    """Step at which the run diverged or was pruned."""
    train_seconds: float = 0.0
    val_seconds: float = 0.0

    @property
    def initial_loss(self) -> float:
        return self.val[0][1]

    def add_train(self, step: int, loss: float) -> None:
        self.train.append((step, loss))
        self._check(step, loss)

    def add_val(self, step: int, loss: float) -> None:
        self.val.append((step, loss))
        self._check(step, loss)

    def _check(self, step: int, loss: float) -> None:
        """A loss that has left its senses ends the run."""
        if not math.isfinite(loss) or loss > self.config.divergence_factor * self.initial_loss:
            self.diverged = True
            self.ended_at = step

    def prune(self, step: int) -> None:
        self.pruned = True
        self.ended_at = step

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_curve": list(self.train),
            "val_curve": list(self.val),
            "diverged": self.diverged,
            "train_seconds": self.train_seconds,
            "val_seconds": self.val_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = [(int(step), float(loss)) for step, loss in state_dict["train_curve"]]
        self.val = [(int(step), float(loss)) for step, loss in state_dict["val_curve"]]
        self.diverged = state_dict["diverged"]
        self.train_seconds, self.val_seconds = state_dict["train_seconds"], state_dict["val_seconds"]

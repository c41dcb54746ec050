"""The history of a run: loss curves, time, and whether it diverged or was pruned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_mult.config import TrainConfig

Curve = list[tuple[int, float]]
"""(optimizer step, loss in nats per token)."""


class History(Callback):
    """Records losses and time, also in checkpoints, and stops training when the run diverges or is pruned.

    The LightningModule must have `last_train_loss`, the loss () of its latest batch, and a metric `val_loss`.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_progress: Callable[[int, float], None] | None = None,
        prune: Callable[[Curve], bool] | None = None,
    ) -> None:
        """`on_progress` and `prune` are those of `training.run.run`."""
        self.config, self.on_progress, self.prune = config, on_progress, prune
        self.train_curve: Curve = []
        self.val_curve: Curve = []
        """From step 0."""
        self.diverged = self.pruned = False
        self.ended_at: int | None = None
        """Step at which the run diverged or was pruned."""
        self.train_seconds = self.val_seconds = 0.0
        self._pending: list[Tensor] = []  # losses since the last point of the training curve
        self._clock: float | None = None  # start of the current lap; None while nothing is timed

    def add_train(self, step: int, loss: float) -> None:
        self.train_curve.append((step, loss))
        self._check(step, loss)
        if self.on_progress is not None:
            self.on_progress(step, loss)

    def add_val(self, step: int, loss: float) -> None:
        self.val_curve.append((step, loss))
        self._check(step, loss)
        may_be_pruned = 0 < step < self.config.steps and self.ended_at is None
        if may_be_pruned and self.prune is not None and self.prune(self.val_curve[1:]):
            self.pruned, self.ended_at = True, step

    def _check(self, step: int, loss: float) -> None:
        """End the run on a non-finite loss, or one far above the initial loss."""
        if not math.isfinite(loss) or loss > self.config.divergence_factor * self.val_curve[0][1]:
            self.diverged, self.ended_at = True, step

    def add_seconds(self, account: Literal["train_seconds", "val_seconds"], seconds: float) -> None:
        """Add to the time spent in training or in validation."""
        setattr(self, account, getattr(self, account) + seconds)

    def last_losses(self) -> tuple[float | None, float | None]:
        """The last training and the last validation loss, None before there is one; for displays."""
        curves = (self.train_curve, self.val_curve)
        train, val = (curve[-1][1] if curve else None for curve in curves)
        return train, val

    def lacks_validation(self, step: int) -> bool:
        """Whether the validation at the last step is missing."""
        return self.ended_at is None and self.val_curve[-1][0] != step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._pending.append(pl_module.last_train_loss)
        # Micro-batches of an optimizer step share its global_step: wait for the last one.
        if trainer.global_step % self.config.log_every or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        pending = torch.stack([loss.to(pl_module.device) for loss in self._pending])  # loaded ones are on the CPU
        self._pending.clear()
        self._record_train(trainer, pl_module, trainer.strategy.reduce(pending.mean(0), reduce_op="mean"))
        self._end(trainer, pl_module)

    def _record_train(self, trainer: Trainer, pl_module: Any, mean: Tensor) -> None:
        loss = mean.item()
        pl_module.log("train/loss", loss)
        self.add_train(trainer.global_step, loss)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._lap("train_seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._lap("val_seconds")
        mean = pl_module.val_loss.compute()
        pl_module.val_loss.reset()
        self._record_val(trainer, mean)
        self._end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # before training, or after it
            self._clock = None

    def _record_val(self, trainer: Trainer, mean: Tensor) -> None:
        loss = mean.item()
        if trainer.logger is not None:
            trainer.logger.log_metrics({"val/loss": loss}, step=trainer.global_step)
        self.add_val(trainer.global_step, loss)

    def _end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop training if the run has diverged or was pruned."""
        if self.ended_at is not None:
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._lap("train_seconds")
        self._clock = None

    def _lap(self, account: Literal["train_seconds", "val_seconds"]) -> None:
        """Add the time since the last lap to an account."""
        now = time.perf_counter()
        if self._clock is not None:
            self.add_seconds(account, now - self._clock)
        self._clock = now

    def state_dict(self) -> dict[str, Any]:
        if self._clock is not None:
            self._lap("train_seconds")
        return {
            "train_curve": list(self.train_curve),
            "val_curve": list(self.val_curve),
            "diverged": self.diverged,
            "train_seconds": self.train_seconds,
            "val_seconds": self.val_seconds,
            "pending": [float(loss) for loss in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_curve = [(int(step), float(loss)) for step, loss in state_dict["train_curve"]]
        self.val_curve = [(int(step), float(loss)) for step, loss in state_dict["val_curve"]]
        self.diverged = state_dict["diverged"]
        self.train_seconds, self.val_seconds = state_dict["train_seconds"], state_dict["val_seconds"]
        self._pending = list(torch.tensor(state_dict["pending"]))

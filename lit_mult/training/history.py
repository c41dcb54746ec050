"""The history of a run: its loss curves and its clock, and the end of a run that diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_mult.config import TrainConfig
from lit_mult.training.module import LitLlama

Curve = list[tuple[int, float]]


class History(Callback):
    """Loss curves and training time, kept in checkpoints; ends a run whose loss has left its senses."""

    def __init__(
        self,
        config: TrainConfig,
        on_progress: Callable[[int, float], None] | None = None,
        prune: Callable[[Curve], bool] | None = None,
    ) -> None:
        """`on_progress(step, loss)` is called with every point of the training-loss curve.

        `prune(curve)` is called after every validation on the way with the validation curve up to then, by optimizer
        step; when it answers True the run ends there.
        """
        self.config = config
        self.on_progress, self.prune = on_progress, prune
        self.train_curve: Curve = []
        self.val_curve: Curve = []
        self.diverged = self.pruned = False
        self.train_seconds = 0.0
        self.val_seconds = 0.0
        self._pending: list[Tensor] = []
        self._clock: float | None = None  # start of the lap under way

    @property
    def initial_loss(self) -> float:
        return self.val_curve[0][1]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitLlama)
        assert pl_module.last_train_loss is not None
        self._pending.append(pl_module.last_train_loss)
        step = trainer.global_step
        # Micro-batches of one optimizer step share their global_step: wait for the last of them.
        if step % self.config.log_every or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        losses = torch.stack([loss.to(pl_module.device) for loss in self._pending])  # resumed ones are on the CPU
        loss = float(trainer.strategy.reduce(losses.mean(), reduce_op="mean"))
        self._pending.clear()
        self.train_curve.append((step, loss))
        pl_module.log("train/loss", loss, prog_bar=True)
        if self.on_progress is not None:
            self.on_progress(step, loss)
        self._check(loss, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("train_seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("val_seconds")
        assert isinstance(pl_module, LitLlama)
        loss = float(pl_module.val_loss.compute())
        pl_module.val_loss.reset()
        self.val_curve.append((trainer.global_step, loss))
        if trainer.logger is not None:
            trainer.logger.log_metrics({"val/loss": loss}, step=trainer.global_step)
        self._check(loss, trainer)
        on_the_way = 0 < trainer.global_step < self.config.steps and not self.diverged
        if on_the_way and self.prune is not None and self.prune(self.val_curve[1:]):
            self.pruned = trainer.should_stop = True
        if trainer.state.fn != TrainerFn.FITTING:  # the last validation, after training
            self._clock = None

    def _check(self, loss: float, trainer: Trainer) -> None:
        if not math.isfinite(loss) or loss > self.config.divergence_factor * self.initial_loss:
            self.diverged = True
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("train_seconds")
        self._clock = None

    def _lap(self, account: str) -> None:
        """Book the time since the last lap; none is booked while neither training nor validation runs."""
        now = time.perf_counter()
        if self._clock is not None:
            setattr(self, account, getattr(self, account) + now - self._clock)
        self._clock = now

    def state_dict(self) -> dict[str, Any]:
        if self._clock is not None:
            self._lap("train_seconds")
        return {
            "train_curve": list(self.train_curve),
            "val_curve": list(self.val_curve),
            "diverged": self.diverged,
            "pending": [float(loss) for loss in self._pending],
            "train_seconds": self.train_seconds,
            "val_seconds": self.val_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_curve = [(int(step), float(loss)) for step, loss in state_dict["train_curve"]]
        self.val_curve = [(int(step), float(loss)) for step, loss in state_dict["val_curve"]]
        self.diverged = state_dict["diverged"]
        self._pending = [torch.tensor(loss) for loss in state_dict["pending"]]
        self.train_seconds, self.val_seconds = state_dict["train_seconds"], state_dict["val_seconds"]

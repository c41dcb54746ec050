"""The history of a run, or of every run of a stack: loss curves and clock, and the end of a run that diverges."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_mult.training.curves import Curve, Curves


class _Trained(Protocol):
    """What a module shows: the losses () of its run, or (M,) of the members of its stack."""

    device: torch.device
    last_train_loss: Tensor | None
    val_loss: Any


class History(Callback):
    """Loss curves and training time, kept in checkpoints; ends training when every run has ended early."""

    def __init__(
        self,
        runs: Sequence[Curves],
        on_progress: Callable[[int, int, float], None] | None = None,
        prune: Callable[[int, Curve], bool] | None = None,
    ) -> None:
        """`on_progress(run, step, loss)` is called with every point of a training-loss curve.

        `prune(run, curve)` is called after every validation on the way with the validation curve up to then, by
        optimizer step; when it answers True the run ends there.
        """
        self.runs = list(runs)
        self.on_progress, self.prune = on_progress, prune
        self.saved = 0
        """The run whose state goes into a checkpoint."""
        self._pending: list[Tensor] = []
        self._clock: float | None = None  # start of the lap under way

    def running(self) -> list[int]:
        """The runs that have not ended early."""
        return [index for index, run in enumerate(self.runs) if run.ended_at is None]

    def under_way(self) -> list[int]:
        """The runs that validations belong to, and time: one that has ended is still to be validated."""
        return list(range(len(self.runs)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: _Trained = pl_module  # type: ignore[assignment]
        assert module.last_train_loss is not None
        self._pending.append(module.last_train_loss)
        step = trainer.global_step
        # Micro-batches of one optimizer step share their global_step: wait for the last of them.
        if step % self.runs[0].config.log_every or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        pending = torch.stack([loss.to(module.device) for loss in self._pending])  # resumed ones are on the CPU
        losses = trainer.strategy.reduce(pending.mean(0), reduce_op="mean").reshape(-1).tolist()
        self._pending.clear()
        running = self.running()
        pl_module.log("train/loss", statistics.fmean(losses[index] for index in running), prog_bar=True)
        for index in running:
            self.runs[index].add_train(step, losses[index])
            if self.on_progress is not None:
                self.on_progress(index, step, losses[index])
        self._end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("train_seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("val_seconds")
        module: _Trained = pl_module  # type: ignore[assignment]
        losses = module.val_loss.compute().reshape(-1).tolist()
        module.val_loss.reset()
        step = trainer.global_step
        under_way = self.under_way()
        if trainer.logger is not None:
            loss = statistics.fmean(losses[index] for index in under_way)
            trainer.logger.log_metrics({"val/loss": loss}, step=step)
        for index in under_way:
            run = self.runs[index]
            run.add_val(step, losses[index])
            on_the_way = 0 < step < run.config.steps and run.ended_at is None
            if on_the_way and self.prune is not None and self.prune(index, run.val[1:]):
                run.prune(step)
        self._end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # before training, or after it
            self._clock = None

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on the end of the runs that have ended just now."""
        if not self.running():
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("train_seconds")
        self._clock = None

    def _lap(self, account: str) -> None:
        """Book the time since the last lap, in equal shares; none while neither training nor validation runs."""
        now = time.perf_counter()
        sharing = self.under_way()
        if self._clock is not None:
            for run in (self.runs[index] for index in sharing):
                setattr(run, account, getattr(run, account) + (now - self._clock) / len(sharing))
        self._clock = now

    def state_dict(self) -> dict[str, Any]:
        if self._clock is not None:
            self._lap("train_seconds")
        pending = [float(loss.reshape(-1)[self.saved]) for loss in self._pending]
        return {**self.runs[self.saved].state_dict(), "pending": pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.load([state_dict])
        self._pending = [loss[0] for loss in self._pending]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the state of every run, each as from a checkpoint of its own."""
        for run, state in zip(self.runs, states, strict=True):
            run.load_state_dict(state)
        self._pending = list(torch.tensor([state["pending"] for state in states]).T)

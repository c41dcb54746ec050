"""Checkpoints from which a run goes on as if it had never stopped, written every so often and when it is stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lit_mult.config import TrainConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.training.folder import RunFolder


def save_checkpoint(trainer: Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Write a checkpoint (or what is needed to use the model, without the optimizer), whole or not at all.

    Raises:
        UserError: it cannot be written; the disk is full, say.
    """
    # Lightning writes among the temporary files and moves: a copy, and one that may break off, between file systems.
    scratch = path.with_name(f".{path.name}")
    try:
        trainer.save_checkpoint(scratch, weights_only=weights_only)
        if trainer.is_global_zero:
            scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the checkpoint ({error.strerror or error})") from None


class RngState(Callback):
    """Keeps torch's random state in checkpoints, which Lightning does not: resuming with dropout is exact."""

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in load_state_dict: what Lightning does between loading and the first step may draw numbers.
        loaded = getattr(self, "_loaded", None)
        if loaded is not None:
            torch.set_rng_state(loaded["cpu"])
            if len(loaded["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(loaded["cuda"])


class Checkpoints(Callback):
    """Writes the checkpoint to resume from, keeps the newest, and leaves the run when SIGINT or SIGTERM comes.

    Lightning's `ModelCheckpoint` saves before a validation that falls on the same step, and a run resumed from there
    leaves that validation out; here it comes first. Leaving is by an exception, as `trainer.should_stop` would
    validate once more than a run that is never stopped. A second SIGINT leaves at once.

    Must stand last in the list of callbacks, so that the state of the others is that of the end of the step.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, should_stop: Callable[[], bool] | None = None) -> None:
        """`should_stop` is asked after every step, for stops that come by another way than a signal."""
        self.folder, self.config, self.should_stop = folder, config, should_stop
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def folders(self, trainer: Trainer) -> Iterator[RunFolder]:
        """The folders of the runs under way; what is saved while one is at hand is the checkpoint of its run."""
        yield self.folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, after Lightning has set handlers of its own, whose SIGTERM gives no chance to write a checkpoint.
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._request) for number in signals}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        validation_follows = trainer.global_step % (self.config.eval_every or self.config.steps) == 0
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not validation_follows:
            self._end_of_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end_of_step(trainer)

    def _end_of_step(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self.config.steps or trainer.should_stop:  # the run ends here: at its last step, diverged or pruned
            return
        if self.config.keep_every and step % self.config.keep_every == 0:
            for folder in self.folders(trainer):
                save_checkpoint(trainer, folder.kept_checkpoint(step), weights_only=True)
        requested = self._requested or (self.should_stop is not None and self.should_stop())
        if trainer.world_size > 1:  # the processes must agree, which costs a round trip: now and then will do
            on_pace = step % self.config.log_every == 0
            requested = on_pace and trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested or (self.config.checkpoint_every and step % self.config.checkpoint_every == 0):
            older = {checkpoint for folder in self.folders(trainer) for checkpoint in folder.resumable()}
            for folder in self.folders(trainer):
                older.discard(folder.checkpoint(step))  # of an attempt that had come further
                save_checkpoint(trainer, folder.checkpoint(step))
            if trainer.is_global_zero:
                for checkpoint in older:
                    checkpoint.unlink(missing_ok=True)  # somebody who took this process for dead may be at it, too
        if requested:
            raise Interrupted(f"stopped at step {step} of {self.config.steps}; the same command goes on from there")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _request(self, number: int, frame: object) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

"""Checkpoints from which a run resumes exactly, written periodically and on a stop request."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from lit_mult.config import RunConfig, TrainConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.training.folder import RunFolder


def save_checkpoint(trainer: Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Write a checkpoint (`weights_only`: without optimizer state), whole or not at all.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    # Lightning writes to the temporary folder and moves, which is not atomic between file systems.
    # Not `atomic.new_file`: all ranks call this and need the same name.
    scratch = path.with_name(f".{path.name}")
    try:
        trainer.save_checkpoint(scratch, weights_only=weights_only)
        if trainer.is_global_zero:
            scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the checkpoint ({error.strerror or error})") from None


def remove(checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints; another process may have removed some, if this one lost its lease."""
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


class RngState(Callback):
    """The random numbers of training, which dropout alone uses: exact when a run resumes, and other ones on every rank.

    One process continues torch's generators; checkpoints have their state, which Lightning leaves out. Of several
    processes only rank 0 writes a checkpoint, and all start from one seed. So each seeds its generators before every
    micro-batch, from the run's seed, the step, the micro-batch and its rank.
    """

    _loaded: dict[str, Any] | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in load_state_dict: Lightning may use the generator between loading and the first step.
        if self._loaded is not None:
            torch.set_rng_state(self._loaded["cpu"])
            if len(self._loaded["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._loaded["cuda"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.world_size > 1 and self.config.model.dropout:
            micro_batch = batch_idx % trainer.accumulate_grad_batches
            key = (trainer.global_step, micro_batch, trainer.global_rank)
            bits = np.random.SeedSequence(self.config.seed, spawn_key=key).generate_state(1, np.uint64)
            torch.manual_seed(int(bits[0]))


class Checkpoints(Callback):
    """Writes the checkpoint to resume from, keeps only the newest, and stops the run on SIGINT or SIGTERM.

    Lightning's `ModelCheckpoint` saves before a validation at the same step, and a run resumed from there omits that
    validation; here validation comes first. The run stops by an exception, as `trainer.should_stop` would add a
    validation. A second SIGINT stops it at once.

    Must be the last callback, so that it saves the state of the others at the end of the step.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, should_stop: Callable[[], bool] | None = None) -> None:
        """`should_stop` is called after every step, for stop requests other than signals."""
        self.folder, self.config, self.should_stop = folder, config, should_stop
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Replaces Lightning's handlers: its SIGTERM handler leaves no time to write a checkpoint.
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
        if step == self.config.steps or trainer.should_stop:  # the run ends: last step, diverged or pruned
            return
        if self.config.keep_every and step % self.config.keep_every == 0:
            self._keep_weights(trainer, step)
        requested = self._requested or (self.should_stop is not None and self.should_stop())
        if trainer.world_size > 1:  # the ranks must agree, which needs communication: not at every step
            is_log_step = step % self.config.log_every == 0
            requested = is_log_step and trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested or (self.config.checkpoint_every and step % self.config.checkpoint_every == 0):
            self._save(trainer, step)
        if requested:
            raise Interrupted(
                f"stopped at step {step} of {self.config.steps}; to resume from there, give the same command again"
            )

    def _keep_weights(self, trainer: Trainer, step: int) -> None:
        save_checkpoint(trainer, self.folder.kept_checkpoint(step), weights_only=True)

    def _save(self, trainer: Trainer, step: int) -> None:
        """Write the checkpoint to resume from, and remove those of other steps."""
        others = self.folder.other_checkpoints(step)
        save_checkpoint(trainer, self.folder.checkpoint(step))
        if trainer.is_global_zero:
            remove(others)

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

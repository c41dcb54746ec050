"""Records what the multipliers learn while a run trains, and changes nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.config import TrainConfig
from lit_mult.diagnostics.activations import outputs
from lit_mult.diagnostics.gradients import gradient_noise, gradient_sizes
from lit_mult.diagnostics.parts import Reading, trainable_parts
from lit_mult.diagnostics.readings import Readings
from lit_mult.diagnostics.scales import line_norms, norms, relative_updates, snapshot
from lit_mult.diagnostics.symmetries import coordinates
from lit_mult.errors import ConfigError, UserError
from lit_mult.training.module import LitLlama

PROBE_WINDOWS = 8
"""Validation windows on which outputs are measured, at most; no more than training has in one forward."""


class Diagnostics(Callback):
    """Reads the groups of `train.diagnostics` every `train.diagnostics_every` optimizer steps.

    Rows of one step k belong together: the state after k steps (norms, rows, outputs, symmetry), the gradient of the
    next batch before it is clipped (gradients, noise), and the update that it makes (updates). The state is read at the
    end of the run, too. Readings go through checkpoints, so that a resumed run has those of an unbroken one.

    Must stand before `Checkpoints` in the list of callbacks.
    """

    def __init__(self, config: TrainConfig, probe_BT: Tensor) -> None:
        """`probe_BT` is the fixed batch of token ids for outputs."""
        self.groups, self.every = set(config.diagnostics), config.diagnostics_every
        self.probe_BT = probe_BT
        self.readings = Readings()
        self._loaded = False
        self._windows: list[Tensor] = []  # micro-batches of the step under way, for noise
        self._before: dict[int, Tensor] | None = None  # parameters before the step under way, for updates

    def check(self, world: int) -> None:
        """Raises: ConfigError when a group cannot be recorded with so many processes."""
        if "noise" in self.groups and world > 1:
            allowed = f"noise halves the batch of one process, and there are {world}; leave it out or use one device"
            raise ConfigError("train.diagnostics", sorted(self.groups), allowed)

    def write(self, path: Path) -> None:
        """Write the readings as parquet; see `Readings.write`."""
        self.readings.write(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step and not self._loaded:
            self._refuse("nothing")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._read_state(trainer, pl_module)
        if "noise" in self.groups:
            self._windows.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step % self.every:
            return
        assert isinstance(pl_module, LitLlama)
        if "gradients" in self.groups:
            self.readings.add(trainer.global_step, gradient_sizes(pl_module.model))
        if "noise" in self.groups:
            self.readings.add(trainer.global_step, self._noise(trainer, pl_module))
            self._windows.clear()
        if "updates" in self.groups:
            self._before = snapshot(pl_module.model)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before is not None:  # taken in this batch, whose step is done now
            assert isinstance(pl_module, LitLlama)
            self.readings.add(trainer.global_step - 1, relative_updates(pl_module.model, self._before))
            self._before = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_state(trainer, pl_module)

    @torch.no_grad()
    def _read_state(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitLlama)
        model, step = pl_module.model, trainer.global_step
        if "norms" in self.groups:
            self.readings.add(step, norms(model))
        if "rows" in self.groups:
            self.readings.add(step, line_norms(model))
        if self.groups & {"outputs", "symmetry"}:
            self.probe_BT = self.probe_BT.to(pl_module.device)
            with trainer.precision_plugin.forward_context():
                found = list(outputs(model, self.probe_BT))
            if "outputs" in self.groups:
                self.readings.add(step, found)
            if "symmetry" in self.groups:
                residual = [(key, value) for key, value in found if key.quantity == "residual_rms"]
                self.readings.add(step, [(key._replace(group="symmetry"), value) for key, value in residual])
                self.readings.add(step, coordinates(model))

    def _noise(self, trainer: Trainer, module: LitLlama) -> Iterator[Reading]:
        """Readings of the gradients of the two halves of the step's batch, dropout and all."""
        windows_BT1 = torch.cat(self._windows)
        batch, micro = len(windows_BT1), len(self._windows[0])
        parts = trainable_parts(module.model)
        parameters = [part.parameter for part in parts]
        gpus = [windows_BT1.device] if windows_BT1.is_cuda else []
        halves: list[list[Tensor]] = []
        with torch.random.fork_rng(gpus), torch.enable_grad():
            for half_BT1 in windows_BT1.chunk(2):
                total: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
                for chunk_BT1 in half_BT1.split(micro):
                    with trainer.precision_plugin.forward_context():
                        loss, _ = module.training_loss(chunk_BT1)
                    # Not backward(), which would add to .grad.
                    gradients = torch.autograd.grad(loss * (2 * len(chunk_BT1) / batch), parameters)
                    torch._foreach_add_(total, gradients)
                halves.append(total)
        first, second = halves
        return gradient_noise(parts, first, second, batch)

    def _refuse(self, recorded: str) -> None:
        wanted = f"{', '.join(sorted(self.groups))} every {self.every} steps"
        said = f"the run to go on with has recorded {recorded}, not {wanted}"
        raise UserError(f"train.diagnostics: {said}; go on as it began, or name a new folder")

    def state_dict(self) -> dict[str, Any]:
        return {"groups": sorted(self.groups), "every": self.every, **self.readings.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["groups"] != sorted(self.groups) or state_dict["every"] != self.every:
            self._refuse(f"{', '.join(state_dict['groups'])} every {state_dict['every']} steps")
        self.readings.load_state_dict(state_dict)
        self._loaded = True

"""Records diagnostics while a run trains, without changing the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.config import RunConfig
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.diagnostics.group import Moment, make_group
from lit_mult.diagnostics.parts import TrainingModule
from lit_mult.diagnostics.readings import Readings, require_pyarrow
from lit_mult.errors import UserError
from lit_mult.nn.llama import Llama

PROBE_WINDOWS = 8
"""Most validation windows for outputs; never more than a training forward pass has."""


class Diagnostics(Callback):
    """Records the groups of `train.diagnostics` every `train.diagnostics_every` optimizer steps.

    Checkpoints contain the readings, so that a resumed run has all of them. Must come before `Checkpoints` in the list
    of callbacks.
    """

    def __init__(self, config: RunConfig, probe_BT: Tensor) -> None:
        """`probe_BT`: the fixed batch of token ids for outputs."""
        self.config, self.probe_BT = config, probe_BT
        self.every = config.train.diagnostics_every
        self.groups = {name: make_group(name) for name in sorted(set(config.train.diagnostics))}
        self.readings = Readings()
        self._loaded = False
        self._windows: list[Tensor] = []  # micro-batches of a step that is recorded
        self._is_updating = False  # between before_update and after_update

    @classmethod
    def of_run(cls, config: RunConfig, corpus: TokenizedCorpus) -> Self:
        """The recorder of a run on its corpus. Raises: UserError when pyarrow is not installed."""
        require_pyarrow()
        windows = min(PROBE_WINDOWS, config.train.batch_size // config.trainer.accumulate_grad_batches)
        probe_BT1 = torch.from_numpy(validation_windows(corpus.val, config.data.seq_len, windows))
        return cls(config, probe_BT1[:, :-1])

    def check(self, processes: int) -> None:
        """Raises: ConfigError when a group does not support this number of processes."""
        for group in self.groups.values():
            group.check(self.config, processes)

    def write(self, path: Path, module: TrainingModule, steps: int, start: Callable[[], Llama]) -> None:
        """Add the groups' `at_end` readings after so many steps, and write all readings as parquet.

        `start` makes the initial model. Raises: UserError when the file cannot be written.
        """
        moment = Moment(self.config, module, steps, self.probe_BT)
        for name, group in self.groups.items():
            for step, reading in group.at_end(moment, start):
                self.readings.add(name, step, [reading])
        self.readings.write(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step and not self._loaded:
            self._refuse("nothing")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            if batch_idx % trainer.accumulate_grad_batches == 0:
                self._record("state", trainer.global_step, trainer, pl_module)
            self._windows.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step % self.every == 0:
            self._record("before_update", trainer.global_step, trainer, pl_module)
            self._windows.clear()
            self._is_updating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_updating:  # this batch completed an optimizer step
            self._record("after_update", trainer.global_step - 1, trainer, pl_module)
            self._is_updating = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record("state", trainer.global_step, trainer, pl_module)

    @torch.no_grad()
    def _record(
        self,
        hook: Literal["state", "before_update", "after_update"],
        step: int,
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
        module, context = cast(TrainingModule, pl_module), trainer.precision_plugin.forward_context
        moment = Moment(self.config, module, step, self.probe_BT, self._windows, context)
        for name, group in self.groups.items():
            self.readings.add(name, step, getattr(group, hook)(moment))

    def _refuse(self, recorded: str) -> None:
        wanted = f"{', '.join(self.groups)} every {self.every} steps"
        problem = f"the run to resume has recorded {recorded}, not {wanted}"
        raise UserError(f"train.diagnostics: {problem}; ask for the same, or name a new folder")

    def state_dict(self) -> dict[str, Any]:
        return {"groups": list(self.groups), "every": self.every, **self.readings.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["groups"] != list(self.groups) or state_dict["every"] != self.every:
            self._refuse(f"{', '.join(state_dict['groups'])} every {state_dict['every']} steps")
        self.readings.load_state_dict(state_dict)
        self._loaded = True

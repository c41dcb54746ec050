"""The LightningModule and DataModule of a stack.

Each member has its own checkpoints, in the format of `LitLlama`, so that a run can resume alone or in another stack.

Shapes in names: M members, S seeds of the data order, B batch of one member, N = M * B rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows, Windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.data.module import TextDataModule
from lit_mult.nn.functional import cross_entropy_and_log_z
from lit_mult.nn.llama import Llama
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.stacked.model import member_state, stack
from lit_mult.stacked.optimizer import Moments, StackedOptimizer
from lit_mult.training.checkpoints import save_checkpoint
from lit_mult.training.history import History
from lit_mult.training.module import LitLlama, ValidationLoss, compiled


class StackDataModule(TextDataModule):
    """Serves training batches (S, B, T+1) for the members' S seeds, and one validation set."""

    def __init__(self, config: RunConfig, corpus: TokenizedCorpus, seeds: Sequence[int]) -> None:
        """`config` is that of any member. Raises: as `TextDataModule`."""
        super().__init__(config, corpus)
        size = {"seq_len": config.data.seq_len, "batch_size": config.train.batch_size}
        self.windows_of_seeds = [TrainWindows(corpus.train, **size, seed=seed) for seed in seeds]

    def train_batch(self, step: int) -> Windows:
        return np.stack([windows.batch(step) for windows in self.windows_of_seeds])


def stacked_objective(model: Llama, window_NT1: Tensor, z_loss_M: Tensor | None, members: int) -> tuple[Tensor, Tensor]:
    """`training.module.objective` of every member (M,), and the mean cross-entropies (M,).

    Training differentiates the sum over members: they share no parameters, so each gets the gradient of its loss.
    """
    logits_NTV = model(window_NT1[:, :-1]).float()
    logits_RV, target_R = logits_NTV.flatten(0, 1), window_NT1[:, 1:].flatten()
    if z_loss_M is None:
        cross_entropy_M = F.cross_entropy(logits_RV, target_R, reduction="none").view(members, -1).mean(1)
        return cross_entropy_M, cross_entropy_M
    loss_R, log_z_R = cross_entropy_and_log_z(logits_RV, target_R)
    cross_entropy_M = loss_R.view(members, -1).mean(1)
    return cross_entropy_M + z_loss_M * log_z_R.square().view(members, -1).mean(1), cross_entropy_M


class LitStack(LightningModule):
    """Trains the models of M runs at once; training batches are windows (S, B, T+1)."""

    seed_M: Tensor
    z_loss_M: Tensor | None

    def __init__(self, members: Sequence[LitLlama], checkpoints: Sequence[Path] = ()) -> None:
        """Stack the models of `members`; training resumes from `checkpoints`, if given, one per member."""
        super().__init__()
        # In a tuple, members are no submodules: only their configs and checkpoint format are used.
        self.members, self.checkpoints = tuple(members), tuple(checkpoints)
        self.configs = [member.config for member in members]
        self.model = stack([member.model for member in members])
        self.seeds = list(dict.fromkeys(config.seed for config in self.configs))
        """Seeds of the data order, in the order of a batch."""
        seed_M = torch.tensor([self.seeds.index(config.seed) for config in self.configs])
        self.register_buffer("seed_M", seed_M, persistent=False)
        z_losses = [config.model.z_loss for config in self.configs]
        self.register_buffer("z_loss_M", torch.tensor(z_losses) if any(z_losses) else None, persistent=False)
        self.val_loss = ValidationLoss(len(members))
        self.last_train_loss: Tensor | None = None
        """Mean cross-entropy (M,) of the latest batch, z-loss left out."""
        self._saved = 0  # the member whose checkpoint is being written
        compile_it = self.configs[0].trainer.compile
        self._objective = compiled(stacked_objective) if compile_it else stacked_objective
        self._own_optimizers = [_optimizer(member) for member in members]

    def training_step(self, windows_SBT1: Tensor, batch_index: int) -> Tensor:
        window_NT1 = windows_SBT1[self.seed_M].flatten(0, 1)
        loss_M, cross_entropy_M = self._objective(self.model, window_NT1, self.z_loss_M, len(self.members))
        self.last_train_loss = cross_entropy_M.detach()
        return loss_M.sum()

    def validation_step(self, window_BT1: Tensor, batch_index: int) -> None:
        M = len(self.members)
        _, loss_M = stacked_objective(self.model, window_BT1.repeat(M, 1), None, M)
        self.val_loss.update(loss_M, weight=window_BT1[:, 1:].numel())

    @torch.no_grad()
    def validate_now(self) -> list[float]:
        """Validation loss of every member, in the middle of training."""
        with self.trainer.precision_plugin.val_step_context():
            for index, window_BT1 in enumerate(self.trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
                self.validation_step(window_BT1.to(self.device), index)
        losses: list[float] = self.val_loss.compute().reshape(-1).tolist()
        self.val_loss.reset()
        return losses

    def configure_optimizers(self) -> StackedOptimizer:
        parameters = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        rows = [member.plan_parameters() for member in self.members]
        self._optimizer = StackedOptimizer(parameters, rows, self.configs)
        return self._optimizer

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Nothing: the optimizer clips, member by member."""

    def save_member(self, index: int, path: Path, *, weights_only: bool = False) -> None:
        """Write the checkpoint of a member; see `save_checkpoint`."""
        self._saved = index
        save_checkpoint(self.trainer, path, weights_only=weights_only)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        member = self.members[self._saved]
        state = member_state(self.model, self._saved)
        checkpoint["state_dict"] = {f"model.{name}": value.cpu().clone() for name, value in state.items()}
        checkpoint[member.CHECKPOINT_HYPER_PARAMS_NAME] = member._hparams_name
        checkpoint[member.CHECKPOINT_HYPER_PARAMS_KEY] = dict(member.hparams)
        if "optimizer_states" in checkpoint:
            optimizer, schedule = self._own_optimizers[self._saved]
            _fill(optimizer, schedule, member, self._optimizer.moments(self._saved), checkpoint["global_step"])
            checkpoint["optimizer_states"] = [optimizer.state_dict()]
            checkpoint["lr_schedulers"] = [schedule.state_dict()]
            callbacks = checkpoint["callbacks"]
            callbacks[History.__qualname__] = callbacks[History.__qualname__]["members"][self._saved]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the state of the member whose checkpoint Lightning has read by that of all members."""
        states = [torch.load(path, map_location="cpu", weights_only=True) for path in self.checkpoints]
        weights = [state["state_dict"] for state in states]
        checkpoint["state_dict"] = {name: torch.stack([state[name] for state in weights]) for name in weights[0]}
        moments = []
        for member, (optimizer, _), state in zip(self.members, self._own_optimizers, states, strict=True):
            optimizer.load_state_dict(state["optimizer_states"][0])
            moments.append({row.name: optimizer.state[row.parameter] for row in member.plan_parameters()})
        checkpoint["optimizer_states"] = [{"step": checkpoint["global_step"], "members": moments}]
        checkpoint["lr_schedulers"] = []
        histories = [state["callbacks"][History.__qualname__] for state in states]
        checkpoint["callbacks"][History.__qualname__] = {"members": histories}


def _optimizer(member: LitLlama) -> tuple[HybridOptimizer, LambdaLR]:
    configured = cast(dict[str, Any], member.configure_optimizers())
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


def _fill(optimizer: HybridOptimizer, schedule: LambdaLR, member: LitLlama, moments: Moments, step: int) -> None:
    """Set a member's own optimizer and schedule to their state after `step` steps of the stack."""
    for row in member.plan_parameters():
        optimizer.state[row.parameter] = moments[row.name]
    rates = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict(
        {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": list(rates)}
    )

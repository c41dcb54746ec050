"""The LightningModule of a stack: runs of equal shapes, trained as one, each as its own config says.

Checkpoints are written and read member by member, in the form of those of `LitLlama`: a run may go on in another stack,
or by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.stacked.model import member_state, stack
from lit_mult.stacked.optimizer import Moments, StackedOptimizer
from lit_mult.training.checkpoints import Checkpoints
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import History
from lit_mult.training.module import LitLlama
from lit_mult.training.objective import compiled, stacked_objective


class _MemberMeans(Metric):
    """Mean (M,) of what members have shown, weighted."""

    total: Tensor
    weight: Tensor

    def __init__(self, members: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(members), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value_M: Tensor, weight: int) -> None:
        self.total += value_M * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


class LitStack(LightningModule):
    """Trains M models at once; training batches are windows (S, B, T+1), one for each seed of the data order."""

    seed_M: Tensor
    z_loss_M: Tensor | None

    def __init__(self, members: Sequence[LitLlama], checkpoints: Sequence[Path] = ()) -> None:
        """Stack the models of `members`, which start as these are; with a checkpoint of each, they go on from there."""
        super().__init__()
        # In a tuple, and so no part of the module: they keep what a member needs to be a run of its own.
        self.members, self.checkpoints = tuple(members), tuple(checkpoints)
        self.configs = [member.config for member in members]
        self.model = stack([member.model for member in members])
        self.seeds = list(dict.fromkeys(config.seed for config in self.configs))
        """Orders of the data, as the batches have them."""
        seed_M = torch.tensor([self.seeds.index(config.seed) for config in self.configs])
        self.register_buffer("seed_M", seed_M, persistent=False)
        z_losses = [config.model.z_loss for config in self.configs]
        self.register_buffer("z_loss_M", torch.tensor(z_losses) if any(z_losses) else None, persistent=False)
        self.val_loss = _MemberMeans(len(members))
        self.last_train_loss: Tensor | None = None
        """Mean cross-entropy (M,) of the latest batch, z-loss left out."""
        self.saved = 0
        """The member that checkpoints are written of."""
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
        losses: list[float] = self.val_loss.compute().tolist()
        self.val_loss.reset()
        return losses

    def configure_optimizers(self) -> StackedOptimizer:
        parameters = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._optimizer = StackedOptimizer(parameters, [one.plan_parameters() for one in self.members], self.configs)
        return self._optimizer

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """The optimizer clips, member by member."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        member = self.members[self.saved]
        state = member_state(self.model, self.saved)
        checkpoint["state_dict"] = {f"model.{name}": value.cpu().clone() for name, value in state.items()}
        checkpoint[member.CHECKPOINT_HYPER_PARAMS_NAME] = member._hparams_name
        checkpoint[member.CHECKPOINT_HYPER_PARAMS_KEY] = dict(member.hparams)
        if "optimizer_states" in checkpoint:
            optimizer, schedule = self._own_optimizers[self.saved]
            _fill(optimizer, schedule, member, self._optimizer.moments(self.saved), checkpoint["global_step"])
            checkpoint["optimizer_states"] = [optimizer.state_dict()]
            checkpoint["lr_schedulers"] = [schedule.state_dict()]
            checkpoint["callbacks"][History.__qualname__] = checkpoint["callbacks"].pop(StackHistory.__qualname__)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the states of all members in the place of the one whose checkpoint Lightning has read."""
        states = [torch.load(path, map_location="cpu", weights_only=True) for path in self.checkpoints]
        weights = [state["state_dict"] for state in states]
        checkpoint["state_dict"] = {name: torch.stack([one[name] for one in weights]) for name in weights[0]}
        moments = []
        for member, (optimizer, _), state in zip(self.members, self._own_optimizers, states, strict=True):
            optimizer.load_state_dict(state["optimizer_states"][0])
            moments.append({row.name: optimizer.state[row.parameter] for row in member.plan_parameters()})
        checkpoint["optimizer_states"] = [{"step": checkpoint["global_step"], "members": moments}]
        checkpoint["lr_schedulers"] = []
        runs = [state["callbacks"][History.__qualname__] for state in states]
        del checkpoint["callbacks"][History.__qualname__]
        checkpoint["callbacks"][StackHistory.__qualname__] = {"runs": runs}


def _optimizer(member: LitLlama) -> tuple[HybridOptimizer, LambdaLR]:
    configured = cast(dict[str, Any], member.configure_optimizers())
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


def _fill(optimizer: HybridOptimizer, schedule: LambdaLR, member: LitLlama, moments: Moments, step: int) -> None:
    """Bring a run's own optimizer and schedule to where the run has come to in its stack."""
    for row in member.plan_parameters():
        optimizer.state[row.parameter] = moments[row.name]
    rates = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict(
        {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": list(rates)}
    )


class StackHistory(History):
    """Ends members of a stack that diverge, or are pruned, while the others train on.

    Nobody looks at what becomes of their weights from then on: to take them out of the stack would change its shapes.
    """

    def __init__(self, *arguments: Any, on_end: Callable[[int], None]) -> None:
        """`on_end(member)` is called when a member has ended before the others, with its last validation behind it."""
        super().__init__(*arguments)
        self.on_end = on_end
        self._left: set[int] = set()

    def under_way(self) -> list[int]:
        return [index for index in super().under_way() if index not in self._left]

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._end(trainer, pl_module)
        assert isinstance(pl_module, LitStack)
        step = trainer.global_step
        ended = [index for index in self.under_way() if self.runs[index].ended_at is not None]
        if trainer.should_stop or not ended:
            return
        if any(self.runs[index].val[-1][0] != step for index in ended):  # diverged in training
            if step % (self.runs[0].config.eval_every or self.runs[0].config.steps) == 0:
                return  # the validation that it needs is about to come
            self._lap("train_seconds")
            losses = pl_module.validate_now()
            self._lap("val_seconds")
            for index in ended:
                self.runs[index].add_val(step, losses[index])
        for index in ended:
            self.on_end(index)
        self._left.update(ended)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.load(state_dict["runs"])


class StackCheckpoints(Checkpoints):
    """Writes a checkpoint for each member under way."""

    def __init__(self, folders: Sequence[RunFolder], history: StackHistory, *arguments: Any) -> None:
        super().__init__(folders[0], *arguments)
        self._folders, self._history = folders, history

    def folders(self, trainer: Trainer) -> Iterator[RunFolder]:
        for member in self._history.running():
            yield self.of(member, trainer)

    def of(self, member: int, trainer: Trainer) -> RunFolder:
        """The folder of a member, of which checkpoints are written from now on."""
        assert isinstance(trainer.lightning_module, LitStack)
        trainer.lightning_module.saved = self._history.saved = member
        return self._folders[member]

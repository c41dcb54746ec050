"""Histories and checkpoints of a stack, one per member in the format of a single run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning import Trainer
from torch import Tensor

from lit_mult.stacked.module import LitStack
from lit_mult.training.checkpoints import Checkpoints, remove
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import History


class StackHistory(History):
    """Keeps the history of every member; a member that diverges or is pruned leaves, and the others continue.

    The weights of a member that has left are still updated, so that shapes do not change, but never read. The module
    has losses (M,). Time is divided equally among the remaining members.
    """

    def __init__(self, members: Sequence[History], on_leave: Callable[[int], None]) -> None:
        """`on_leave(member)` is called when a member leaves early, after its last validation."""
        super().__init__(members[0].config)
        self.members, self.on_leave = list(members), on_leave
        self._remaining = list(range(len(members)))

    @property
    def state_key(self) -> str:
        return History.__qualname__

    def running(self) -> list[int]:
        """The members that have neither diverged nor been pruned."""
        return [index for index, member in enumerate(self.members) if member.ended_at is None]

    def last_losses(self) -> tuple[float | None, float | None]:
        """Means over the members that are running."""
        losses = [self.members[index].last_losses() for index in self.running()]
        return _mean(train for train, _ in losses), _mean(val for _, val in losses)

    def lacks_validation(self, step: int) -> bool:
        return any(member.lacks_validation(step) for member in self.members)

    def add_seconds(self, account: Literal["train_seconds", "val_seconds"], seconds: float) -> None:
        for index in self._remaining:
            self.members[index].add_seconds(account, seconds / len(self._remaining))

    def _record_train(self, trainer: Trainer, pl_module: Any, mean: Tensor) -> None:
        losses, running = mean.tolist(), self.running()
        pl_module.log("train/loss", statistics.fmean(losses[index] for index in running))
        for index in running:
            self.members[index].add_train(trainer.global_step, losses[index])

    def _record_val(self, trainer: Trainer, mean: Tensor) -> None:
        losses = mean.reshape(-1).tolist()  # torchmetrics squeezes a single member's to ()
        for index in self._remaining:  # also a member that has just diverged
            self.members[index].add_val(trainer.global_step, losses[index])

    def _end(self, trainer: Trainer, pl_module: LitStack) -> None:
        step = trainer.global_step
        ended = [index for index in self._remaining if self.members[index].ended_at is not None]
        if not self.running():
            trainer.should_stop = True
            return
        unvalidated = [index for index in ended if self.members[index].val_curve[-1][0] != step]
        if unvalidated:
            if step % (self.config.eval_every or self.config.steps) == 0:
                return  # a validation follows
            self._lap("train_seconds")
            losses = pl_module.validate_now()
            self._lap("val_seconds")
            for index in unvalidated:
                self.members[index].add_val(step, losses[index])
        for index in ended:
            self.on_leave(index)
        self._remaining = [index for index in self._remaining if index not in ended]

    def state_dict(self) -> dict[str, Any]:
        """{"members": state of each}; `LitStack` writes one of them to each checkpoint."""
        if self._clock is not None:
            self._lap("train_seconds")
        states = [member.state_dict() for member in self.members]
        if self._pending:
            for state, pending in zip(states, torch.stack(self._pending).T.tolist(), strict=True):
                state["pending"] = pending
        return {"members": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self._pending = list(torch.tensor([state["pending"] for state in state_dict["members"]]).T)


class StackCheckpoints(Checkpoints):
    """Writes a checkpoint of each running member to its folder."""

    def __init__(
        self,
        module: LitStack,
        history: StackHistory,
        folders: Sequence[RunFolder],
        should_stop: Callable[[], bool] | None,
    ) -> None:
        super().__init__(folders[0], history.config, should_stop)
        self.module, self.history, self.folders = module, history, folders

    def _keep_weights(self, trainer: Trainer, step: int) -> None:
        for member in self.history.running():
            self.module.save_member(member, self.folders[member].kept_checkpoint(step), weights_only=True)

    def _save(self, trainer: Trainer, step: int) -> None:
        running = self.history.running()
        # Removed last, so that a killed process leaves checkpoints of all members at one step.
        others = [path for member in running for path in self.folders[member].other_checkpoints(step)]
        for member in running:
            self.module.save_member(member, self.folders[member].checkpoint(step))
        remove(others)


def _mean(losses: Iterable[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if known else None

"""The LightningModule of a run: loss, optimizer, schedule and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Self, TypeVar

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lit_mult.config import RunConfig
from lit_mult.method.plan import plan_run
from lit_mult.method.schedule import schedule_factor
from lit_mult.nn.functional import cross_entropy_and_log_z
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.nn.precision import keeping_float32
from lit_mult.optim.clipping import clip_gradients, gradient_norm
from lit_mult.optim.groups import ParameterPlan, parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.roles import Role
from lit_mult.training import fsdp2, qk_clip

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_MODELS = 64
"""Model shapes that a process may compile; torch's default limit is 8."""


def predict(model: Llama, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) in float32, and their mean cross-entropy () in nats per token."""
    logits_BTV = model(window_BT1[:, :-1]).float()
    return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), window_BT1[:, 1:].flatten())


def objective(model: Llama, window_BT1: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Training loss () with z-loss, and mean cross-entropy () without it; nats per token."""
    if not z_loss:
        _, cross_entropy = predict(model, window_BT1)
        return cross_entropy, cross_entropy
    logits_BTV = model(window_BT1[:, :-1]).float()
    loss_N, log_z_N = cross_entropy_and_log_z(logits_BTV.flatten(0, 1), window_BT1[:, 1:].flatten())
    # arXiv:2204.02311 sec. 5: keeps the softmax normalizer near 1.
    return (loss := loss_N.mean()) + z_loss * log_z_N.square().mean(), loss


def compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function under torch.compile, recompiled for every shape.

    Models of the same structure share compiled code: in this process, and in others through inductor's disk cache.
    """
    from torch._dynamo import config  # takes a second, and most runs are not compiled

    config.recompile_limit = max(config.recompile_limit, _MODELS)
    return torch.compile(function, dynamic=False)


class ValidationLoss(Metric):
    """Weighted mean, NaN if a value is; in float32 also of a module that is cast to 16 bits, whose sums stop growing.

    torchmetrics' MeanMetric leaves NaN out or, told not to look for it, leaves out the weights.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, *shape: int) -> None:
        """`shape`: of the values; () by default."""
        super().__init__()
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: int) -> None:
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        super()._apply(keeping_float32(fn), exclude_state)
        return self


class LitLlama(LightningModule):
    """Trains the model of a `RunConfig`; batches are windows (B, T+1) of token ids."""

    def __init__(self, config: dict[str, Any], vocab_size: int) -> None:
        """Take the config as plain values, so that checkpoints load with weights_only.

        The model is initialized at random: `make_module` loads the weights of `model.pretrained`, so that a checkpoint
        can be restored without that folder.
        """
        super().__init__()
        self.save_hyperparameters()
        self.config = RunConfig.from_dict(config)
        self.plan = plan_run(self.config, vocab_size)
        self.model = Llama(self.config.model, self.plan)
        initialize(self.model, self.plan, self.config.seed)
        # Training only: validation would be compiled separately, and is rare.
        self._objective = compiled(objective) if self.config.trainer.compile else objective
        self._logits: qk_clip.Logits = {}
        if self.config.optim.qk_clip is not None:
            qk_clip.watch(self.model, self._logits)
        self.val_loss = ValidationLoss()
        self.last_train_loss: Tensor | None = None
        """Mean cross-entropy () of the latest micro-batch, z-loss left out."""

    def plan_parameters(self) -> list[ParameterPlan]:
        """See `optim.groups.plan_parameters`."""
        return plan_parameters(self.model, self.plan)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(ids_BT)
        return logits_BTV

    def training_loss(self, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """See `objective`."""
        return self._objective(self.model, window_BT1, self.config.model.z_loss)

    def training_step(self, window_BT1: Tensor, batch_index: int) -> Tensor:
        loss, cross_entropy = self.training_loss(window_BT1)
        self.last_train_loss = cross_entropy.detach()
        return loss

    def validation_step(self, window_BT1: Tensor, batch_index: int) -> None:
        _, loss = predict(self.model, window_BT1)
        self.val_loss.update(loss, weight=window_BT1[:, 1:].numel())

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of `training.fsdp2`
            fsdp2.shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        rows = self.plan_parameters()
        optimizer = HybridOptimizer(parameter_groups(rows), self.config.optim)
        self._all = [row.parameter for row in rows]
        self._without_multipliers = [row.parameter for row in rows if row.role is not Role.MULTIPLIER]
        steps, schedule = self.config.train.steps, self.config.schedule
        scheduler = LambdaLR(optimizer, lambda step: schedule_factor(step, steps, schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.config.optim.qk_clip is not None:
            qk_clip.clip(self._logits, self.config.optim.qk_clip)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.device_mesh is not None:
            fsdp2.average_whole(self._all, self.device_mesh["data_parallel"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.logger is not None and (self.global_step + 1) % self.config.train.log_every == 0:
            self.log("grad_norm/with_multipliers", gradient_norm(self._all))
            self.log("grad_norm/without_multipliers", gradient_norm(self._without_multipliers))
        if self.config.optim.clip is not None:
            clipped = self._all if self.config.optim.clip_multipliers else self._without_multipliers
            clip_gradients(clipped, self.config.optim.clip)


def make_module(config: RunConfig, vocab_size: int) -> LitLlama:
    """The module of a run before its first step: initialized at random, or from `model.pretrained`."""
    module = LitLlama(config.to_dict(), vocab_size)
    if config.model.pretrained is not None:
        from lit_mult.hf.pretrained import start_from_pretrained

        # Also when a run resumes: if its checkpoints are damaged, it starts again.
        start_from_pretrained(module.model, module.plan, config)
    return module

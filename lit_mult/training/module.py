"""The LightningModule: loss, optimizer, schedule and clipping of one run."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lit_mult.config import RunConfig
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.optim.clipping import clip_gradients, gradient_norm
from lit_mult.optim.groups import ParameterPlan, parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.optim.schedules import schedule_factor
from lit_mult.registry.roles import Role
from lit_mult.training.objective import compiled, objective, predict


class LitLlama(LightningModule):
    """Trains the model of a `RunConfig`; batches are windows (B, T+1) of token ids."""

    def __init__(self, config: dict[str, Any], vocab_size: int) -> None:
        """Take the config as plain values: they are what a checkpoint may hold and still load with weights_only.

        The model starts at random; it is `run` that puts the weights of `model.pretrained` in, so that a checkpoint
        can be restored where that folder is not.
        """
        super().__init__()
        self.save_hyperparameters()
        self.config = RunConfig.from_dict(config)
        self.plan = plan_run(self.config, vocab_size)
        self.model = Llama(self.config.model, self.plan)
        initialize(self.model, self.plan, self.config.seed)
        # Training alone: validation is rare, and would have to be compiled anew.
        self._objective = compiled(objective) if self.config.trainer.compile else objective
        self.val_loss = MeanMetric(nan_strategy="disable")  # a loss that is not a number must be seen
        self.last_train_loss: Tensor | None = None
        """Mean cross-entropy () of the latest micro-batch, z-loss left out."""

    def plan_parameters(self) -> list[ParameterPlan]:
        """Role, optimizer, lr, weight decay and start of every trainable parameter."""
        return plan_parameters(self.model, self.plan)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(ids_BT)
        return logits_BTV

    def training_loss(self, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """What training minimizes (), and its mean cross-entropy (), z-loss left out; nats per token."""
        return self._objective(self.model, window_BT1, self.config.model.z_loss)

    def training_step(self, window_BT1: Tensor, batch_index: int) -> Tensor:
        loss, cross_entropy = self.training_loss(window_BT1)
        self.last_train_loss = cross_entropy.detach()
        return loss

    def validation_step(self, window_BT1: Tensor, batch_index: int) -> None:
        _, loss = predict(self.model, window_BT1)
        self.val_loss.update(loss, weight=window_BT1[:, 1:].numel())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        rows = self.plan_parameters()
        optimizer = HybridOptimizer(parameter_groups(rows), self.config.optim)
        self._all = [row.parameter for row in rows]
        self._without_multipliers = [row.parameter for row in rows if row.role is not Role.MULTIPLIER]
        steps, schedule = self.config.train.steps, self.config.schedule
        scheduler = LambdaLR(optimizer, lambda step: schedule_factor(step, steps, schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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

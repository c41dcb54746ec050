"""For Lightning: clipping without the multipliers, and a check of the optimizer."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lit_mult.errors import UserError
from lit_mult.inject.callbacks import MultiplierHooks


class MultiplierCallback(MultiplierHooks, Callback):
    """Give it to `Trainer(callbacks=...)`, without `gradient_clip_val`; `configure_optimizers` returns one of ours:

    return lit_mult.HybridOptimizer(lit_mult.build_param_groups(self, lr=3e-4))
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises: UserError, as `MultiplierHooks.start`; or gradients are scaled (precision 16-mixed)."""
        if trainer.precision == "16-mixed":
            raise UserError("Trainer.precision = 16-mixed: a callback sees scaled gradients; use bf16-mixed")
        self.start(pl_module, list(trainer.optimizers), trainer.gradient_clip_val, "gradient_clip_val")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.before_step(pl_module)

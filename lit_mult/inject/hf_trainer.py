"""For transformers' `Trainer`: clipping without the multipliers, and a check of the optimizer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lit_mult.errors import UserError
from lit_mult.inject.callbacks import MultiplierHooks


class MultiplierTrainerCallback(MultiplierHooks, TrainerCallback):
    """Give it to `Trainer(callbacks=...)`, with `TrainingArguments(max_grad_norm=0)` and an optimizer of ours:

    optimizer = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=3e-4))
    Trainer(model, args, optimizers=(optimizer, None), callbacks=[lit_mult.MultiplierTrainerCallback(1.0)])
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Raises: UserError, as `MultiplierHooks.start`; or gradients are scaled (fp16), or DeepSpeed keeps them."""
        for name in ("fp16", "deepspeed"):
            if getattr(args, name, None):
                raise UserError(f"TrainingArguments.{name}: a callback cannot clip its gradients; use bf16 and FSDP")
        optimizer = getattr(context["optimizer"], "optimizer", context["optimizer"])  # without accelerate's wrapper
        self.start(context["model"], [optimizer], args.max_grad_norm, "max_grad_norm")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        self.before_step(context["model"])

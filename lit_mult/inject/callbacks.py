"""What a Trainer must not do to multipliers, whichever one: clip them with the rest, or decay them like matrices."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_mult.errors import UserError
from lit_mult.inject.groups import clip_grad_norm_, multipliers_in
from lit_mult.inject.layers import specs_of
from lit_mult.inject.model import with_specs
from lit_mult.inject.noise import NoiseTwin
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.optim.sharding import reshard


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """See that every multiplier is trained, and decays less than the matrices do.

    Raises:
        UserError: a multiplier is in no group, or in one with a matrix, or with the weight decay of one; or
            `add_multipliers` has not been called (kind "none" makes a baseline).
    """
    reshard(model)
    matrices = {id(module._parameters[name]) for module in with_specs(model) for name in specs_of(module)}
    multipliers = {id(one): one for one in multipliers_in(model)}
    groups = optimizer.param_groups
    if not isinstance(optimizer, HybridOptimizer):
        for name in sorted({group.get("optimizer", "adamw") for group in groups} - {"adamw"}):
            raise UserError(f"groups are for {name}, which {type(optimizer).__name__} is not; use HybridOptimizer")
        for rule in sorted({group["decay_rule"] for group in groups if "decay_rule" in group}):
            raise UserError(f"groups have {rule} decay, which {type(optimizer).__name__} has not; use HybridOptimizer")
    most = max(
        (group.get("weight_decay", 0.0) for group in groups if any(id(one) in matrices for one in group["params"])),
        default=0.0,
    )
    seen = set()
    for group in groups:
        own = {id(one) for one in group["params"]} & multipliers.keys()
        seen |= own
        if own and any(id(one) in matrices for one in group["params"]):
            raise UserError("multipliers share a parameter group with matrices; make groups with build_param_groups")
        decay = group.get("weight_decay", 0.0)
        if own and most and decay >= most:
            what = f"multipliers have weight_decay {decay:g}, as matrices have"
            raise UserError(f"{what}; make groups with build_param_groups (multiplier_weight_decay=2e-3)")
    if missing := sum(one.requires_grad for key, one in multipliers.items() if key not in seen):
        raise UserError(f"{missing} multipliers are in no parameter group; make the optimizer after add_multipliers")


class MultiplierHooks:
    """First base of the callbacks of all Trainers: checks the optimizer, clips, and moves pure noise beside the model.

    `readings` has a row a parameter every `noise_every` steps: those of `NoiseTwin.norms`, with the step.
    """

    def __init__(self, max_norm: float | None = 1.0, noise_every: int | None = None) -> None:
        """The arguments.

        Args:
            max_norm: of the gradient without the multipliers; None: no clipping.
            noise_every: steps from one row of `readings` to the next: norms beside those of pure noise (`NoiseTwin`).
        """
        self.max_norm, self.noise_every = max_norm, noise_every
        self.readings: list[dict[str, Any]] = []
        self._noise: NoiseTwin | None = None
        self._step = 0

    def start(self, model: nn.Module, optimizers: list[Optimizer], clips: Any, flag: str) -> None:
        """Before the first step. Raises: UserError when the Trainer itself clips too, or as `check_optimizer`."""
        if clips:
            raise UserError(f"{flag} = {clips}: clips the multipliers too; set it to 0 or None, the callback clips")
        if len(optimizers) != 1:
            raise UserError(f"there are {len(optimizers)} optimizers; use one, such as HybridOptimizer")
        check_optimizer(model, optimizers[0])
        if self.noise_every is not None:
            self._noise = NoiseTwin(model, optimizers[0])

    def before_step(self, model: nn.Module) -> None:
        """Before every step of the optimizer, once gradients are complete."""
        if self.max_norm is not None:
            clip_grad_norm_(model, self.max_norm)
        if self._noise is not None and self.noise_every is not None:
            if self._step % self.noise_every == 0:
                self.readings += [{"step": self._step, **row} for row in self._noise.norms()]
            self._noise.step()  # at the learning rates of the model's own step
            self._step += 1

"""Which runs can be stacked: those of equal shapes, data and steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Final

from lit_mult.config import RunConfig, flatten
from lit_mult.method.placement import place
from lit_mult.registry.optimizers import OPTIMIZERS, optimizers_of

MEMBER_FIELDS: Final = (
    "seed",
    "multipliers",
    "placement",
    "parametrization",
    "optim.lr",
    "optim.weight_decay",
    "optim.weight_decay_mode",
    "optim.vector_lr",
    "optim.vector_lr_mode",
    "optim.multiplier_lr",
    "optim.multiplier_weight_decay",
    "optim.clip",
    "optim.clip_multipliers",
    "schedule",
    "train.divergence_factor",
    "model.z_loss",
)
"""Fields, or whole sections, of a run config in which the members of a stack may differ."""

# Member fields that affect something which members must share.
_SHARED_IN_PART = ("multipliers", "placement", "parametrization.attention_scale")


def stack_key(config: RunConfig) -> str | None:
    """A hash that is equal for runs that can be stacked; None for a run that cannot.

    It covers all fields except `MEMBER_FIELDS`, the learnable multipliers of every matrix, and the attention scale.

    Raises:
        ConfigError: an override of the placement is not usable.
    """
    if not _can_be_stacked(config):
        return None
    fields = flatten(config.to_dict())
    shared = {field: value for field, value in fields.items() if not _is_within(field, MEMBER_FIELDS)}
    axes = place(config.multipliers, config.placement, config.model.matrix_roles())
    shared["axes"] = {name: sorted(placed) for name, placed in axes.items()}
    shared["attention_scale"] = config.parametrization.attention_scale
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def always_stackable(fields: Iterable[str]) -> bool:
    """Whether runs that differ only in these dotted fields always have the same key (or None)."""
    return all(_is_within(field, MEMBER_FIELDS) and not _is_within(field, _SHARED_IN_PART) for field in fields)


def _can_be_stacked(config: RunConfig) -> bool:
    trainer = config.trainer
    return not (
        config.model.dropout  # its random numbers would differ
        or config.train.diagnostics
        or config.optim.qk_clip  # forms logits of its own
        or trainer.accumulate_grad_batches > 1
        or trainer.devices != 1
        or trainer.num_nodes != 1
        or trainer.strategy != "auto"
        or trainer.tensorboard
        or trainer.extra
        or trainer.precision.startswith("16")  # the gradient scaler skips a step of all members if one overflows
        or trainer.precision == "bf16-true"  # has parameters of two types, and a stack's share one buffer
        or any(OPTIMIZERS[name].stacked is None for name in optimizers_of(config.optimizer))
    )


def _is_within(field: str, parts: Iterable[str]) -> bool:
    return any(field == part or field.startswith(f"{part}.") for part in parts)

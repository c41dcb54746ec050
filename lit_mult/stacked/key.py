"""Which runs may be trained together as one stacked model: those of equal shapes, data and steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Final

from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError
from lit_mult.method.placement import place
from lit_mult.registry.optimizers import check_stacked_form

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
"""Dotted fields, or whole sections, of a run config in which the members of one stack may differ."""

# Of these, the ones that can still tell two members apart: by the multipliers that exist, or by a factor they share.
_SHARED_IN_PART = ("multipliers", "placement", "parametrization.attention_scale")


def stack_key(config: RunConfig) -> str | None:
    """What a run has in common with all runs that it may be stacked with; None where it must be trained by itself.

    Runs of equal keys are equal in all fields but `MEMBER_FIELDS`, and in the learnable multipliers of every matrix
    and the scale of attention, on which these fields may also bear.

    Raises:
        ConfigError: an override of the placement is not usable.
    """
    try:
        check_stacked_form(config.optimizer)
    except ConfigError:
        return None
    if not _may_be_stacked(config):
        return None
    shared = config.to_dict()
    for field in MEMBER_FIELDS:
        section, _, leaf = field.partition(".")
        if leaf:
            del shared[section][leaf]
        else:
            del shared[section]
    axes = place(config.multipliers, config.placement, config.model.matrix_roles())
    shared["axes"] = {name: sorted(placed) for name, placed in axes.items()}
    shared["attention_scale"] = config.parametrization.attention_scale
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def always_stackable(fields: Iterable[str]) -> bool:
    """Whether runs that differ in these dotted fields and no others are sure to have one key (or none, all of them)."""
    return all(_is_within(field, MEMBER_FIELDS) and not _is_within(field, _SHARED_IN_PART) for field in fields)


def _may_be_stacked(config: RunConfig) -> bool:
    trainer = config.trainer
    return not (
        config.model.dropout  # its random stream would be another
        or config.train.diagnostics
        or trainer.accumulate_grad_batches > 1
        or trainer.devices != 1
        or trainer.num_nodes != 1
        or trainer.strategy != "auto"
        or trainer.tensorboard
        or trainer.extra
        or trainer.precision.startswith("16")  # a gradient scaler, which one member's overflow sets back for all
    )


def _is_within(field: str, parts: Iterable[str]) -> bool:
    return any(field == part or field.startswith(f"{part}.") for part in parts)

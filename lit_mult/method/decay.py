"""The weight decay of one matrix, from `optim.weight_decay` and its mode, as pure functions.

With lr_t the learning rate of a step and lr its peak, a step removes from a matrix

| mode        | share                                                 | source                               |
|-------------|-------------------------------------------------------|--------------------------------------|
| coupled     | lr_t * weight_decay                                   | arXiv:1711.05101                     |
| independent | lr_t / lr * weight_decay                              | arXiv:2309.14322 sec. 3.2.2          |
| timescale   | lr_t / lr * weight_decay / steps                      | arXiv:2405.13698                     |
| corrected   | lr_t^2 / lr * weight_decay, of `NORMALIZED` roles     | AdamC, arXiv:2506.02285              |
| cautious    | lr_t * weight_decay, of entries that the update shrinks | arXiv:2510.12402                   |

Under timescale, `optim.weight_decay` is the number of decay times of a run, lr * decay * steps (`method.regime`), the
same at every learning rate, width and length; steps are those at the peak lr (`method.schedule.peak_steps`). It is the
run over the timescale 1 / (lr * decay) of the average of updates that a weight is.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from lit_mult.errors import ConfigError
from lit_mult.registry.optimizers import OPTIMIZERS, unsupported
from lit_mult.registry.roles import HIDDEN_ROLES, SSM_ROLES, Role

DecayRule = Literal["plain", "corrected", "cautious"]
"""What a step does with lr * weight_decay: all of it; times lr over its peak; or at some entries (`optim.decay`)."""

BY_LR: Final = frozenset({"coupled", "corrected", "cautious"})
"""Modes in which the share is proportional to the peak lr."""

NORMALIZED: Final = HIDDEN_ROLES | SSM_ROLES | {Role.EMBEDDING, Role.POSITION}
"""Roles that a norm follows: all but head and router. Before each block RMSNorm divides out the common scale of what
was added to the residual stream (embedding, o_proj, down_proj); that of q, k, v, gate and up reaches it through
these. Logits are not normalized."""


class Decay(NamedTuple):
    """How a matrix decays."""

    weight_decay: float
    """For the optimizer: lr * weight_decay is the share that a step removes at the peak lr."""
    rule: DecayRule = "plain"


def decay_of(
    optimizer: str,
    mode: str,
    weight_decay: float,
    role: Role | None,
    lr: float,
    *,
    width_factor: float = 1.0,
    steps: float | None = None,
    is_head: bool = False,
    section: str = "",
) -> Decay:
    """The decay of one matrix; that of its optimizer, if it has one of its own or none.

    Args:
        optimizer: that trains it.
        mode: as in the table above.
        weight_decay: the run's, times that of the role.
        role: of the matrix; None if unknown, which counts as hidden.
        lr: its peak learning rate.
        width_factor: of the width rule, for the modes of `BY_LR`; the others divide the lr out.
        steps: at the peak lr, for timescale.
        is_head: whether a head shares the matrix.
        section: of the settings that errors name, such as "optim.".

    Raises:
        ConfigError: there is no such mode, or the optimizer does not support it; or timescale has no steps, or would
            decay by all of the matrix.
    """
    spec = OPTIMIZERS[optimizer]
    if not spec.decays or spec.own_decay is not None:
        return Decay(spec.own_decay or 0.0)
    match mode:
        case "coupled":
            return Decay(weight_decay * width_factor)
        case "independent":
            return Decay(weight_decay / lr)
        case "timescale":
            if not steps:
                need = "needs steps between warmup and final decay, over which it counts decay times"
                raise ConfigError(f"{section}weight_decay_mode", mode, need)
            if weight_decay >= steps:
                allowed = f"as a number of decay times (timescale) must be below the {steps:g} steps at the peak lr"
                raise ConfigError(f"{section}weight_decay", weight_decay, allowed)
            return Decay(weight_decay / (lr * steps))
        case "corrected":
            normalized = (role is None or role in NORMALIZED) and not is_head
            return Decay(weight_decay * width_factor, "corrected" if normalized else "plain")
        case "cautious":
            if not spec.decays_entries:
                raise unsupported(optimizer, "decay of entries", f"{section}weight_decay_mode = {mode}")
            return Decay(weight_decay * width_factor, "cautious")
        case unknown:
            allowed = "must be coupled, independent, corrected, cautious or timescale"
            raise ConfigError(f"{section}weight_decay_mode", unknown, allowed)

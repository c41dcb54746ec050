"""Search space of the muP multipliers at each tier (arXiv:2601.04890 fig. 7), as factors around 1.

    tier   part             roles                                                      range
    NONE   nothing
    LR     lr               all nine                                                   2^-2 .. 2^2
    LRWD   lr               all nine                                                   2^-2 .. 2^2
           weight_decay     all nine                                                   2^-2 .. 2^2
    FULL   lr               all nine                                                   2^-2 .. 2^2
           weight_decay     all nine                                                   2^-2 .. 2^2
           forward          embedding, k_proj, o_proj, gate_proj, down_proj, lm_head   2^-3 .. 2^3

The nine roles are embedding, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and lm_head; a tied lm_head
has the embedding's lr and weight decay, and none to search. Factors are sampled log-uniformly, and multiply the width
rule's factor and the base learning rate or weight decay.

The forward multipliers are those that Falcon-H1 tuned away from 1 (arXiv:2507.22448). The other three are redundant, as
only products of two scales matter: q_proj times k_proj in attention logits, v_proj times o_proj in attention outputs,
and up_proj times down_proj in the gated MLP. The scale of gate_proj matters alone: it sets how sharply the gate opens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lit_mult.config import Tier
from lit_mult.method.presets import RATE_PARTS, TIER_PARTS, Part
from lit_mult.registry.roles import MATRIX_ROLES, Role

_MATRIX_ROLES = tuple(role for role in Role if role in MATRIX_ROLES)
_RATES = (2.0**-2, 2.0**2)

SEARCHED: Final[dict[Part, tuple[tuple[Role, ...], tuple[float, float]]]] = {
    "lr": (_MATRIX_ROLES, _RATES),
    "weight_decay": (_MATRIX_ROLES, _RATES),
    "forward": (
        (Role.EMBEDDING, Role.K_PROJ, Role.O_PROJ, Role.GATE_PROJ, Role.DOWN_PROJ, Role.LM_HEAD),
        (2.0**-3, 2.0**3),
    ),
}
"""Part -> roles whose factor is searched, and its (low, high)."""


def search_space(tier: Tier, *, tied_head: bool = False) -> dict[str, tuple[float, float]]:
    """Dotted config field (`parametrization.forward.k_proj`) -> (low, high), to be searched log-uniformly.

    Without the lr and weight decay of a tied LM head, which are the embedding's.
    """
    return {
        f"parametrization.{part}.{role}": bounds
        for part in TIER_PARTS[tier]
        for roles, bounds in [SEARCHED[part]]
        for role in roles
        if not (tied_head and part in RATE_PARTS and role is Role.LM_HEAD)
    }


def neutral(fields: Iterable[str]) -> dict[str, float]:
    """The point of a search space with all factors 1: the untuned model."""
    return dict.fromkeys(fields, 1.0)

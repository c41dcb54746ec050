"""What a tuning of the muP multipliers searches at each tier (arXiv:2601.04890 fig. 7), as factors around 1.

    tier   part             roles                                                      range
    NONE   nothing
    LR     lr               all nine                                                   2^-2 .. 2^2
    LRWD   lr               all nine                                                   2^-2 .. 2^2
           weight_decay     all nine                                                   2^-2 .. 2^2
    FULL   lr               all nine                                                   2^-2 .. 2^2
           weight_decay     all nine                                                   2^-2 .. 2^2
           forward          embedding, k_proj, o_proj, gate_proj, down_proj, lm_head   2^-3 .. 2^3

The nine roles are embedding, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and lm_head. Every factor is
searched uniformly in its logarithm; it comes on top of the width rule and of the base learning rate and weight decay.

The forward multipliers are those of these roles that Falcon-H1 tuned away from 1 (arXiv:2507.22448). The other three
are redundant, as only the product of two scales shows: the logits of attention hold q_proj times k_proj, its output is
linear in v_proj and in o_proj, that of the gated MLP in up_proj and in down_proj. The scale of gate_proj stands for
itself: it decides how sharply the gate opens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lit_mult.config import Tier
from lit_mult.method.presets import TIER_PARTS, Part
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


def search_space(tier: Tier) -> dict[str, tuple[float, float]]:
    """Dotted config field (`parametrization.forward.k_proj`) -> (low, high), to be searched log-uniformly."""
    ranges = {part: SEARCHED[part] for part in TIER_PARTS[tier]}
    return {f"parametrization.{part}.{role}": bounds for part, (roles, bounds) in ranges.items() for role in roles}


def neutral(fields: Iterable[str]) -> dict[str, float]:
    """The point of a search space at which every factor is 1: the untuned model."""
    return dict.fromkeys(fields, 1.0)

"""Roles of parameters."""

from __future__ import annotations

from enum import StrEnum

Shape = tuple[int, int]


class Role(StrEnum):
    """Role of a parameter, which determines its scaling and its optimizer."""

    EMBEDDING = "embedding"
    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"
    LM_HEAD = "lm_head"
    NORM = "norm"
    MULTIPLIER = "multiplier"


HIDDEN_ROLES = frozenset(
    {Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ, Role.O_PROJ, Role.GATE_PROJ, Role.UP_PROJ, Role.DOWN_PROJ}
)
"""Matrices between hidden activations: both dimensions grow with width."""

MATRIX_ROLES = HIDDEN_ROLES | {Role.EMBEDDING, Role.LM_HEAD}
"""Roles that a weight matrix can have; the others are vectors or scalars."""

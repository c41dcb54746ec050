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
    SSM_GATE = "ssm_gate"
    SSM_INPUT = "ssm_input"
    SSM_STEP = "ssm_step"
    SSM_OUT = "ssm_out"
    ROUTER = "router"
    POSITION = "position"
    NORM = "norm"
    MULTIPLIER = "multiplier"


HIDDEN_ROLES = frozenset(
    {Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ, Role.O_PROJ, Role.GATE_PROJ, Role.UP_PROJ, Role.DOWN_PROJ}
)
"""Matrices between hidden activations: both dimensions grow with width. All matrices of the blocks of a Llama."""

BRANCH_OUTPUTS = frozenset({Role.O_PROJ, Role.DOWN_PROJ})
"""Matrices that end a residual branch: a factor on them is one on the branch."""

SSM_ROLES = frozenset({Role.SSM_GATE, Role.SSM_INPUT, Role.SSM_STEP, Role.SSM_OUT})
"""Matrices of a Mamba2 block: Z; X, B and C; dt; and the output projection (arXiv:2601.04890 app. C)."""

MATRIX_ROLES = HIDDEN_ROLES | {Role.EMBEDDING, Role.LM_HEAD}
"""Roles of the matrices of a Llama. Other models also have those of `SSM_ROLES`, routers and learned positions."""

"""Which matrices have learnable multipliers: the paper's tables (arXiv:2601.04890 app. C), and overrides by pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lit_mult.errors import ConfigError
from lit_mult.registry.contracts import NONE, ROW, ROW_COLUMN, Axes, Axis
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.roles import Role

if TYPE_CHECKING:
    from lit_mult.config import MultiplierKind, PlacementConfig

# Matrices that a Llama does not have. The causal convolution scales X, B and C of a Mamba2 block.
_BEYOND_LLAMA = {
    Role.SSM_GATE: ROW,
    Role.SSM_INPUT: NONE,
    Role.SSM_STEP: ROW,
    Role.SSM_OUT: ROW_COLUMN,
    Role.ROUTER: NONE,
    Role.POSITION: NONE,
}

# RMSNorm weights act as column multipliers of a block's first matrices and of the head. Row multipliers on the head
# would be a shortcut to the marginal token distribution (paper sec. 4.4).
PLACEMENTS: dict[str, dict[Role, Axes]] = {
    # No two multipliers trade scale channel by channel (single factors remain, see redundancy.py).
    "minimal": {
        Role.EMBEDDING: ROW_COLUMN,
        Role.Q_PROJ: ROW,  # on the query, not the key: under grouped-query attention it gives a scale per query head
        Role.K_PROJ: NONE,
        Role.V_PROJ: NONE,
        Role.O_PROJ: ROW_COLUMN,
        Role.GATE_PROJ: ROW,
        Role.UP_PROJ: NONE,
        Role.DOWN_PROJ: ROW_COLUMN,
        Role.LM_HEAD: NONE,
        **_BEYOND_LLAMA,
    },
    # Used in the paper: slightly better, but its symmetries need weight decay on the multipliers.
    "full": {
        Role.EMBEDDING: ROW_COLUMN,
        Role.Q_PROJ: ROW,
        Role.K_PROJ: ROW,
        Role.V_PROJ: ROW,
        Role.O_PROJ: ROW_COLUMN,
        Role.GATE_PROJ: ROW,
        Role.UP_PROJ: ROW,
        Role.DOWN_PROJ: ROW_COLUMN,
        Role.LM_HEAD: NONE,
        **_BEYOND_LLAMA,
    },
}


def parse_axes(text: str, field: str = "placement.overrides") -> Axes:
    """Read "none", "row", "row+column", "scalar", ... as a set of axes.

    Raises:
        ConfigError: a part is not the name of an axis.
    """
    if text == "none":
        return NONE
    try:
        return frozenset(Axis(part) for part in text.split("+"))
    except ValueError:
        raise ConfigError(field, text, "must be none, or scalar, row, column joined by +") from None


def place(kind: MultiplierKind, placement: PlacementConfig, matrices: Mapping[str, Role]) -> dict[str, Axes]:
    """Learnable multipliers of every matrix.

    The kind transforms the axes of the table (`Kind.axes`). Overrides replace the result, in order, unless the kind has
    no learnable multipliers.

    Args:
        kind: the multiplier option of the run.
        placement: table and overrides.
        matrices: name -> role of every matrix of the model.

    Raises:
        ConfigError: an override's pattern matches no matrix, or its value is not a sum of axes.
    """
    chosen = KINDS[kind]
    placed = {name: chosen.axes(PLACEMENTS[placement.table][role]) for name, role in matrices.items()}
    for pattern, text in placement.overrides.items():
        axes = parse_axes(text, f"placement.overrides.{pattern}")
        matched = [name for name in matrices if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError("placement.overrides", pattern, f"matches no matrix; names are {_some(matrices)}")
        placed.update(dict.fromkeys(matched, axes if chosen.is_learnable else NONE))
    return placed


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join([*listed[:3], "..."] if len(listed) > 3 else listed)

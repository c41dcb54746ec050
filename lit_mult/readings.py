"""What a run can record on the way: the columns of its diagnostics, and where the file lies. Needs no torch.

A reading at step k belongs to the state after k optimizer steps: its weights, their outputs, the gradient of the batch
that comes next, and the update which that batch makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DIAGNOSTICS_NAME = "diagnostics.parquet"
DIAGNOSTICS = "diagnostics"
"""Folder in a study's results, with one file a cell."""


class Key(NamedTuple):
    """What a reading measures."""

    group: str
    """The diagnostic that asked for it, as in `train.diagnostics`."""
    quantity: str
    name: str
    """Module, such as layers.0.self_attn.q_proj; `model` for the whole of it."""
    layer: int | None
    """None outside the blocks."""
    role: str
    """Role of a matrix, norm for the norms; attention, mlp, residual, logits or model for what is neither."""


COLUMNS = ("step", *Key._fields, "value")


def layer_of(name: str) -> int | None:
    """Block that a module belongs to: 3 for layers.3.mlp."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


def find_diagnostics(folder: Path) -> list[Path]:
    """Paths of the diagnostics of all runs below a folder (a run's or a study's), in a fixed order."""
    found = folder.rglob("*.parquet")
    return sorted(path for path in found if path.name == DIAGNOSTICS_NAME or path.parent.name == DIAGNOSTICS)

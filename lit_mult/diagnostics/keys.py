"""Columns of a run's diagnostics. Needs no torch.

A row is a *reading*: one quantity of one module at one step. Step k is the state after k optimizer steps: its weights
and outputs, and the gradient and the update of the next batch.
"""

from __future__ import annotations

from typing import NamedTuple


class MetricKey(NamedTuple):
    """Identifies a reading, except for its step."""

    group: str
    """Name of the group in `train.diagnostics`."""
    quantity: str
    name: str
    """Module, such as layers.0.self_attn.q_proj; or `model`."""
    layer: int | None
    """None outside the blocks."""
    role: str
    """Role of a matrix, norm for norms; otherwise attention, mlp, residual, logits or model."""


COLUMNS = ("step", *MetricKey._fields, "value")


def layer_of(name: str) -> int | None:
    """Index of a module's block: 3 for layers.3.mlp."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None

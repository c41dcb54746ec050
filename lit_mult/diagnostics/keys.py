"""What a run can record while it trains: the columns of its diagnostics. Needs no torch.

A row is a *reading*: one quantity of one module at one step. A reading at step k belongs to the state after k optimizer
steps: its weights, their outputs, the gradient of the batch that comes next, and the update which that batch makes.
"""

from __future__ import annotations

from typing import NamedTuple


class MetricKey(NamedTuple):
    """What a reading measures."""

    group: str
    """The group that asked for it, as in `train.diagnostics`."""
    quantity: str
    name: str
    """Module, such as layers.0.self_attn.q_proj; `model` for the whole of it."""
    layer: int | None
    """None outside the blocks."""
    role: str
    """Role of a matrix, norm for the norms; attention, mlp, residual, logits or model for what is neither."""


COLUMNS = ("step", *MetricKey._fields, "value")


def layer_of(name: str) -> int | None:
    """Block that a module belongs to: 3 for layers.3.mlp."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None

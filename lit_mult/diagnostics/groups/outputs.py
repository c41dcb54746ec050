"""Sizes of activations on a fixed batch."""

from __future__ import annotations

from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.readings import Reading


class Outputs(Group):
    """RMS of the activations that `diagnostics.probe` measures."""

    def state(self, moment: Moment) -> list[Reading]:
        return moment.outputs

"""Sizes of matrices, effective matrices, multipliers and norm weights."""

from __future__ import annotations

from collections.abc import Iterator

from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import device_rms, matrices, parts
from lit_mult.diagnostics.readings import Reading


class Norms(Group):
    """weight_rms, row_rms, column_rms, norm_rms; scalar_value and norm_value of scalars; effective_rms.

    A tied head has an effective_rms, but shares the embedding's weight_rms.
    """

    def state(self, moment: Moment) -> Iterator[Reading]:
        for part in parts(moment.model):
            if part.parameter.ndim:
                yield part.reading("rms", device_rms(part.parameter))
            else:
                yield part.reading("value", part.parameter.detach().float())
        for name, matrix in matrices(moment.model):
            yield Reading("effective_rms", name, matrix.role.value, device_rms(matrix.effective_weight()))

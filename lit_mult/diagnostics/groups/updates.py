"""Relative size of updates of parameters and effective matrices."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import device_rms, matrices, parts, trainable_parts
from lit_mult.diagnostics.readings import Reading


class Updates(Group):
    """RMS of the change over the RMS before, of parameters (weight_update, row_update, ...) and effective matrices."""

    def __init__(self) -> None:
        self._before: dict[int, Tensor] = {}  # by the identity of the parameter

    def before_update(self, moment: Moment) -> tuple[()]:
        self._before = {id(part.parameter): part.parameter.detach().clone() for part in parts(moment.model)}
        return ()

    def after_update(self, moment: Moment) -> Iterator[Reading]:
        before, self._before = self._before, {}
        for part in trainable_parts(moment.model):
            yield part.reading("update", _relative(part.parameter, before[id(part.parameter)]))
        for name, matrix in matrices(moment.model):
            multipliers = {axis.value: before[id(part)] for axis, part in matrix.multipliers.items()}
            old = matrix.form(before[id(matrix.weight)], **multipliers)
            yield Reading("effective_update", name, matrix.role.value, _relative(matrix.effective_weight(), old))


def _relative(after: Tensor, before: Tensor) -> Tensor:
    before = before.float()
    return device_rms(after.float() - before) / device_rms(before)

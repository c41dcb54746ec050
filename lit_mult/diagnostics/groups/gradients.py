"""Sizes of gradients, before clipping."""

from __future__ import annotations

from collections.abc import Iterator

from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import device_rms, trainable_parts
from lit_mult.diagnostics.readings import Reading
from lit_mult.optim.clipping import gradient_norm


class Gradients(Group):
    """RMS of every parameter's gradient (weight_gradient_rms, row_gradient_rms, ...), and 2-norms of all together.

    gradient_norm_without_multipliers is what the paper clips (arXiv:2601.04890 sec. 4.3).
    """

    def before_update(self, moment: Moment) -> Iterator[Reading]:
        parts = [part for part in trainable_parts(moment.model) if part.parameter.grad is not None]
        for part in parts:
            assert part.parameter.grad is not None
            yield part.reading("gradient_rms", device_rms(part.parameter.grad))
        without = [part.parameter for part in parts if part.kind in ("weight", "norm")]
        for what, parameters in (("with", [part.parameter for part in parts]), ("without", without)):
            norm = gradient_norm(parameters).float()
            yield Reading(f"gradient_norm_{what}_multipliers", "model", "model", norm)

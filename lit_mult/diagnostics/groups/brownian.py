"""The Brownian reference of `diagnostics.trapped` over the course of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lit_mult.config import RunConfig
from lit_mult.diagnostics.brownian import check_noise_references
from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import trainable_parts
from lit_mult.diagnostics.readings import Reading
from lit_mult.diagnostics.trapped import references
from lit_mult.nn.llama import Llama


class Brownian(Group):
    """weight_noise_rms, row_noise_rms, ... every `train.diagnostics_every` steps and at the end.

    Also at the end: weight_moved and weight_noise_moved, ...
    """

    def check(self, config: RunConfig, processes: int) -> None:
        check_noise_references(config)

    def at_end(self, moment: Moment, start: Callable[[], Llama]) -> Iterator[tuple[int, Reading]]:
        config, end = moment.config, moment.step
        found = references(start(), moment.model, config, end, every=config.train.diagnostics_every)
        by_name = {reference.row.name: reference for reference in found}
        for part in trainable_parts(moment.model):
            reference = by_name[part.parameter_name]
            motion = reference.motion
            for step, norm in zip(motion.steps, motion.norm, strict=True):
                yield step, part.reading("noise_rms", torch.tensor(norm))
            yield end, part.reading("moved", torch.tensor(reference.moved))
            yield end, part.reading("noise_moved", torch.tensor(motion.moved))

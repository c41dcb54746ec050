"""What the tests of diagnostics share: readings of a model by module and quantity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor

from lit_mult.config import Diagnostic, RunConfig
from lit_mult.diagnostics.group import Moment, make_group
from lit_mult.diagnostics.readings import Reading
from lit_mult.nn.llama import Llama

GROUPS = list(get_args(Diagnostic))
Values = dict[tuple[str, str], float]
"""(module, quantity) -> value"""


def state(group: str, model: Llama, ids_BT: Tensor | None = None) -> Values:
    """What a group reads of the state of a model."""
    with torch.no_grad():
        return values(make_group(group).state(moment(model, ids_BT)))


def updates(model: Llama, change: Callable[[], Any]) -> Values:
    """What the group updates reads of a change."""
    group = make_group("updates")
    with torch.no_grad():
        assert not list(group.before_update(moment(model)))
        change()
        return values(group.after_update(moment(model)))


def moment(model: Llama, ids_BT: Tensor | None = None) -> Moment:
    module: Any = SimpleNamespace(model=model)
    return Moment(RunConfig(), module, 0, torch.zeros(1, 1) if ids_BT is None else ids_BT)


def values(readings: Iterable[Reading]) -> Values:
    """A reading that comes twice is an error."""
    taken = list(readings)
    found = {(reading.name, reading.quantity): float(reading.value) for reading in taken}
    assert len(found) == len(taken)
    return found


def rms(x: Tensor) -> float:
    return math.sqrt(float((x.detach().double() ** 2).mean()))

"""The parameters of a model by what they are in it: weights of matrices, their multipliers, norms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_mult.diagnostics.keys import MetricKey, layer_of
from lit_mult.nn.llama import RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix

Reading = tuple[MetricKey, Tensor]
"""What is measured, and its value () on the model's device; float32, as not every device has float64."""


@dataclass(frozen=True)
class Part:
    """One parameter."""

    module: str
    kind: str
    """weight, scalar, row or column of a matrix; norm."""
    role: str
    """Role of the matrix, for its multipliers too; norm."""
    parameter: nn.Parameter

    @property
    def parameter_name(self) -> str:
        """Name in the model's state."""
        return f"{self.module}.{'weight' if self.kind == 'norm' else self.kind}"

    def key(self, group: str, what: str) -> MetricKey:
        """Key of a quantity of this parameter, such as row_gradient_rms."""
        return MetricKey(group, f"{self.kind}_{what}", self.module, layer_of(self.module), self.role)


def parts(model: nn.Module) -> Iterator[Part]:
    """Every parameter once, frozen norms too; a tied head's weight is the embedding's."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield Part(name, "norm", module.role.value, module.weight)
        elif isinstance(module, MultipliedMatrix):
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                yield Part(name, "weight", module.role.value, module.weight)
            for axis, multiplier in module.multipliers.items():
                yield Part(name, axis.value, module.role.value, multiplier)


def trainable_parts(model: nn.Module) -> list[Part]:
    """Every parameter that the optimizer has."""
    return [part for part in parts(model) if part.parameter.requires_grad]


def matrices(model: nn.Module) -> Iterator[tuple[str, MultipliedMatrix]]:
    """Name and module of every matrix, a tied head too."""
    for name, module in model.named_modules():
        if isinstance(module, MultipliedMatrix):
            yield name, module


def rms(x: Tensor) -> Tensor:
    """Root mean square () of all entries, in float32: the paper's norm."""
    value: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())
    return value

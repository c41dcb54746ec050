"""The parameters and matrices of a model by kind and role, and norms of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.diagnostics.readings import Reading
from lit_mult.nn.llama import Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix


class TrainingModule(Protocol):
    """The part of the run's LightningModule that diagnostics use."""

    model: Llama

    def training_loss(self, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss () with z-loss, and mean cross-entropy ()."""

    def configure_optimizers(self) -> Any: ...

    def configure_gradient_clipping(self, optimizer: Optimizer) -> None: ...


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
        """Name in the model's state dict."""
        return f"{self.module}.{'weight' if self.kind == 'norm' else self.kind}"

    def reading(self, what: str, value: Tensor) -> Reading:
        """A reading of this parameter, named KIND_WHAT, such as row_gradient_rms."""
        return Reading(f"{self.kind}_{what}", self.module, self.role, value)


def parts(model: nn.Module) -> Iterator[Part]:
    """Every parameter once, including frozen norms; a tied head's weight counts as the embedding's."""
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
    """The parameters that the optimizer trains."""
    return [part for part in parts(model) if part.parameter.requires_grad]


def matrices(model: nn.Module) -> Iterator[tuple[str, MultipliedMatrix]]:
    """Name and module of every matrix, including a tied head."""
    for name, module in model.named_modules():
        if isinstance(module, MultipliedMatrix):
            yield name, module


def rms(x: Tensor) -> float:
    """Root mean square of all entries, in float64: the norm of arXiv:2601.04890."""
    return float(x.detach().double().square().mean().sqrt())


def device_rms(x: Tensor) -> Tensor:
    """`rms` as a tensor () in float32, without device synchronization."""
    value: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())
    return value

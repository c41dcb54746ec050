"""The coordinate check of models that were not built here: `inject` knows their matrices, hooks see their activations.

Activations are the outputs of every block (the modules in a list: `model.layers.0`), of the parts of a block that
matrices are in (`model.layers.0.mlp`), and of the head (`logits`), and the head's input (`head_input`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.diagnostics.coordinates import Matrix, step_without_gradients
from lit_mult.inject.groups import clip_grad_norm_
from lit_mult.inject.layers import MatrixSpec, effective, matrix_name, shape_of, specs_of
from lit_mult.registry.roles import Role

LossOf = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> loss ()."""


def next_token_loss(model: nn.Module, ids_BT1: Tensor) -> Tensor:
    """Mean cross-entropy () of token ids, by a model that returns logits (B, T, V), perhaps in `.logits`."""
    out = model(ids_BT1[:, :-1])
    logits_BTV: Tensor = getattr(out, "logits", out)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT1[:, 1:].flatten())


@dataclass(frozen=True)
class ModelMatrix:
    """A matrix that `add_multipliers` has seen."""

    module: nn.Module
    parameter: str
    spec: MatrixSpec

    @property
    def role(self) -> str:
        """Of its first part; empty where it is unknown."""
        return self.spec.roles[0] or ""

    @property
    def stored(self) -> nn.Parameter:
        """W as the module holds it."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """W, (..., d_out, d_in)."""
        return self.stored.mT if self.spec.transposed else self.stored

    def effective_weight(self) -> Tensor:
        """W_eff, (..., d_out, d_in), in float32 at least."""
        weight = effective(self.module, self.parameter)
        return (weight.mT if self.spec.transposed else weight).to(torch.promote_types(weight.dtype, torch.float32))


def matrices_of(model: nn.Module) -> dict[str, ModelMatrix]:
    """All matrices by name: module, or parameter if it is not called weight."""
    return {
        matrix_name(path, parameter): ModelMatrix(module, parameter, spec)
        for path, module in model.named_modules()
        for parameter, spec in specs_of(module).items()
    }


class MatrixFacts(NamedTuple):
    """What theory needs to know of a matrix."""

    role: str
    """Of its first part; the embedding's for a head that shares its weight."""
    shape: tuple[int, int]
    """(d_out, d_in)"""
    widths: tuple[str, str] | None
    """Optimizer and width rule that its lr is scaled for; None: it does not depend on width."""


def facts_of(model: nn.Module) -> dict[str, MatrixFacts]:
    """Of all matrices, by name."""
    own = matrices_of(model)
    embeddings = {id(one.stored) for one in own.values() if one.role == Role.EMBEDDING}
    return {
        name: MatrixFacts(
            Role.EMBEDDING if id(one.stored) in embeddings else one.role,
            shape_of(one.stored, one.spec),
            one.spec.width,
        )
        for name, one in own.items()
    }


@dataclass(frozen=True)
class ModelSubject:
    """`coordinates.Subject` of a model after `add_multipliers`."""

    model: nn.Module
    optimizer: Optimizer
    batches: Sequence[Any]
    """Of the steps, one after the other, and again from the first."""
    steps: int
    loss_of: LossOf
    max_norm: float | None
    """Of the gradient without the multipliers; None: no clipping."""

    def matrices(self) -> dict[str, Matrix]:
        return dict(matrices_of(self.model))

    @torch.no_grad()
    def activations(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs are those of modules with one matrix called weight; stacks of experts divide theirs out of sight."""
        found: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        own = matrices_of(self.model)
        seen = {part for name in own for part in _around(name)}

        def visit(name: str, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
            x = next((one for one in (*args, *given.values()) if isinstance(one, Tensor)), None)
            is_head = name in own and own[name].role == Role.LM_HEAD
            if x is not None and name in own and own[name].weight.ndim == 2 and x.numel():
                inputs[name] = x.float() if x.is_floating_point() else x
                if is_head:
                    found["head_input"] = x
            out = next(iter(out.values()), None) if isinstance(out, dict) else out
            out = out[0] if isinstance(out, tuple | list) and out else out
            if isinstance(out, Tensor) and (is_head or name in seen):
                found["logits" if is_head else name] = out

        was_training = self.model.training
        handles = [
            module.register_forward_hook(partial(visit, name), with_kwargs=True)
            for name, module in self.model.named_modules()
        ]
        try:
            self.loss_of(self.model.eval(), self.batches[0])
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        return found, inputs

    def train(self) -> None:
        self.model.train()
        for step in range(self.steps):
            self.optimizer.zero_grad()
            self.loss_of(self.model, self.batches[step % len(self.batches)]).backward()
            if self.max_norm is not None:
                clip_grad_norm_(self.model, self.max_norm)
            self.optimizer.step()

    def decay(self) -> None:
        step_without_gradients(self.model, self.optimizer)


def _around(name: str) -> Iterator[str]:
    """The block that a matrix is in, and the part of the block."""
    if block := re.match(r"((?:.*?\.)?\d+)\.(?:(\w+)\.)?", name):
        yield block[1]
        if block[2]:
            yield f"{block[1]}.{block[2]}"

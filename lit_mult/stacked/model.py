"""M models of equal shapes as one, whose parameters have a leading dimension M.

A small model's step on a GPU is dominated by kernel launches, and a stack launches as many kernels as one model.
Activations concatenate the members' batches to M*B rows. The modules below multiply each member's rows by its own
weights; all other operations are independent between rows.

Shapes in names: M members, B batch of one, N rows of one, T time, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_mult.nn.functional import RMSNormFunction
from lit_mult.nn.llama import MLP, Attention, HeadNorm, Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedEmbedding, MultipliedLinear, MultipliedMatrix


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Product of x (M*B, ..., d_in) with weight (M, d_out, d_in) -> (M*B, ..., d_out)."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    return torch.bmm(rows, weight.mT).view(*x.shape[:-1], weight.shape[-2])


def embedding(ids: Tensor, weight_MVD: Tensor) -> Tensor:
    """Rows of weight by id, ids (M*B, ...) -> (M*B, ..., D)."""
    M, V, _ = weight_MVD.shape
    first_M1 = torch.arange(0, M * V, V, device=ids.device)[:, None]
    return F.embedding((ids.reshape(M, -1) + first_M1).view_as(ids), weight_MVD.reshape(M * V, -1))


class _RMSNormFunction(RMSNormFunction):
    """x (M, N, D) / rms(x) * weight (M, 1, D)."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad_out * unit
        grad_weight = product.sum(1, keepdim=True) if ctx.needs_input_grad[1] else None
        along = torch.bmm(product, weight.mT).div_(-unit.shape[-1])
        grad_x = (grad_out * weight).addcmul_(unit, along).mul_(scale)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_MD: Tensor, eps: float) -> Tensor:
    """`nn.functional.rms_norm` of x (M*B, ..., D)."""
    rows_MND, weight_M1D = x.reshape(len(weight_MD), -1, x.shape[-1]), weight_MD[:, None]
    if torch.compiler.is_compiling():
        return (rows_MND * torch.rsqrt(rows_MND.square().mean(-1, keepdim=True) + eps) * weight_M1D).view_as(x)
    out: Tensor = _RMSNormFunction.apply(rows_MND, weight_M1D, eps)  # type: ignore[no-untyped-call]
    return out.view_as(x)


class _Matrix(MultipliedMatrix):
    """W_eff (M, d_out, d_in) from a weight of that shape, scalar (M,), row (M, d_out) and column (M, d_in)."""

    def effective_weight(self) -> Tensor:
        # The scale multiplies a vector (M, d) if there is one, or else the matrix.
        size = (-1, 1) if self.row is not None or self.column is not None else (-1, 1, 1)
        constant = self.constant.view(size) if isinstance(self.constant, Tensor) else self.constant
        scalar = None if self.scalar is None else self.scalar.view(size)
        return self.formula.effective_weight(self.weight, constant, scalar, self.row, self.column)


class _Linear(_Matrix, MultipliedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.effective_weight())


class _Embedding(_Matrix, MultipliedEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.effective_weight())


class _RMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight_MD = self.weight[:, None].expand(-1, self.size) if self.is_scalar else self.weight
        return rms_norm(x, weight_MD, self.eps)


class _HeadNorm(HeadNorm):
    norm = staticmethod(rms_norm)


class _Attention(Attention):
    linear = staticmethod(linear)


class _MLP(MLP):
    linear = staticmethod(linear)


_STACKED: dict[type[nn.Module], type[nn.Module]] = {
    MultipliedLinear: _Linear,
    MultipliedEmbedding: _Embedding,
    RMSNorm: _RMSNorm,
    HeadNorm: _HeadNorm,
    Attention: _Attention,
    MLP: _MLP,
}


@torch.no_grad()
def stack(models: Sequence[Llama]) -> Llama:
    """Stack the parameters and constants of models, (M, ...); token ids are (M*B, T), one member after the other.

    Raises:
        ValueError: the models do not have the same tensors, as with different placements.
    """
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    if any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError("only models of the same tensors can be stacked")
    stacked = copy.deepcopy(models[0])
    done: dict[int, nn.Parameter] = {}
    for module, *members in zip(stacked.modules(), *(model.modules() for model in models), strict=True):
        module.__class__ = _STACKED.get(type(module), type(module))  # as torch.nn.utils.parametrize does
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:  # a tied head shares the embedding's
                values = torch.stack([member.get_parameter(name) for member in members])
                done[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, name, done[id(parameter)])
        if isinstance(module, MultipliedMatrix):
            constants = [member.constant for member in members if isinstance(member, MultipliedMatrix)]
            if len(set(constants)) > 1:
                del module.constant
                module.register_buffer("constant", torch.tensor(constants), persistent=False)
    return stacked


def member_state(stacked: nn.Module, index: int) -> dict[str, Tensor]:
    """The state dict of one member, as of a single model; views of the stack's tensors."""
    return {name: value[index] for name, value in stacked.state_dict().items()}

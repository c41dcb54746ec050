"""Layers with row and column multipliers that keep W and not W_eff for their backward pass.

Autograd on the product r_i W_ij c_j would keep two more matrices of the size of W until the backward pass, whole ones
under FSDP. Here W_eff is formed again from W, which exists anyway; eq. 4 of arXiv:2601.04890 is written out:

    dL/dW_ij = r_i c_j G_ij,   dL/dr_i = sum_j c_j W_ij G_ij,   dL/dc_j = sum_i r_i W_ij G_ij,   G = dL/dW_eff.

Shapes in names: N tokens, O = d_out, I = d_in, V vocabulary, D width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_mult.nn.precision import NARROW


def scaled(
    weight_OI: Tensor, row_O: Tensor | None, column_I: Tensor | None, dtype: torch.dtype, *, is_own: bool = False
) -> Tensor:
    """r_i W_ij c_j in `dtype`; the product is formed in float32 at least, and rounded once.

    `is_own`: nobody else reads the matrix, which may be overwritten.
    """
    wide = weight_OI.float() if weight_OI.dtype in NARROW else weight_OI
    row = None if row_O is None else row_O[..., :, None]
    column = None if column_I is None else column_I[..., None, :]
    for factor in (row, column):
        if factor is not None:
            wide = wide.mul_(factor) if is_own and not torch.is_grad_enabled() else wide * factor
            is_own = True
    return wide.to(dtype)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, row_O: Tensor | None, column_I: Tensor | None
    ) -> Tensor:
        return F.linear(x, scaled(weight_OI, row_O, column_I, x.dtype), bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight_OI, _, row_O, column_I = inputs
        ctx.save_for_backward(x, weight_OI, row_O, column_I)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, row_O, column_I = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_row, needs_column = ctx.needs_input_grad
        grad_x = grad @ scaled(weight_OI, row_O, column_I, grad.dtype) if needs_x else None
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_NO.sum(0) if needs_bias else None
        if not (needs_weight or needs_row or needs_column):
            return grad_x, None, grad_bias, None, None
        effective_OI = grad_NO.mT @ x.reshape(-1, x.shape[-1])
        needs = (needs_weight, needs_row, needs_column)
        grad_weight, grad_row, grad_column = _of_matrix(effective_OI, weight_OI, row_O, column_I, needs)
        return grad_x, grad_weight, grad_bias, grad_row, grad_column


class _Embedding(torch.autograd.Function):
    """Of all tokens, the rows of W_eff; of fewer than the vocabulary has, the products of their own rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ids: Tensor, weight_VD: Tensor, row_V: Tensor | None, column_D: Tensor | None, padding: int) -> Tensor:
        if ids.numel() >= len(weight_VD):
            return F.embedding(ids, scaled(weight_VD, row_V, column_D, weight_VD.dtype))
        return scaled(F.embedding(ids, weight_VD), _of(row_V, ids), column_D, weight_VD.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight_VD, row_V, column_D, ctx.padding = inputs
        ctx.save_for_backward(ids, weight_VD, row_V, column_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight_VD, row_V, column_D = ctx.saved_tensors
        _, needs_weight, needs_row, needs_column, _ = ctx.needs_input_grad
        ids_N, grad_ND = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        vocabulary = len(weight_VD)
        grad_ND = grad_ND.float() if grad_ND.dtype in NARROW else grad_ND
        if len(ids_N) >= vocabulary:
            effective_VD = _added_up(grad_ND, ids_N, vocabulary, ctx.padding)
            needs = (needs_weight, needs_row, needs_column)
            return None, *_of_matrix(effective_VD, weight_VD, row_V, column_D, needs), None
        row_N = _of(row_V, ids_N)
        if ctx.padding >= 0:
            grad_ND = grad_ND * (ids_N != ctx.padding)[:, None]
        grad_weight = grad_row = grad_column = None
        if needs_weight:
            grad_weight = _added_up(scaled(grad_ND, row_N, column_D, grad_ND.dtype), ids_N, vocabulary)
            grad_weight = grad_weight.to(weight_VD.dtype)
        if needs_row or needs_column:
            product_ND = grad_ND * F.embedding(ids_N, weight_VD)
            grad_row, grad_column = _vectors(product_ND, row_N, column_D, needs_row, needs_column)
            grad_row = None if grad_row is None else _added_up(grad_row[:, None], ids_N, vocabulary)[:, 0]
        return None, grad_weight, grad_row, grad_column, None


for _forward in (_Linear.forward, _Embedding.forward):  # torch would look it up at every call
    _forward.__signature__ = inspect.signature(_forward)  # type: ignore[union-attr]


def _of_matrix(
    effective: Tensor, weight: Tensor, row: Tensor | None, column: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, row and column, those that are needed, from that of W_eff, which it overwrites."""
    needs_weight, needs_row, needs_column = needs
    if weight.dtype in NARROW or effective.dtype in NARROW:
        effective = effective.float()
    grad_row = grad_column = None
    if needs_row or needs_column:
        grad_row, grad_column = _vectors(effective * weight, row, column, needs_row, needs_column)
    grad_weight = scaled(effective, row, column, weight.dtype, is_own=True) if needs_weight else None
    return grad_weight, grad_row, grad_column


def _vectors(
    product: Tensor, row: Tensor | None, column: Tensor | None, needs_row: bool, needs_column: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of row and column from the product of W and G, entry by entry."""
    grad_row = grad_column = None
    if needs_row and row is not None:
        grad_row = product.sum(-1) if column is None else product @ column.to(product.dtype)
        grad_row = grad_row.to(row.dtype)
    if needs_column and column is not None:
        grad_column = product.sum(0) if row is None else row.to(product.dtype) @ product
        grad_column = grad_column.to(column.dtype)
    return grad_row, grad_column


def _of(row_V: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if row_V is None else row_V[ids]


def _added_up(rows_ND: Tensor, ids_N: Tensor, vocabulary: int, padding: int = -1) -> Tensor:
    """(V, D): rows of equal id, added; none for `padding`."""
    added: Tensor = torch.ops.aten.embedding_dense_backward(rows_ND, ids_N, vocabulary, padding, False)
    return added


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, row_O: Tensor | None, column_I: Tensor | None
) -> Tensor:
    """x (..., d_in) -> (..., d_out) by the matrix r_i W_ij c_j, and a bias; autocast as of `F.linear`."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            bias_O = None if bias_O is None else bias_O.to(dtype)
            return _applied(_Linear, x.to(dtype), weight_OI, bias_O, row_O, column_I)
    return _applied(_Linear, x, weight_OI, bias_O, row_O, column_I)


def embedding(
    ids: Tensor, weight_VD: Tensor, row_V: Tensor | None, column_D: Tensor | None, padding: int | None
) -> Tensor:
    """Rows of r_i W_ij c_j by token: ids (...) -> (..., D); the token `padding` gets no gradient."""
    at = -1 if padding is None else padding % len(weight_VD)
    if ids.ndim == 0:
        return _applied(_Embedding, ids[None], weight_VD, row_V, column_D, at)[0]
    return _applied(_Embedding, ids, weight_VD, row_V, column_D, at)


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    out: Tensor = function.apply(*arguments)
    return out

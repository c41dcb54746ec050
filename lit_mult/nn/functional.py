"""Element-wise pieces of the decoder with hand-written backward passes: the same mathematics in fewer passes.

At small width a training step spends as long on reading and writing activations as on matrix products, and autograd
writes twice what is needed: the slices of a joint projection each get a zero-padded gradient, which are then added.
Each function here is tested against autograd on the textbook formula.

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, K head size, F hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor, out_BTHK: Tensor | None = None) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face: (a, b) -> (a cos - b sin, b cos + a sin).

    The tables are (T, K/2). The inverse rotation, which is the backward pass, takes -sin.
    """
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    out = torch.empty_like(x_BTHK) if out_BTHK is None else out_BTHK
    a, b = x_BTHK.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


class _RotateQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BTNK: Tensor, cos_TK: Tensor, sin_TK: Tensor, heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_TK, sin_TK)
        ctx.sizes = (*heads, heads[1])
        q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split(ctx.sizes, dim=2)
        return rotate(q_BTHK, cos_TK, sin_TK), rotate(k_BTGK, cos_TK, sin_TK), v_BTGK.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors
        B, T, _, K = grad_q.shape
        grad = grad_q.new_empty(B, T, sum(ctx.sizes), K)
        q, k, v = grad.split(ctx.sizes, dim=2)
        rotate(grad_q, cos_TK, -sin_TK, out_BTHK=q)
        rotate(grad_k, cos_TK, -sin_TK, out_BTHK=k)
        v.copy_(grad_v)
        return grad, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_BTF: Tensor) -> Tensor:
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up_BTF, activated)
        out: Tensor = activated * up
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        gate_up_BTF, activated = ctx.saved_tensors
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up_BTF)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_out, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_out * up, gate, grad_input=grad_gate)
        return grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        out: Tensor = unit * weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad_out * unit
        grad_weight = product.flatten(0, -2).sum(0)
        along = torch.mv(product.flatten(0, -2), weight).view_as(scale).div_(-unit.shape[-1])
        grad_x = (grad_out * weight).addcmul_(unit, along).mul_(scale)
        return grad_x, grad_weight, None


def rotate_qkv(
    qkv_BTNK: Tensor, cos_TK: Tensor, sin_TK: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a joint projection (B, T, H+2G, K) into rotated queries, rotated keys, and values; tables are (T, K/2)."""
    q_BTHK, k_BTGK, v_BTGK = _RotateQKV.apply(qkv_BTNK, cos_TK, sin_TK, (n_heads, n_kv_heads))  # type: ignore[no-untyped-call]
    return q_BTHK, k_BTGK, v_BTGK


def swiglu(gate_up_BTF: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202) of a joint projection (B, T, 2F), gate first -> (B, T, F)."""
    out: Tensor = _SwiGLU.apply(gate_up_BTF)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""
    out: Tensor = _RMSNorm.apply(x_BTD, weight_D, eps)  # type: ignore[no-untyped-call]
    return out

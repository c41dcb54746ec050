"""Element-wise pieces of the decoder with hand-written backward passes: the same mathematics in fewer passes.

At small width a training step spends as much time on memory traffic of activations as on matrix products, and autograd
doubles it: each slice of a joint projection gets a zero-padded gradient, and these are added. Tests compare each
function with autograd on the textbook formula. Under torch.compile the textbook formula is used: the compiler fuses
passes itself, and does not support complex numbers.

Shapes in names: N rows, B batch, T time, D width, H query heads, G key/value heads, K head size, F hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

linear: Callable[[Tensor, Tensor], Tensor] = F.linear
"""Product of x (..., d_in) with weight (d_out, d_in) -> (..., d_out)."""


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotations for positions 0..length-1 (arXiv:2104.09864): cosine and sine of the angles, (T, K/2, 2), float32."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle_TK = torch.outer(position, theta**-exponent)
    if torch.compiler.is_compiling():
        return torch.stack([angle_TK.cos(), angle_TK.sin()], -1)
    return torch.view_as_real(torch.polar(torch.ones_like(angle_TK), angle_TK))


def pair_rotary_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key weight (..., H*K, D) so that those of a rotary pair are adjacent.

    Stored weights have Hugging Face's half-split layout, in which i and i + K/2 are a pair. An adjacent pair is a
    complex number, and its rotation is one product. Attention scores do not depend on the order of a head's components.
    Under torch.compile the halves stay: they vectorize better.
    """
    if torch.compiler.is_compiling():
        return weight
    paired: Tensor = weight.unflatten(-2, (-1, 2, head_dim // 2)).transpose(-3, -2)
    return paired.flatten(-4, -2)


def _as_complex(x: Tensor) -> Tensor:
    """Adjacent pairs (..., K) as complex numbers (..., K/2); 16-bit types are converted to float32."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return torch.view_as_complex((x if x.stride(-1) == 1 else x.contiguous()).unflatten(-1, (-1, 2)))


class _RotateQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BTNK: Tensor, rotation_TK2: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
        rotation_TK = torch.view_as_complex(rotation_TK2)
        ctx.save_for_backward(rotation_TK)
        H, G = ctx.heads = heads
        qk_BTNK = torch.view_as_real(_as_complex(qkv_BTNK[:, :, : H + G]) * rotation_TK.unsqueeze(-2)).flatten(-2)
        qk_BTNK = qk_BTNK.to(qkv_BTNK.dtype)
        return qk_BTNK[:, :, :H], qk_BTNK[:, :, H:], qkv_BTNK[:, :, H + G :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None]:
        (rotation_TK,) = ctx.saved_tensors
        H, G = ctx.heads
        inverse_TK = rotation_TK.conj_physical().unsqueeze(-2)
        q, k = _as_complex(grad_q), _as_complex(grad_k)
        B, T, _, K = grad_q.shape
        grad = torch.empty(B, T, H + 2 * G, K, dtype=q.real.dtype, device=q.device)
        torch.mul(q, inverse_TK, out=_as_complex(grad[:, :, :H]))
        torch.mul(k, inverse_TK, out=_as_complex(grad[:, :, H : H + G]))
        grad[:, :, H + G :] = grad_v
        return grad.to(grad_q.dtype), None, None


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


class RMSNormFunction(torch.autograd.Function):
    """x (N, D) / rms(x) * weight (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        out: Tensor = unit * weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad_out * unit
        grad_weight = product.sum(0) if ctx.needs_input_grad[1] else None
        along = torch.mv(product, weight)[:, None].div_(-unit.shape[-1])
        grad_x = (grad_out * weight).addcmul_(unit, along).mul_(scale)
        return grad_x, grad_weight, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        log_p_NV = F.log_softmax(logits_NV, -1)
        ctx.save_for_backward(log_p_NV, target_N)
        at_target_N1 = target_N[:, None]
        loss_N = -log_p_NV.gather(-1, at_target_N1).squeeze(-1)
        return loss_N, logits_NV.gather(-1, at_target_N1).squeeze(-1) + loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_N: Tensor, grad_log_z_N: Tensor) -> tuple[Tensor, None]:
        log_p_NV, target_N = ctx.saved_tensors
        grad_NV = log_p_NV.exp().mul_((grad_loss_N + grad_log_z_N)[:, None])
        return grad_NV.scatter_add_(-1, target_N[:, None], -grad_loss_N[:, None]), None


def rotate_qkv(qkv_BTNK: Tensor, rotation_TK2: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a joint projection (B, T, H+2G, K), rotary rows paired, into rotated queries and keys, and values.

    Rotations are (T, K/2, 2), or (B, T, K/2, 2) if rows are at different positions.
    """
    if torch.compiler.is_compiling():
        cosine, sine = rotation_TK2[..., None, :, 0], rotation_TK2[..., None, :, 1]
        a, b = qkv_BTNK[:, :, : n_heads + n_kv_heads].chunk(2, dim=-1)
        qk_BTNK = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(qkv_BTNK.dtype)
        return qk_BTNK[:, :, :n_heads], qk_BTNK[:, :, n_heads:], qkv_BTNK[:, :, n_heads + n_kv_heads :]
    q_BTHK, k_BTGK, v_BTGK = _RotateQKV.apply(qkv_BTNK, rotation_TK2, (n_heads, n_kv_heads))  # type: ignore[no-untyped-call]
    return q_BTHK, k_BTGK, v_BTGK


def swiglu(gate_up_BTF: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202) of a joint projection (B, T, 2F), gate first -> (B, T, F)."""
    if torch.compiler.is_compiling():
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate_up_BTF)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""
    rows_ND = x_BTD.flatten(0, -2)
    if torch.compiler.is_compiling():
        return (rows_ND * torch.rsqrt(rows_ND.square().mean(-1, keepdim=True) + eps) * weight_D).view_as(x_BTD)
    out: Tensor = RMSNormFunction.apply(rows_ND, weight_D, eps)  # type: ignore[no-untyped-call]
    return out.view_as(x_BTD)


def cross_entropy_and_log_z(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) of float32 logits in nats, and the log of their softmax normalizer (N,), from one softmax."""
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits_NV, target_N, reduction="none"), logits_NV.logsumexp(-1)
    loss_N, log_z_N = _CrossEntropy.apply(logits_NV, target_N)  # type: ignore[no-untyped-call]
    return loss_N, log_z_N

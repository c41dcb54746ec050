"""Hand-written backward passes against autograd on the textbook formulas.

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, K head size, N = H + 2G, F hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_mult.nn.functional import cross_entropy_and_log_z, pair_rotary_rows, rms_norm, rotary_table, rotate_qkv, swiglu
from lit_mult.stacked import model as stacked

B, T, K = 2, 5, 6
HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]  # multi-head, grouped, multi-query


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles() -> Tensor:
    return torch.arange(T, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, K, 2) / K)


def rotations() -> Tensor:
    return torch.stack([angles().cos(), angles().sin()], -1)


def textbook_qkv(qkv_BTNK: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b) -> (a cos - b sin, b cos + a sin) on neighbouring components."""
    cos, sin = angles().cos()[:, None], angles().sin()[:, None]

    def turn(x_BTHK: Tensor) -> Tensor:
        a, b = x_BTHK[..., ::2], x_BTHK[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    return turn(qkv_BTNK[:, :, :H]), turn(qkv_BTNK[:, :, H : H + G]), qkv_BTNK[:, :, H + G :]


def textbook_swiglu(gate_up_BTF: Tensor) -> Tensor:
    gate, up = gate_up_BTF.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def textbook_rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_BTD / (x_BTD.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight_D


def assert_same_values_and_gradients(
    ours: Callable[..., tuple[Tensor, ...]], textbook: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """In float64, with upstream gradients that are transposed, expanded or strided, not contiguous."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    outs, wanted = ours(*mine), textbook(*theirs)
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    layouts = (
        lambda y: normal(*y.mT.shape, seed=1).mT,
        lambda y: normal(*y.shape[:-1], 1, seed=2).expand_as(y),
        lambda y: normal(*y.shape[:-1], 2 * y.shape[-1], seed=3)[..., ::2],
    )
    for layout in layouts:
        upstream = [layout(out) for out in outs]
        got = torch.autograd.grad(outs, mine, upstream, retain_graph=True)
        want = torch.autograd.grad(wanted, theirs, upstream, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_rotate_qkv_is_the_textbook_rotation(H: int, G: int) -> None:
    qkv_BTNK = normal(B, T, H + 2 * G, K)
    assert_same_values_and_gradients(
        lambda x: rotate_qkv(x, rotations(), H, G), lambda x: textbook_qkv(x, H, G), qkv_BTNK
    )
    assert torch.autograd.gradcheck(lambda x: rotate_qkv(x, rotations(), H, G), qkv_BTNK.requires_grad_())


def test_rotation_by_hand() -> None:
    # K = 2, one head of each kind, angle pi/2 at position 0: (a, b) -> (-b, a); values are left alone.
    qkv_BTNK = torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]], dtype=torch.float64)
    q, k, v = rotate_qkv(qkv_BTNK, torch.tensor([[[0.0, 1.0]]], dtype=torch.float64), 1, 1)
    assert q.flatten().tolist() == [-2.0, 1.0]
    assert k.flatten().tolist() == [-4.0, 3.0]
    assert v.flatten().tolist() == [5.0, 6.0]


def test_the_rotary_table_by_hand() -> None:
    # K = 4, theta = 100: frequencies 1 and 100^(-1/2) = 0.1; position 3 turns by 3 and 0.3 radians.
    table_TK2 = rotary_table(4, 4, 100.0, torch.device("cpu"))
    wanted = torch.tensor([[math.cos(3), math.sin(3)], [math.cos(0.3), math.sin(0.3)]])
    torch.testing.assert_close(table_TK2[3], wanted)
    assert table_TK2[0].tolist() == [[1, 0], [1, 0]]


def test_rows_of_rotary_pairs_come_together_head_by_head() -> None:
    # Two heads of K = 4: pairs are (0, 2), (1, 3) and (4, 6), (5, 7).
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert pair_rotary_rows(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a compiler sees it, run without one."""
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", dynamic=False, fullgraph=True)


def test_a_compiler_is_given_the_textbook_formulas() -> None:
    H, G = 4, 2
    halves = lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1)  # noqa: E731 - it keeps the weights' own layout
    qkv_BTNK = normal(B, T, H + 2 * G, K)
    qkv_of_halves = torch.cat([halves(qkv_BTNK[:, :, : H + G]), qkv_BTNK[:, :, H + G :]], 2)
    q, k, v = traced(lambda x: rotate_qkv(x, rotations(), H, G))(qkv_of_halves)
    for out, want in zip((q, k, v), textbook_qkv(qkv_BTNK, H, G), strict=True):
        torch.testing.assert_close(out, want if out is v else halves(want), rtol=1e-12, atol=1e-12)
    gate_up, x, weight = normal(B, T, 14), normal(B, T, 7), normal(7, seed=4)
    torch.testing.assert_close(traced(swiglu)(gate_up), textbook_swiglu(gate_up), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traced(rms_norm)(x, weight, 0.1), textbook_rms_norm(x, weight, 0.1))
    rows = torch.arange(8.0)[:, None]
    assert torch.equal(traced(lambda w: pair_rotary_rows(w, 4))(rows), rows)
    table = traced(lambda: rotary_table(9, 4, 100.0, torch.device("cpu")))()
    torch.testing.assert_close(table, rotary_table(9, 4, 100.0, torch.device("cpu")), rtol=0, atol=2e-7)


@pytest.mark.parametrize("wrap", [lambda function: function, traced], ids=["eager", "traced"])
def test_members_of_a_stack_meet_their_own_weights(wrap: Callable[..., Any]) -> None:
    M, D, V = 3, 7, 11
    x, weight = normal(M * B, T, D), normal(M, 5, D, seed=1)
    ids = torch.randint(V, (M * B, T), generator=torch.Generator().manual_seed(0))
    table, norm = normal(M, V, D, seed=2), normal(M, D, seed=3)

    def one_by_one(function: Callable[..., Tensor], rows: Tensor, weight_M: Tensor) -> tuple[Tensor]:
        return (torch.cat([function(part, own) for part, own in zip(rows.chunk(M), weight_M, strict=True)]),)

    assert_same_values_and_gradients(
        lambda x, w: (wrap(stacked.linear)(x, w),), lambda x, w: one_by_one(lambda a, b: a @ b.T, x, w), x, weight
    )
    assert_same_values_and_gradients(
        lambda t: (wrap(stacked.embedding)(ids, t),), lambda t: one_by_one(lambda a, b: b[a], ids, t), table
    )
    assert_same_values_and_gradients(
        lambda x, w: (wrap(stacked.rms_norm)(x, w, 0.1),),
        lambda x, w: one_by_one(lambda a, b: textbook_rms_norm(a, b, 0.1), x, w),
        x,
        norm,
    )


def test_swiglu_is_the_textbook_formula() -> None:
    gate_up_BTF = normal(B, T, 14) * 3
    assert_same_values_and_gradients(lambda x: (swiglu(x),), lambda x: (textbook_swiglu(x),), gate_up_BTF)
    assert torch.autograd.gradcheck(swiglu, gate_up_BTF.requires_grad_())


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_rms_norm_is_the_textbook_formula(eps: float) -> None:
    x_BTD, weight_D = normal(B, T, 7) * 2, normal(7, seed=4)
    assert_same_values_and_gradients(
        lambda x, w: (rms_norm(x, w, eps),), lambda x, w: (textbook_rms_norm(x, w, eps),), x_BTD, weight_D
    )
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, eps), (x_BTD.requires_grad_(), weight_D.requires_grad_())
    )


def test_rms_norm_of_zeros_has_finite_gradients() -> None:
    x_BTD, weight_D = torch.zeros(B, T, 7, requires_grad=True), torch.ones(7, requires_grad=True)
    rms_norm(x_BTD, weight_D, 1e-5).sum().backward()
    # d/dx of x / sqrt(eps) at 0 is 1 / sqrt(1e-5) = 316.2
    torch.testing.assert_close(x_BTD.grad, torch.full((B, T, 7), 316.22777))
    assert weight_D.grad is not None
    assert weight_D.grad.abs().max() == 0


# Half a unit in the last place is 2^-24 in float32 and 2^-9 in bfloat16; a handful of roundings follow each other.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_low_precision_keeps_the_dtype_and_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    H, G = 4, 2
    rotation_TK2 = rotations().float()
    cases = [
        (lambda x: rotate_qkv(x, rotation_TK2, H, G), lambda x: textbook_qkv(x, H, G), (normal(B, T, H + 2 * G, K),)),
        (lambda x: (swiglu(x),), lambda x: (textbook_swiglu(x),), (normal(B, T, 14),)),
        (
            lambda x, w: (rms_norm(x, w, 1e-5),),
            lambda x, w: (textbook_rms_norm(x, w, 1e-5),),
            (normal(B, T, 7), normal(7, seed=4)),
        ),
    ]
    for ours, textbook, inputs in cases:
        low = [x.to(dtype).requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in low]
        outs, wanted = ours(*low), textbook(*exact)
        upstream = [normal(*out.mT.shape, seed=6).mT for out in outs]
        got = torch.autograd.grad(outs, low, [gradient.to(dtype) for gradient in upstream])
        want = torch.autograd.grad(wanted, exact, [gradient.to(dtype).double() for gradient in upstream])
        for mine, theirs in zip((*outs, *got), (*wanted, *want), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def test_cross_entropy_and_log_z() -> None:
    targets = torch.tensor([0, 3, 1, 3, 4, 0])

    def textbook(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.cross_entropy(logits_NV, targets, reduction="none"), logits_NV.logsumexp(-1)

    def row(values: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(value_N[None] for value_N in values)

    assert_same_values_and_gradients(
        lambda x: row(cross_entropy_and_log_z(x, targets)), lambda x: row(textbook(x)), 8 * normal(6, 5)
    )

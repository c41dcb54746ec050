"""What a step needs at least: its FLOPs, counted, and the speed of the machine at its matrix products, measured.

FLOPs are two for each multiplication and addition, forward and, twice that, backward. Counted are every product with a
weight and, of attention, the products of queries with keys and of probabilities with values under the causal mask,
T (T + 1) / 2 pairs a head. Lookups, norms, rotations, activations, softmax, multipliers and the optimizer count none.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from interleaving import Turns, settle
from rivals import HEAD, VOCABULARY, Setting

REPEATS = 5


def products(setting: Setting) -> Counter[tuple[int, int]]:
    """(d_in, d_out) of every product with a weight, as our model forms them -> how many of them a step has."""
    d, hidden = setting.width, setting.hidden
    layer = [(d, 3 * d), (d, d), (d, 2 * hidden), (hidden, d)]  # q, k and v are one, gate and up are one
    return Counter(layer * setting.layers + [(d, VOCABULARY)])  # shapes may coincide


def product_flops(setting: Setting) -> int:
    """FLOPs of a step in products with weights, forward and backward."""
    tokens = setting.batch * setting.time
    return sum(6 * tokens * d_in * d_out * number for (d_in, d_out), number in products(setting).items())


def model_flops(setting: Setting) -> int:
    """All FLOPs of a step that count, attention's included."""
    pairs = setting.batch * setting.width // HEAD * setting.time * (setting.time + 1) // 2
    return product_flops(setting) + 3 * setting.layers * 2 * 2 * HEAD * pairs


def gemms(setting: Setting, turns: Turns) -> None:
    """A contestant whose step is every product of a training step, each at the best of its repeats."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.precision]
    tokens = setting.batch * setting.time
    operands = []
    for (d_in, d_out), number in products(setting).items():
        shapes = ((tokens, d_in), (d_out, d_in), (tokens, d_out))
        x, weight, grad = (torch.randn(*shape, dtype=dtype, device=setting.device) for shape in shapes)
        operands += [(number, x, weight.T), (number, grad, weight), (number, grad.T, x)]  # forward, dx, dW
    while True:
        turns.step_starts()
        took = sum(number * _best_seconds(a, b) for number, a, b in operands)
        turns.seconds_a_step = min(took, turns.seconds_a_step or took)


def _best_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    in_a_row = 20 if a.is_cuda else 1  # on a GPU a small product alone takes as long as its launch
    times = []
    for _ in range(REPEATS):
        settle()
        start = time.perf_counter()
        for _ in range(in_a_row):
            a @ b
        settle()
        times.append((time.perf_counter() - start) / in_a_row)
    return min(times)

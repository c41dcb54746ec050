"""Activations of a model, measured in a separate forward pass.

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, R query heads of one key/value head,
K head size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_mult.diagnostics.parts import device_rms
from lit_mult.diagnostics.readings import Reading
from lit_mult.nn.llama import Attention, Llama

Visitor = Callable[[str, nn.Module, tuple[Any, ...], Tensor], None]
"""Takes the name of a module, the module, its arguments and its output."""

_ACTIVATIONS = {
    "embed_tokens": ("residual_rms", "residual"),
    "block.self_attn": ("attention_output_rms", "attention"),
    "block.mlp": ("mlp_output_rms", "mlp"),
    "block": ("residual_rms", "residual"),
    "norm": ("final_norm_output_rms", "norm"),
    "lm_head": ("logits_rms", "logits"),
}
"""Module whose output is measured -> quantity and role of the reading."""


@torch.no_grad()
def probe(model: Llama, ids_BT: Tensor, visit: Visitor) -> None:
    """Run the model in eval mode, and call `visit` after every module.

    Projections in a joint product (query, key and value; gate and up) are not called as modules.
    """
    was_training = model.training
    handles = [module.register_forward_hook(partial(visit, name)) for name, module in model.named_modules()]
    try:
        model.eval()(ids_BT)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def activation(name: str) -> tuple[str, str] | None:
    """Quantity and role of a module's output; None if it is not measured."""
    return _ACTIVATIONS.get(re.sub(r"^layers\.\d+", "block", name))


def outputs(model: Llama, ids_BT: Tensor) -> list[Reading]:
    """RMS of attention and MLP outputs, residual stream, attention logits, the final norm's output and the logits.

    The residual stream is measured after the embedding and after every block, attention logits before the softmax and
    within the causal mask.
    """
    found: list[Reading] = []

    def visit(name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if isinstance(module, Attention):
            q_BTHK, k_BTGK, _ = module.project(*args[:2])
            value = attention_logits_rms(q_BTHK, k_BTGK, module.scale)
            found.append(Reading("attention_logits_rms", name, "attention", value))
        if (measured := activation(name)) is not None:
            quantity, role = measured
            found.append(Reading(quantity, name, role, device_rms(out)))

    probe(model, ids_BT, visit)
    return found


def attention_logits_rms(q_BTHK: Tensor, k_BTGK: Tensor, scale: float) -> Tensor:
    """RMS () of scale * q·k over all heads and all causal (query, key) pairs."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    total = torch.zeros((), device=q_BTHK.device)
    for q_THK, k_TGK in zip(q_BTHK.float(), k_BTGK.float(), strict=True):  # one sequence at a time saves memory
        q_GRTK = q_THK.view(T, G, H // G, K).permute(1, 2, 0, 3)
        k_G1KT = k_TGK.permute(1, 2, 0).unsqueeze(1)
        total = total + torch.linalg.vector_norm((q_GRTK @ k_G1KT).tril_()).square()
    return scale * (total / (B * H * T * (T + 1) // 2)).sqrt()

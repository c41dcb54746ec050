"""RMS of a model's activations, from a forward of its own that leaves the model as it is.

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, R query heads of one key/value head,
K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_mult.diagnostics.keys import MetricKey, layer_of
from lit_mult.diagnostics.parts import Reading, rms
from lit_mult.nn.functional import rotary_table
from lit_mult.nn.llama import Block, Llama


def outputs(model: Llama, ids_BT: Tensor) -> Iterator[Reading]:
    """RMS of attention and MLP outputs, residual stream, attention logits, the final norm's output and the logits.

    The residual stream is read behind the embedding and behind every block, attention logits before the softmax and
    where the causal mask lets them through. There is no dropout here, whatever mode the model is in.
    """
    x_BTD = model.embed_tokens(ids_BT)
    rotation_TK2 = rotary_table(ids_BT.shape[1], model.head_dim, model.rope_theta, x_BTD.device)
    yield _key("residual_rms", "embed_tokens", "residual"), rms(x_BTD)
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        name = f"layers.{layer}"
        normed_BTD = block.input_layernorm(x_BTD)
        q_BTHK, k_BTGK, _ = block.self_attn.project(normed_BTD, rotation_TK2)
        logits_rms = attention_logits_rms(q_BTHK, k_BTGK, block.self_attn.scale)
        yield _key("attention_logits_rms", f"{name}.self_attn", "attention"), logits_rms
        attention_BTD = block.self_attn(normed_BTD, rotation_TK2)
        yield _key("attention_output_rms", f"{name}.self_attn", "attention"), rms(attention_BTD)
        x_BTD = x_BTD + attention_BTD
        mlp_BTD = block.mlp(block.post_attention_layernorm(x_BTD))
        yield _key("mlp_output_rms", f"{name}.mlp", "mlp"), rms(mlp_BTD)
        x_BTD = x_BTD + mlp_BTD
        yield _key("residual_rms", name, "residual"), rms(x_BTD)
    normed_BTD = model.norm(x_BTD)
    yield _key("final_norm_output_rms", "norm", "norm"), rms(normed_BTD)
    yield _key("logits_rms", "lm_head", "logits"), rms(model.lm_head(normed_BTD))


def attention_logits_rms(q_BTHK: Tensor, k_BTGK: Tensor, scale: float) -> Tensor:
    """RMS () of scale * q·k over all heads and the pairs of a query and a key that is not later."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    total = torch.zeros((), device=q_BTHK.device)
    for q_THK, k_TGK in zip(q_BTHK.float(), k_BTGK.float(), strict=True):  # all at once would take B times the memory
        q_GRTK = q_THK.view(T, G, H // G, K).permute(1, 2, 0, 3)
        k_G1KT = k_TGK.permute(1, 2, 0).unsqueeze(1)
        total = total + torch.linalg.vector_norm((q_GRTK @ k_G1KT).tril_()).square()
    return scale * (total / (B * H * T * (T + 1) // 2)).sqrt()


def _key(quantity: str, name: str, role: str) -> MetricKey:
    return MetricKey("outputs", quantity, name, layer_of(name), role)

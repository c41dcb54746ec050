"""A Llama-compatible decoder (RMSNorm, half-split rotary embedding, SwiGLU, grouped-query attention, no biases).

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, K head size, F hidden, V vocabulary.
Module names are those of Hugging Face's `LlamaForCausalLM` without the `model.` prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_mult.config import ModelConfig
from lit_mult.nn.functional import interleave_halves, rms_norm, rotary_table, rotate_qkv, swiglu
from lit_mult.nn.multipliers import MultipliedEmbedding, MultipliedLinear
from lit_mult.parametrization.plan import RunPlan
from lit_mult.roles import Role


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467)."""

    role = Role.NORM

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = plan.attention_scale
        self.q_proj = MultipliedLinear(plan.matrices[f"{name}.q_proj"])
        self.k_proj = MultipliedLinear(plan.matrices[f"{name}.k_proj"])
        self.v_proj = MultipliedLinear(plan.matrices[f"{name}.v_proj"])
        self.o_proj = MultipliedLinear(plan.matrices[f"{name}.o_proj"])

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        H, G = self.n_heads, self.n_kv_heads
        # One product for the three: joining weights is cheap, reading and differentiating x three times is not.
        q_weight = interleave_halves(self.q_proj.effective_weight(), self.head_dim)
        k_weight = interleave_halves(self.k_proj.effective_weight(), self.head_dim)
        qkv_weight = torch.cat([q_weight, k_weight, self.v_proj.effective_weight()])
        qkv_BTNK = F.linear(x_BTD, qkv_weight).view(B, T, H + 2 * G, self.head_dim)
        heads_BTNK = rotate_qkv(qkv_BTNK, rotation_TK, H, G)
        q_BHTK, k_BGTK, v_BGTK = (x_BTNK.transpose(1, 2) for x_BTNK in heads_BTNK)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, is_causal=True, scale=self.scale, enable_gqa=H != G
        )
        out_BTD: Tensor = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, H * self.head_dim))
        return out_BTD


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.gate_proj = MultipliedLinear(plan.matrices[f"{name}.gate_proj"])
        self.up_proj = MultipliedLinear(plan.matrices[f"{name}.up_proj"])
        self.down_proj = MultipliedLinear(plan.matrices[f"{name}.down_proj"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_up_weight = torch.cat([self.gate_proj.effective_weight(), self.up_proj.effective_weight()])
        out_BTD: Tensor = self.down_proj(swiglu(F.linear(x_BTD, gate_up_weight)))
        return out_BTD


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: ModelConfig, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, plan, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(plan, f"{name}.mlp")
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor) -> Tensor:
        x_BTD = x_BTD + self._drop(self.self_attn(self.input_layernorm(x_BTD), rotation_TK))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig, plan: RunPlan) -> None:
        """Allocate the model that `plan` describes, uninitialized (see `nn.init.initialize`)."""
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = MultipliedEmbedding(plan.matrices["embed_tokens"])
        self.layers = nn.ModuleList(Block(config, plan, f"layers.{layer}") for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        shared = self.embed_tokens.weight if config.tie_embeddings else None
        self.lm_head = MultipliedLinear(plan.matrices["lm_head"], shared)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embed_tokens(ids_BT)
        # Anew in every forward: next to nothing, and a table that is kept goes stale (meta device, inference mode).
        rotation_TK = rotary_table(ids_BT.shape[1], self.head_dim, self.rope_theta, x_BTD.device)
        for block in self.layers:
            x_BTD = block(x_BTD, rotation_TK)
        logits_BTV: Tensor = self.lm_head(self.norm(x_BTD))
        return logits_BTV

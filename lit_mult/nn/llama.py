"""A Llama-compatible decoder (RMSNorm, half-split rotary embedding, SwiGLU, grouped-query attention, no biases).

With norms of queries and keys it is Qwen3's.

Shapes in names: B batch, T time, S cached and new tokens, D width, H query heads, G key/value heads, K head size,
F hidden, V vocabulary.
Module names are those of Hugging Face's `LlamaForCausalLM` and `Qwen3ForCausalLM` without the `model.` prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_mult.config import ModelConfig, NormKind
from lit_mult.method.plan import RunPlan
from lit_mult.nn.functional import linear, pair_rotary_rows, rms_norm, rotary_table, rotate_qkv, swiglu
from lit_mult.nn.kv_cache import KVCache, LayerCache
from lit_mult.nn.multipliers import MultipliedEmbedding, MultipliedLinear
from lit_mult.nn.precision import keeping_float32
from lit_mult.registry.roles import Role


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467)."""

    role = Role.NORM

    def __init__(self, size: int, eps: float, kind: NormKind) -> None:
        """Allocate the weight, uninitialized (see `nn.init`).

        Its shape is (size,), or () for the kind scalar; a frozen weight has `requires_grad` False.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(() if kind == "scalar" else size), requires_grad=kind != "frozen")
        self.size, self.eps, self.is_scalar = size, eps, kind == "scalar"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts nothing to 16 bits, see `nn.precision`."""
        super()._apply(keeping_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight_vector().to(x_BTD.dtype), self.eps)

    def weight_vector(self) -> Tensor:
        """The factor of every channel (size,), differentiable in the weight."""
        return self.weight.expand(self.size) if self.is_scalar else self.weight


class HeadNorm(RMSNorm):
    """RMSNorm of every head (..., K), whose rotary components are paired; the weight (K,) is stored as halves."""

    norm: staticmethod[[Tensor, Tensor, float], Tensor] = staticmethod(rms_norm)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        weight_K = pair_rotary_rows(self.weight[..., None], self.size)[..., 0]
        wide = torch.promote_types(x_BTHK.dtype, torch.float32)  # few numbers a head, and the softmax follows
        return self.norm(x_BTHK.to(wide), weight_K.to(wide), self.eps).to(x_BTHK.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    joint_weight: Tensor | None
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    linear = staticmethod(linear)

    def __init__(self, config: ModelConfig, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = plan.attention_scale
        self.q_proj = MultipliedLinear(plan.matrices[f"{name}.q_proj"])
        self.k_proj = MultipliedLinear(plan.matrices[f"{name}.k_proj"])
        self.v_proj = MultipliedLinear(plan.matrices[f"{name}.v_proj"])
        self.o_proj = MultipliedLinear(plan.matrices[f"{name}.o_proj"])
        for norm in ("q_norm", "k_norm"):
            own = HeadNorm(config.head_dim, config.norm_eps, config.block_norm_kind) if config.qk_norm else None
            self.register_module(norm, own)
        self.register_buffer("joint_weight", None, persistent=False)
        self.observe: Callable[[Attention, Tensor, Tensor], None] | None = None
        """Called with this module, queries (B, T, H, K) and keys (B, S, G, K), rotated; for `training.qk_clip`."""

    def form_joint_weight(self) -> Tensor:
        """Effective query, key and value weights ((H+2G)*K, D), rotary rows paired, for one product."""
        q_weight = pair_rotary_rows(self.q_proj.effective_weight(), self.head_dim)
        k_weight = pair_rotary_rows(self.k_proj.effective_weight(), self.head_dim)
        return torch.cat([q_weight, k_weight, self.v_proj.effective_weight()], dim=-2)

    def project(self, x_BTD: Tensor, rotation_TK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, K) and keys (B, T, G, K), rotary rows paired, and values (B, T, G, K)."""
        B, T, _ = x_BTD.shape
        H, G = self.n_heads, self.n_kv_heads
        # One joint product: concatenating weights is cheap, reading and differentiating x three times is not.
        qkv_weight = self.form_joint_weight() if self.joint_weight is None else self.joint_weight
        qkv_BTNK = self.linear(x_BTD, qkv_weight).view(B, T, H + 2 * G, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split([H, G, G], dim=2)
            qkv_BTNK = torch.cat([self.q_norm(q_BTHK), self.k_norm(k_BTGK), v_BTGK], dim=2)
        return rotate_qkv(qkv_BTNK, rotation_TK2, H, G)

    def forward(self, x_BTD: Tensor, rotation_TK2: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        H, G = self.n_heads, self.n_kv_heads
        q_BTHK, k_BSGK, v_BSGK = self.project(x_BTD, rotation_TK2)
        if self.observe is not None:
            self.observe(self, q_BTHK, k_BSGK)
        mask_BHTS = None
        if cache is not None:
            k_BSGK, v_BSGK, mask_BHTS = cache.extend(k_BSGK, v_BSGK)
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=mask_BHTS,
            is_causal=k_BSGK.shape[1] == T,
            scale=self.scale,
            enable_gqa=H != G,
        )
        out_BTD: Tensor = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, H * self.head_dim))
        return out_BTD


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    joint_weight: Tensor | None
    linear = staticmethod(linear)

    def __init__(self, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.gate_proj = MultipliedLinear(plan.matrices[f"{name}.gate_proj"])
        self.up_proj = MultipliedLinear(plan.matrices[f"{name}.up_proj"])
        self.down_proj = MultipliedLinear(plan.matrices[f"{name}.down_proj"])
        self.register_buffer("joint_weight", None, persistent=False)

    def form_joint_weight(self) -> Tensor:
        """Effective gate and up weights (2F, D), for one product."""
        return torch.cat([self.gate_proj.effective_weight(), self.up_proj.effective_weight()], dim=-2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_up_weight = self.form_joint_weight() if self.joint_weight is None else self.joint_weight
        out_BTD: Tensor = self.down_proj(swiglu(self.linear(x_BTD, gate_up_weight)))
        return out_BTD


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: ModelConfig, plan: RunPlan, name: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps, config.block_norm_kind)
        self.self_attn = Attention(config, plan, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps, config.block_norm_kind)
        self.mlp = MLP(plan, f"{name}.mlp")
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, rotation_TK2: Tensor, cache: LayerCache | None = None) -> Tensor:
        x_BTD = x_BTD + self._drop(self.self_attn(self.input_layernorm(x_BTD), rotation_TK2, cache))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, V); with a cache the ids follow the cached tokens."""

    def __init__(self, config: ModelConfig, plan: RunPlan) -> None:
        """Allocate the model that `plan` describes, uninitialized (see `nn.init.initialize`)."""
        super().__init__()
        self.n_kv_heads, self.head_dim, self.rope_theta = config.n_kv_heads, config.head_dim, config.rope_theta
        self.embed_tokens = MultipliedEmbedding(plan.matrices["embed_tokens"])
        self.layers = nn.ModuleList(Block(config, plan, f"layers.{layer}") for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.final_norm)
        shared = self.embed_tokens.weight if config.tie_embeddings else None
        self.lm_head = MultipliedLinear(plan.matrices["lm_head"], shared)

    @property
    def device(self) -> torch.device:
        """Device of the parameters, on which ids must be."""
        return self.embed_tokens.weight.device

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        logits_BTV: Tensor = self.lm_head(self.hidden(ids_BT, cache))
        return logits_BTV

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Input of `lm_head` (B, T, D), for inference that needs logits at some positions only.

        With a cache, the tokens follow the cached ones and are added to it.
        """
        x_BTD = self.embed_tokens(ids_BT)
        if cache is None:
            # Computed in every forward pass: cheap, and a stored table becomes stale (meta device, inference mode).
            rotation_TK2 = rotary_table(ids_BT.shape[1], self.head_dim, self.rope_theta, x_BTD.device)
            for block in self.layers:
                x_BTD = block(x_BTD, rotation_TK2)
        else:
            rotation_TK2 = cache.extend(ids_BT.shape[1])
            for block, layer in zip(self.layers, cache.layers, strict=True):
                x_BTD = block(x_BTD, rotation_TK2, layer)
        out_BTD: Tensor = self.norm(x_BTD)
        return out_BTD

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `batch` rows of up to `slots` tokens each, on the model's device and in its dtype."""
        weight, size = self.embed_tokens.weight, (batch, slots, self.n_kv_heads, self.head_dim)
        # Zeros: masked values are multiplied by a weight of 0, and uninitialized ones may be NaN.
        layers = [LayerCache(weight.new_zeros(size), weight.new_zeros(size)) for _ in self.layers]
        return KVCache(layers, rotary_table(slots, self.head_dim, self.rope_theta, weight.device), [0] * batch)

    @torch.no_grad()
    def join_weights(self) -> None:
        """Form the joint weights once, for a model whose parameters no longer change.

        For a single token, concatenating the weights takes as long as multiplying by them.
        """
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                module.joint_weight = module.form_joint_weight()

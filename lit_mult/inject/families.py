"""Roles of matrices in common model families, by the names of their modules; and how fused matrices divide.

Names: Hugging Face's Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-2, GPT-NeoX, Falcon-H1 and mixtures of experts;
LitGPT, nanoGPT, nanochat and torchtitan. In an MLP without a gate the first matrix has the role of a gate: the
nonlinearity reads its rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from lit_mult.registry.contracts import RowParts
from lit_mult.registry.roles import Role

_QKV = (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ)
_GATE_UP = (Role.GATE_PROJ, Role.UP_PROJ)
_MAMBA_IN = (Role.SSM_GATE, Role.SSM_INPUT, Role.SSM_STEP)
_ATTENTION = r"(self_attn|self_attention|attention|attn)"
_MLP = r"(mlp|feed_forward|ffn)"


class Fused(NamedTuple):
    """Roles of the parts of a fused matrix."""

    roles: tuple[Role, ...]
    divide: Callable[[nn.Module, Any, int], RowParts | None]
    """(module that it is in, model config, d_out) -> rows of the parts; None where they cannot be known."""


def _equal(n: int) -> Callable[[nn.Module, Any, int], RowParts | None]:
    return lambda block, config, d_out: None if d_out % n else RowParts(1, (d_out // n,) * n)


def _by_head(block: nn.Module, config: Any, d_out: int) -> RowParts | None:
    """Query, key and value of a head side by side."""
    heads = _first(config, "num_attention_heads", "n_head")
    return RowParts(heads, (d_out // heads // 3,) * 3) if heads and d_out % (3 * heads) == 0 else None


def _grouped_query(block: nn.Module, config: Any, d_out: int) -> RowParts | None:
    """All queries, then all keys, then all values; of the latter perhaps fewer heads."""
    heads = _first(config, "num_attention_heads", "n_head")
    kv_heads = _first(config, "num_key_value_heads", "n_query_groups", "n_kv_head") or heads
    if not heads or d_out % (heads + 2 * kv_heads):
        return None
    head_dim = d_out // (heads + 2 * kv_heads)
    return RowParts(1, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))


def _experts_gate_up(block: nn.Module, config: Any, d_out: int) -> RowParts | None:
    if getattr(block, "is_concatenated", True):
        return RowParts(1, (d_out // 2,) * 2)
    return RowParts(d_out // 2, (1, 1))


def _mamba_in(block: nn.Module, config: Any, d_out: int) -> RowParts | None:
    """Z; then X, B and C; then dt."""
    inner, steps = getattr(block, "intermediate_size", 0), getattr(block, "num_heads", 0)
    return RowParts(1, (inner, d_out - inner - steps, steps)) if inner and steps else None


def _first(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


_RULES: tuple[tuple[str, Role | Fused], ...] = (
    (r"embed_tokens|wte|embed_in|word_embeddings|tok_embeddings", Role.EMBEDDING),
    (r"wpe|embed_positions|position_embeddings", Role.POSITION),
    (r"lm_head|embed_out|output", Role.LM_HEAD),
    (rf"{_ATTENTION}\.(q_proj|wq|c_q)", Role.Q_PROJ),
    (rf"{_ATTENTION}\.(k_proj|wk|c_k)", Role.K_PROJ),
    (rf"{_ATTENTION}\.(v_proj|wv|c_v)", Role.V_PROJ),
    (rf"{_ATTENTION}\.(c_attn|in_proj_weight)", Fused(_QKV, _equal(3))),  # the latter of nn.MultiheadAttention
    (rf"{_ATTENTION}\.query_key_value", Fused(_QKV, _by_head)),
    (rf"{_ATTENTION}\.(qkv_proj|qkv)", Fused(_QKV, _grouped_query)),
    (rf"{_ATTENTION}\.(o_proj|out_proj|dense|proj|c_proj|wo)", Role.O_PROJ),
    (rf"{_MLP}\.(gate_proj|fc_1|w1)", Role.GATE_PROJ),
    (rf"{_MLP}\.(up_proj|fc_2|w3)", Role.UP_PROJ),
    (rf"{_MLP}\.gate_up_proj", Fused(_GATE_UP, _equal(2))),
    (rf"{_MLP}\.(fc|fc1|c_fc|dense_h_to_4h)", Role.GATE_PROJ),
    (rf"{_MLP}\.(down_proj|fc2|w2|proj|c_proj|dense_4h_to_h)", Role.DOWN_PROJ),
    (rf"{_MLP}\.(gate|router)", Role.ROUTER),
    (rf"{_MLP}\.experts\.gate_up_proj", Fused(_GATE_UP, _experts_gate_up)),
    (rf"{_MLP}\.experts\.down_proj", Role.DOWN_PROJ),
    (r"(mamba|mixer)\.in_proj", Fused(_MAMBA_IN, _mamba_in)),
    (r"(mamba|mixer)\.out_proj", Role.SSM_OUT),
)
_COMPILED = [(re.compile(rf"(.*\.)?({pattern})"), role) for pattern, role in _RULES]


def known_role(name: str) -> Role | Fused | None:
    """The role of a matrix by its name (of the module, or of a parameter that is not called weight)."""
    return next((role for pattern, role in _COMPILED if pattern.fullmatch(name)), None)


def has_norm_before(model: nn.Module, name: str) -> bool:
    """Whether a norm weight acts as the column multiplier of a Mamba2 block's output projection."""
    block = model.get_submodule(name.rpartition(".")[0])
    return any(True for _ in getattr(block, "norm", nn.Identity()).parameters())

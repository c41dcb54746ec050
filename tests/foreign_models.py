"""Tiny random models of families that are not ours, for tests of `lit_mult.inject`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # special tokens outside a vocabulary of 64

VOCAB = 64
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = _SHAPE | {"num_key_value_heads": 2}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 8}),
    "gpt2": ("GPT2Config", _GPT2 | _NO_DROPOUT),
    "gpt_neox": ("GPTNeoXConfig", _SHAPE),
    "olmo2": ("Olmo2Config", _GROUPED),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "falcon_h1": ("FalconH1Config", _GROUPED | _MAMBA),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssConfig", _GROUPED | {"head_dim": 8, "num_local_experts": 4}),
}
"""Name -> class of the config in transformers, and its fields. Gemma and GPT-2 have a tied head."""


def foreign(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, in eval mode."""
    name, fields = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**fields | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def disturb(model: nn.Module, seed: int = 0) -> None:
    """Multiply every multiplier entry by a factor between 1/2 and 3/2."""
    from lit_mult.inject.groups import multipliers_in

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for multiplier in multipliers_in(model):
            multiplier.mul_(torch.rand(multiplier.shape, generator=generator) + 0.5)

"""Number of members of a stack: as requested, or as many as fit on a GPU and pay off."""

from __future__ import annotations

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.registry.roles import Role

_MOST = 64
MOST_SUGGESTIONS = 10
"""Trials requested from TPE at once under auto: as many as its random startup trials."""
_SHARE_OF_MEMORY = 0.8
_FULL_GPU_FLOP = 2e11
"""FLOP of a step above which one model is assumed to saturate a GPU; not measured."""
_BYTES = {"bf16-mixed": 2, "bf16": 2, "64-true": 8, "64": 8}
"""Size of an activation by trainer.precision; 4 with any other."""


def asked_members(vectorize: str | int) -> int | None:
    """The largest number of members that --vectorize allows; None for auto.

    Raises:
        UserError: it is neither auto, off, nor a whole number above 0.
    """
    if vectorize == "auto":
        return None
    text = "1" if vectorize == "off" else str(vectorize)
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"--vectorize {vectorize}: must be auto, off, or the most runs to train together, 1 or more")
    return int(text)


def members_that_fit(config: RunConfig, vocab_size: int, free_bytes: int) -> int:
    """Estimate how many runs like this one fit as a stack into the free memory of a GPU: 1 to 64.

    A matrix entry takes 7 * 4 bytes: weight, autograd's and the optimizer's gradient, two moments, and two temporaries
    of a step; vectors are neglected. A token takes its activations and four times its logits (always float32). 80 % of
    the memory is used. 1 when a single model's step saturates the GPU.
    """
    model = config.model
    shapes = model.matrix_shapes(vocab_size)
    tied = shapes[Role.LM_HEAD][0] * shapes[Role.LM_HEAD][1] if model.tie_embeddings else 0
    parameters = sum(shapes[role][0] * shapes[role][1] for role in model.matrix_roles().values()) - tied
    tokens = config.train.batch_size * config.data.seq_len
    if 6 * parameters * tokens > _FULL_GPU_FLOP:
        return 1
    activations = tokens * model.n_layers * (10 * model.d_model + 5 * model.d_ff)
    logits = tokens * 4 * vocab_size
    member = parameters * 7 * 4 + activations * _BYTES.get(config.trainer.precision, 4) + logits * 4
    return max(1, min(_MOST, int(_SHARE_OF_MEMORY * free_bytes / member)))

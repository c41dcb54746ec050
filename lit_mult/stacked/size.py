"""How many members a stack has: as asked for, or as many as a GPU has room and use for."""

from __future__ import annotations

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.registry.roles import Role

_MOST = 64
MOST_SUGGESTIONS = 10
"""Trials that TPE is asked for at once under auto: as many as it draws by lot before it has learnt anything."""
_SHARE_OF_MEMORY = 0.8
_FULL_GPU_FLOP = 2e11
"""Step of one model above which it is taken to fill a GPU by itself: an assumption, not a measurement."""
_BYTES = {"bf16-mixed": 2, "bf16-true": 2, "bf16": 2, "64-true": 8, "64": 8}
"""Of a number of the forward pass, by trainer.precision; 4 with any other."""


def asked_members(vectorize: str | int) -> int | None:
    """The most members of a stack that --vectorize asks for; None for auto.

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
    """Members of a stack of runs like this one on a GPU with so much free memory: 1 to 64.

    An estimate: each has its matrices (the vectors are too few to count) seven times in 4 bytes, as weights, gradients
    (autograd's and the optimizer's), two moments and what a step needs besides, and for every token of its batch what
    the backward pass needs, logits being float32 in any precision; 80 % of the memory is used. It is 1 where one
    model's step fills the GPU, for then there is nothing to gain.
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

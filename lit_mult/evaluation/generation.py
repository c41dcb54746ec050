"""Greedy generation until a stop string, a separator or a number of tokens.

Shapes in names: B batch, T time, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lit_mult.data.tokenizers import Tokenizer
from lit_mult.evaluation.scoring import batched, padded
from lit_mult.nn.llama import Llama

_MARGIN = 4  # tokens decoded before a stop string: the first ones may lack a leading space or be part of a character


@dataclass(frozen=True)
class Prompt:
    """A prompt and its stopping criteria."""

    ids: tuple[int, ...]
    """Token ids, at least one."""
    until: tuple[str, ...]
    """Stop strings, not empty."""
    max_tokens: int
    """Most tokens to generate, at least 1."""


@dataclass
class _Text:
    """A continuation that is being generated."""

    prompt: Prompt
    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        # A token has at least one byte: a stop string at the end begins within as many tokens as it has bytes.
        self._tail = _MARGIN + max((len(stop.encode()) for stop in self.prompt.until), default=0)

    def append(self, token: int) -> None:
        """Append the next token, and check the stopping criteria."""
        self.ids.append(token)
        self.ended = (
            token == self.tokenizer.separator_id or len(self.ids) == self.prompt.max_tokens or self._has_stopped()
        )

    def _has_stopped(self) -> bool:
        return self._holds_stop(self.ids[-self._tail :]) and self._holds_stop(self.ids)

    def _holds_stop(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, plain=True)
        return any(stop in text for stop in self.prompt.until)


@torch.inference_mode()
def continue_greedily(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    batch_size: int,
    done: Callable[[int, str], object],
) -> None:
    """Continue every prompt; `done` gets its index and text, including the stop string.

    Batches of at most batch_size prompts, the longest first, so that running out of memory fails at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
    for indices in batched(order, batch_size):
        texts = [_Text(prompts[index], tokenizer) for index in indices]
        _continue_batch(model, texts)
        for index, text in zip(indices, texts, strict=True):
            done(index, tokenizer.decode(text.ids, plain=True))


def _continue_batch(model: Llama, texts: list[_Text]) -> None:
    lengths = [len(text.prompt.ids) for text in texts]
    cache = model.empty_cache(len(texts), max(lengths) + max(text.prompt.max_tokens for text in texts))
    hidden_BTD = model.hidden(padded([text.prompt.ids for text in texts], model.device), cache)
    last_BD = hidden_BTD[range(len(texts)), [length - 1 for length in lengths]]
    cache.truncate(lengths)
    while True:
        next_B = model.lm_head(last_BD).argmax(-1)
        for text, token in zip(texts, next_B.tolist(), strict=True):
            if not text.ended:
                text.append(token)
        active = [row for row, text in enumerate(texts) if not text.ended]
        if not active:
            return
        if 2 * len(active) <= len(texts):  # only at half, as the whole cache is copied
            texts, next_B, cache = [texts[row] for row in active], next_B[active], cache.select(active)
        last_BD = model.hidden(next_B[:, None], cache)[:, 0]

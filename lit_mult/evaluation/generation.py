"""Greedy continuations of prompts, until a stop string, a separator or a number of tokens.

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
    """What to continue, and when to end."""

    ids: tuple[int, ...]
    """Token ids, at least one."""
    until: tuple[str, ...]
    """Strings that end the text as soon as it holds one of them; none is empty."""
    max_tokens: int
    """Number of tokens after which the text ends, at least 1."""


@dataclass
class _Text:
    """A continuation as it grows."""

    prompt: Prompt
    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        # A token holds at least a byte: a stop string that ends with the newest one begins within as many tokens.
        self._tail = _MARGIN + max((len(stop.encode()) for stop in self.prompt.until), default=0)

    def append(self, token: int) -> None:
        """Append the next token and find out whether it is the last."""
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
    """Continue every prompt; `done` gets the index of each and its text, not yet cut before the stop string.

    At most batch_size prompts are continued together, the longest first, so that what does not fit into memory fails
    immediately.
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
        if 2 * len(active) <= len(texts):  # not each time that one has ended: the whole cache is copied
            texts, next_B, cache = [texts[row] for row in active], next_B[active], cache.select(active)
        last_BD = model.hidden(next_B[:, None], cache)[:, 0]

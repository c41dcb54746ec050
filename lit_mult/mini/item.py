"""An item: a prompt, its right answer, and the side it is on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lit_mult.mini.draw import Draw

_HELD_OUT = 0.25  # share of all possible items that training never shows


@dataclass(frozen=True)
class Item:
    """One example of a task."""

    prompt: str
    """What the model is given."""
    answer: str
    """What is right; one of the choices where there are any."""
    choices: tuple[str, ...] = ()
    """The answers to choose from, each once; none where the model writes its answer."""
    solution: str = ""
    """What a training document has after the prompt: the steps and the answer; empty: the answer alone."""
    key: str = ""
    """What must not be on both sides: the content without what is mere wording; empty: the prompt."""

    @property
    def held_out(self) -> bool:
        """Whether the item is for the benchmark; otherwise it is for training."""
        digest = hashlib.sha256((self.key or self.prompt).encode()).digest()
        return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64

    def with_answer_at(self, place: int) -> Item:
        """The same item with its answer at a place of the choices."""
        wrong = [choice for choice in self.choices if choice != self.answer]
        return replace(self, choices=(*wrong[:place], self.answer, *wrong[place:]))

    @property
    def document(self) -> str:
        """The item as a training document."""
        return f"{self.prompt} {self.solution or self.answer}\n"


Family = Callable[[Draw], Item]
"""Draws an item of one kind."""


def items(family: Family, draw: Draw, *, held_out: bool) -> Iterator[Item]:
    """Items of a family that are on one side, without end; they may repeat."""
    while True:
        item = family(draw)
        if item.held_out == held_out:
            yield item

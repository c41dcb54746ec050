"""Items of the benchmark, and random draws of them that are the same on every Python version and machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

NAMES = tuple(
    "Anna Ben Carl Dora Emma Fred Gina Hugo Ida Jack Kate Leo Mia Nina Otto Paul Rosa Sam Tina Vera Will Zoe".split()
)
THINGS = tuple(
    "apple pen book coin shell stamp card nut cup ball key plum hat ring bead brick leaf egg fig rope".split()
)
_HELD_OUT = 0.25  # share of all possible items that training never shows


class Draw:
    """Draws by name. Python promises the stream of `random()` across its versions, but not what is made of it."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")).random

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + self.below(high - low + 1)

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], n: int) -> list[T]:
        """n different places of the options, in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(n)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All options in random order."""
        return self.some(options, len(options))


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

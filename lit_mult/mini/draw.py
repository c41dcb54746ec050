"""Random draws that are the same on every Python version and machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


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

"""Training text from the families of the benchmark: examples that the benchmark does not ask."""

from __future__ import annotations

from collections.abc import Iterator

from lit_mult.mini import facts
from lit_mult.mini.algebra import algebra
from lit_mult.mini.arithmetic import arithmetic
from lit_mult.mini.draw import Draw
from lit_mult.mini.induction import induction
from lit_mult.mini.item import items
from lit_mult.mini.symbolic import SYMBOLIC

_FACTS = 0.1  # share of the documents


def documents() -> Iterator[str]:
    """Documents without end, always the same: one in ten states facts, the others are examples of reasoning."""
    draw = Draw("training")
    families = [items(family, draw, held_out=False) for family in (*SYMBOLIC.values(), arithmetic, algebra, induction)]
    weights = [1] * len(SYMBOLIC) + [2, 2, 3]
    spread = [family for family, weight in zip(families, weights, strict=True) for _ in range(weight)]
    while True:
        if draw.below(100) < 100 * _FACTS:
            yield facts.document(draw)
        else:
            yield next(draw.one(spread)).document

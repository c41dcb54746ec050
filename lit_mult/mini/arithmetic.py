"""Multi-step arithmetic in words, with the steps written out, in the spirit of GSM8K (arXiv:2110.14168)."""

from __future__ import annotations

from lit_mult.mini.draw import Draw
from lit_mult.mini.item import Item
from lit_mult.mini.words import NAMES, THINGS

_MORE = ("finds {n} more", "buys {n} more", "gets {n} more")
_LESS = ("loses {n}", "gives away {n}", "sells {n}")


def arithmetic(draw: Draw) -> Item:
    """Two or three steps of addition, subtraction and doubling; no number on the way exceeds 50.

    Names and things are mere wording: the same chain of sums is not on both sides.
    """
    name, thing = draw.one(NAMES), draw.one(THINGS)
    total = draw.between(2, 20)
    story, steps = [f"{name} has {total} {thing}s"], []
    for _ in range(draw.between(2, 3)):
        kind = draw.below(5)
        if kind == 0 and total <= 20:
            story.append(f"{name} doubles them")
            steps.append(f"{total} + {total} = {2 * total}")
            total *= 2
        elif kind <= 2 or total < 3:
            n = draw.between(2, 15)
            story.append(f"{name} {draw.one(_MORE).format(n=n)}")
            steps.append(f"{total} + {n} = {total + n}")
            total += n
        else:
            n = draw.between(2, min(total, 15))
            story.append(f"{name} {draw.one(_LESS).format(n=n)}")
            steps.append(f"{total} - {n} = {total - n}")
            total -= n
        if total > 50:
            return arithmetic(draw)
    chain = ". ".join(steps)
    prompt = f"{'. '.join(story)}. How many {thing}s are there?"
    return Item(prompt, str(total), solution=f"{chain}. The answer is {total}.", key=chain)

"""Algebra with the steps written out, in the spirit of MATH (arXiv:2103.03874).

Which letter a variable has is mere wording: the same numbers are not on both sides.
"""

from __future__ import annotations

from lit_mult.mini.draw import Draw
from lit_mult.mini.item import Item

_VARIABLES = "x y z n t".split()


def _signed(n: int) -> str:
    return f"+ {n}" if n >= 0 else f"- {-n}"


def linear_equation(draw: Draw) -> Item:
    """a v + b = c for a whole v."""
    v, a, b, x = draw.one(_VARIABLES), draw.between(2, 9), draw.between(-12, 12), draw.between(1, 12)
    steps = f"{a} {v} = {a * x}. {v} = {x}. The answer is {x}."
    return Item(f"Solve {a} {v} {_signed(b)} = {a * x + b}.", str(x), solution=steps, key=f"solve {a} {b} {x}")


def function_value(draw: Draw) -> Item:
    """The value of a v + b at a whole number."""
    v, a, b, x = draw.one(_VARIABLES), draw.between(2, 9), draw.between(-12, 12), draw.between(2, 12)
    y = a * x + b
    steps = f"{a} * {x} = {a * x}. {a * x} {_signed(b)} = {y}. The answer is {y}."
    return Item(f"Let {v} = {x}. Find {a} {v} {_signed(b)}.", str(y), solution=steps, key=f"value {a} {b} {x}")


def like_terms(draw: Draw) -> Item:
    """The coefficient of a sum of three like terms."""
    v, a, b, c = draw.one(_VARIABLES), draw.between(1, 12), draw.between(-9, 9), draw.between(-9, 9)
    total = a + b + c
    prompt = f"Simplify {a} {v} {_signed(b)} {v} {_signed(c)} {v} and give the coefficient."
    steps = f"{a} {_signed(b)} = {a + b}. {a + b} {_signed(c)} = {total}. The answer is {total}."
    return Item(prompt, str(total), solution=steps, key=f"terms {a} {b} {c}")


def algebra(draw: Draw) -> Item:
    """One of the three kinds."""
    return draw.one((linear_equation, function_value, like_terms))(draw)

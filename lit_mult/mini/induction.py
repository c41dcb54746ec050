"""A rule to be inferred from three examples in the prompt, and applied to a fourth input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_mult.mini.draw import Draw
from lit_mult.mini.item import Item

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _next(letter: str) -> str:
    return _LETTERS[(_LETTERS.index(letter) + 1) % len(_LETTERS)]


# None of them changes the length, so that the length of an answer gives nothing away.
_RULES: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "reverse": lambda s: list(s[::-1]),
    "rotate left": lambda s: [*s[1:], s[0]],
    "rotate right": lambda s: [s[-1], *s[:-1]],
    "swap first two": lambda s: [s[1], s[0], *s[2:]],
    "swap last two": lambda s: [*s[:-2], s[-1], s[-2]],
    "sort": lambda s: sorted(s),
    "first throughout": lambda s: [s[0]] * len(s),
    "last throughout": lambda s: [s[-1]] * len(s),
    "double the first": lambda s: [s[0], s[0], *s[2:]],
    "next letters": lambda s: [_next(letter) for letter in s],
    "copy": lambda s: list(s),
}


def induction(draw: Draw) -> Item:
    """Three letters to three letters; wrong answers are what other rules make of the same input."""
    name = draw.one(list(_RULES))
    inputs = [draw.some(_LETTERS, 3) for _ in range(4)]
    shown = [f"{' '.join(letters)} -> {' '.join(_RULES[name](letters))}" for letters in inputs[:3]]
    fits = [rule for rule in _RULES.values() if all(rule(x) == _RULES[name](x) for x in inputs[:3])]
    answers = {tuple(rule(inputs[3])) for rule in fits}
    others = sorted({tuple(rule(inputs[3])) for rule in _RULES.values()} - answers)
    if len(answers) > 1 or len(others) < 3:  # the examples do not tell the rule, or there is too little to confuse
        return induction(draw)
    answer = " ".join(_RULES[name](inputs[3]))
    choices = [answer, *(" ".join(other) for other in draw.some(others, 3))]
    query = " ".join(inputs[3])
    return Item(f"{' ; '.join(shown)} ; {query} ->", answer, tuple(draw.shuffled(choices)), key=f"{query} -> {answer}")

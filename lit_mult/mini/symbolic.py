"""Symbolic reasoning in the spirit of BIG-Bench Hard (arXiv:2210.09261): five subtasks with one answer each."""

from __future__ import annotations

from itertools import pairwise

from lit_mult.mini.draw import Draw
from lit_mult.mini.item import Family, Item
from lit_mult.mini.words import NAMES, THINGS

_COLOURS = ("red", "blue", "green", "black", "white", "brown")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def boolean(draw: Draw) -> Item:
    """The value of an expression of three to five operands, evaluated from left to right."""
    value = bool(draw.below(2))
    text = str(value)
    for _ in range(draw.between(2, 4)):
        operand, negated, conjunction = bool(draw.below(2)), draw.below(3) == 0, bool(draw.below(2))
        seen = operand != negated
        value = (value and seen) if conjunction else (value or seen)
        text = f"( {text} {'and' if conjunction else 'or'} {'not ' * negated}{operand} )"
    return Item(f"Evaluate: {text} =", str(value), ("True", "False"))


def tracking(draw: Draw) -> Item:
    """Who holds what after one or two swaps among three people."""
    people, colours = draw.some(NAMES, 3), draw.some(_COLOURS, 3)
    held = dict(zip(people, colours, strict=True))
    text = ", ".join(f"{name} has the {colour} ball" for name, colour in held.items())
    for _ in range(draw.between(1, 2)):
        one, other = draw.some(people, 2)
        held[one], held[other] = held[other], held[one]
        text += f". {one} and {other} swap"
    asked = draw.one(people)
    return Item(f"{text}. At the end {asked} has the ball that is", held[asked], tuple(draw.shuffled(colours)))


def brackets(draw: Draw) -> Item:
    """The two or three brackets that close what is open (a Dyck language); wrong answers differ in one or two."""
    text, still_open = list[str](), list[str]()
    length = draw.between(6, 10)
    while len(text) < length or len(still_open) < 2:
        if len(still_open) == 3 or (still_open and draw.below(2) == 0):
            text.append(_BRACKETS[still_open.pop()])
        else:
            still_open.append(draw.one(list(_BRACKETS)))
            text.append(still_open[-1])
    closing = [_BRACKETS[bracket] for bracket in reversed(still_open)]
    answer, wrong = " ".join(closing), list[str]()
    while len(wrong) < 3:
        other = list(closing)
        for _ in range(draw.between(1, 2)):
            other[draw.below(len(other))] = draw.one(list(_BRACKETS.values()))
        if other != closing and " ".join(other) not in wrong:
            wrong.append(" ".join(other))
    return Item(f"Close the brackets: {' '.join(text)} :", answer, tuple(draw.shuffled([answer, *wrong])))


def ordering(draw: Draw) -> Item:
    """The oldest or the youngest of three or four people who are compared pair by pair, the sentences in any order."""
    people = draw.some(NAMES, draw.between(3, 4))
    facts = [f"{older} is older than {younger}" for older, younger in pairwise(people)]
    oldest = bool(draw.below(2))
    prompt = f"Ages: {'. '.join(draw.shuffled(facts))}. The {'oldest' if oldest else 'youngest'} is"
    answer = people[0] if oldest else people[-1]
    others = draw.some([name for name in people if name != answer], 2)
    key = f"{' > '.join(people)} {oldest}"  # the order of the sentences is mere wording
    return Item(prompt, answer, tuple(draw.shuffled([answer, *others])), key=key)


def counting(draw: Draw) -> Item:
    """How often one of two things occurs in a list of five to seven."""
    asked, other = draw.some(THINGS, 2)
    count = draw.between(1, 4)
    listed = draw.shuffled([asked] * count + [other] * (draw.between(5, 7) - count))
    prompt = f"In the list {', '.join(listed)} the number of {asked} is"
    return Item(prompt, str(count), ("1", "2", "3", "4"), key=f"{asked} {sorted(listed)}")


SYMBOLIC: dict[str, Family] = {
    "boolean": boolean,
    "tracking": tracking,
    "brackets": brackets,
    "ordering": ordering,
    "counting": counting,
}
"""Subtask -> its family."""

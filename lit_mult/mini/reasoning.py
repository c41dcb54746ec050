"""Families of reasoning: induction (after MMLU-PRO), symbolic subtasks (after BIG-Bench Hard, arXiv:2210.09261),
multi-step arithmetic (after GSM8K, arXiv:2110.14168) and algebra (after MATH, arXiv:2103.03874), the last two with the
steps written out.

An item's key leaves out what is mere wording: names, things, the letter of a variable, the order of sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from lit_mult.mini.items import NAMES, THINGS, Draw, Family, Item

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_COLOURS = ("red", "blue", "green", "black", "white", "brown")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_MORE = ("finds {n} more", "buys {n} more", "gets {n} more")
_LESS = ("loses {n}", "gives away {n}", "sells {n}")
_VARIABLES = "x y z n t".split()


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

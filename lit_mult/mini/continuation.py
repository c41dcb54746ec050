"""What comes next in a text that training never saw, against three lines of other such texts (as HellaSwag,
arXiv:1905.07830, but with real wrong endings in place of generated ones)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_mult.mini.items import Draw, Item

_CONTEXT = 130  # characters before the line that is asked for: at least half, at most all of it
_LINE = (20, 60)  # characters of that line


def continuation(held_out: Sequence[str], seen: Iterable[str], n: int) -> list[Item]:
    """Up to n items from held-out texts, none of whose lines to choose from occurs in the seen ones.

    Wrong lines come from other texts and are as deeply indented and about as long as the right one.
    """
    known = {line.strip() for text in seen for line in text.splitlines()}
    places = list[tuple[int, str, str]]()  # text, context, line
    for number, text in enumerate(held_out):
        start = 0
        for line in text.splitlines(keepends=True):
            context = text[max(0, start - _CONTEXT) : start]
            context = context[context.find("\n") + 1 :] if start > _CONTEXT else context
            start += len(line)
            ending = line.strip()
            if _LINE[0] <= len(ending) <= _LINE[1] and ending not in known and len(context) >= _CONTEXT // 2:
                known.add(ending)  # a line is asked for once
                places.append((number, context, line.rstrip()))
    draw = Draw("continuation")
    order = draw.shuffled(places)
    found = list[Item]()
    for number, context, line in order:
        indent = len(line) - len(line.lstrip())
        alike = [
            other.strip()
            for text, _, other in order
            if text != number and len(other) - len(other.lstrip()) == indent and 0.8 <= len(other) / len(line) <= 1.25
        ]
        if len(alike) >= 3 and len(found) < n:
            choices = tuple(draw.shuffled([line.strip(), *draw.some(alike, 3)]))
            # lm-eval puts one space between prompt and answer: the last of the line's own, where it has any.
            found.append(Item(context + " " * max(0, indent - 1), line.strip(), choices))
    return found

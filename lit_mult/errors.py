"""Exceptions: errors that the user can fix, and a stop on request."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input or an unusable environment: a one-line message with the fault and its fix.

    The command line prints it on stderr and exits with code 2.
    """


class ConfigError(UserError):
    """A field has a value that is not allowed."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        # A mapping or a list says what is wrong with it in its first words.
        shown = _cut(repr(value), 100) if isinstance(value, dict | list) else repr(value)
        super().__init__(f"{field} = {shown}: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class Interrupted(Exception):  # noqa: N818 - not an error
    """Work was stopped on request (SIGINT, SIGTERM); the same call resumes it."""


_SYNONYMS = {
    word: field
    for field, words in {
        "dmodel": "width dim hiddensize nembd",
        "nlayers": "depth layers numlayers numhiddenlayers nlayer",
        "seqlen": "contextlength blocksize maxlength sequencelength",
        "steps": "maxsteps maxepochs epochs",
        "lr": "learningrate",
        "weightdecay": "wd",
        "clip": "gradientclipval maxgradnorm",
    }.items()
    for word in words.split()
}
"""Other libraries' words for fields, without case and punctuation."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The name that was most likely meant by a word that is none of them; None where none is near.

    Of names that are alike but for case and punctuation, or in the part after the last dot, the shortest comes first;
    then the one with the best ratio of difflib, from 0.6 on.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\W_]", "", name).casefold()

    def last(name: str) -> str:
        return plain(name.rpartition(".")[2])

    def ratio(name: str) -> float:
        # A bare word may leave out the first parts of a dotted name.
        forms = {plain(name)} if "." in word else {plain(name), last(name)}
        return max(difflib.SequenceMatcher(None, plain(word), form).ratio() for form in forms)

    names = sorted(known, key=len)
    for key in (plain, last):
        if alike := [name for name in names if key(name) == key(word)]:
            return alike[0]
    if alike := [name for name in names if last(name) == _SYNONYMS.get(last(word))]:
        return alike[0]
    best = max(names, key=ratio, default=None)
    return best if best is not None and ratio(best) >= 0.6 else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: `; did you mean X?`, or nothing where no known one is near."""
    name = closest(str(word), known)
    return "" if name is None else f"; did you mean {name}?"


def one_of(word: object, known: Iterable[str]) -> str:
    """What may stand in place of an unknown name: `a, b, c; did you mean b?`."""
    names = list(known)
    return f"{', '.join(names)}{did_you_mean(word, names)}"


def one_line(error: Exception) -> str:
    """The message of an exception, on one line of at most 300 characters."""
    return _cut(" ".join(str(error).split()) or type(error).__name__, 300)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

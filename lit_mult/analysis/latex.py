"""Tables for papers: LaTeX with the rules of booktabs, the cells of the Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "‖": r"$\|$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "\n": " ",
    "\r": " ",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
_NUMBER = r"(?:< )?[+-]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
# 2^-6.25, 3.1e15, < 0.0001 or [-0.0216, -0.0047]: numbers by themselves, not those in a name such as mini-0.7.
_MATH = re.compile(rf"(?<![\w.^-])(?:2\^{_NUMBER}|{_NUMBER})(?![\w^])(?!\.[0-9])")
_NUMERIC = re.compile(rf"(?:2\^)?{_NUMBER}|n/a|")


def to_latex(table: pd.DataFrame, comments: Iterable[str] = ()) -> str:
    r"""A `tabular` of a table of strings, such as those of `analysis.tables`; needs `\usepackage{booktabs}`.

    Columns of numbers are aligned on the right: their numbers have equal decimals. `comments` stand above, a line each.
    """
    columns = [[str(cell) for cell in table[name]] for name in table]
    sides = "".join("r" if all(map(_NUMERIC.fullmatch, cells)) and any(cells) else "l" for cells in columns)
    lines = [f"% {' '.join(line.split())}" for line in comments]
    lines += [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", _row(map(escape, map(str, table.columns))), r"\midrule"]
    lines += [_row(map(_cell, cells)) for cells in zip(*columns, strict=True)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape(text: str) -> str:
    """The text for LaTeX, with its special characters written out."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def _cell(text: str) -> str:
    """The text escaped, with its numbers in math, where a minus is one and powers are raised."""
    parts, end = [], 0
    for found in _MATH.finditer(text):
        parts += [escape(text[end : found.start()]), f"${_number(found[0])}$"]
        end = found.end()
    return "".join([*parts, escape(text[end:])])


def _number(text: str) -> str:
    base, power, exponent = text.partition("^")
    if power:
        return f"{base}^{{{exponent}}}"
    digits, power, exponent = text.replace(",", "{,}").partition("e")
    return rf"{digits} \times 10^{{{int(exponent)}}}" if power else digits


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"

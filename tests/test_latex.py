"""Tables in LaTeX: balanced, of equal rows, with nothing that LaTeX would read as a command."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_mult.analysis.latex import escape, to_latex

# What LaTeX reads by itself, once escapes, our own commands and numbers in math are taken away.
COMMANDS = re.compile(r"\\[&%$#_{}]|\\text(?:backslash|asciicircum|asciitilde|less|greater|bar)\{\}|\$[^$]*\$")
SPECIAL = set("\\&%$#_{}~^")


@given(st.text())
def test_no_special_character_of_a_text_is_left(text: str) -> None:
    assert not SPECIAL & set(COMMANDS.sub("", escape(text)))


@given(st.lists(st.lists(st.text(), min_size=3, max_size=3), max_size=4), st.lists(st.text(), max_size=2))
def test_rows_have_equal_cells_whatever_is_in_them(rows: list[list[str]], comments: list[str]) -> None:
    lines = to_latex(pd.DataFrame(rows, columns=["a & b", "c_1", "100 %"]), comments).split("\n")
    assert lines.pop() == ""
    assert all(line.startswith("% ") for line in lines[: len(comments)])
    begin, top, header, middle, *body, bottom, end = lines[len(comments) :]
    assert (top, middle, bottom, end) == (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")
    assert re.fullmatch(r"\\begin\{tabular\}\{[lr]{3}\}", begin)
    assert len(body) == len(rows)
    for line in (header, *body):
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", line)) == 2
        assert not SPECIAL - {"&"} & set(COMMANDS.sub("", line.removesuffix(r" \\")))


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("-0.0131", "$-0.0131$"),
        ("[-0.0216, +0.0047]", "[$-0.0216$, $+0.0047$]"),
        ("2^-6.25", "$2^{-6.25}$"),
        ("3.1e15", r"$3.1 \times 10^{15}$"),
        ("1,234", "$1{,}234$"),
        ("< 0.0001", "$< 0.0001$"),
        ("27.0 ± 1.9", r"$27.0$ $\pm$ $1.9$"),
        ("vectors - muP", "vectors - muP"),
        ("mini_facts", r"mini\_facts"),
        ("run-7.b", "run-7.b"),
        ("muP · AdamW, d = 32", r"muP $\cdot$ AdamW, d = $32$"),
    ],
)
def test_numbers_are_in_math_and_names_are_not(cell: str, written: str) -> None:
    assert rf"{written} \\" in to_latex(pd.DataFrame({"x": [cell]})).split("\n")


def test_columns_of_numbers_stand_on_the_right() -> None:
    table = pd.DataFrame(
        {"line": ["muP", "2"], "loss": ["3.1000", "n/a"], "interval": ["[1, 2]", "[1, 3]"], "": ["", ""]}
    )
    assert to_latex(table).startswith("\\begin{tabular}{lrll}\n")

"""Printing: for people, with styles on a terminal alone, aligned columns and what to do next; for programs, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def say(line: str, style: str = "", *, stderr: bool = False) -> None:
    """Print a line, in a style of rich where this is a terminal; NO_COLOR takes the colours away."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=stderr, force_jupyter=False).print(Text(line, style), soft_wrap=True)


def warn(line: str) -> None:
    """Print what stands against a result."""
    say(f"warning: {line}", "yellow")


def print_columns(table: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Mapping[str, Any]) -> None:
    """Print plain values as JSON; null for NaN and infinities, which JSON has not."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(finite(value), indent=1))


def print_next(steps: Sequence[tuple[str, str]]) -> None:
    """Print commands to go on with, and what each is for, on stderr: they are no result."""
    width = max((len(command) for command, _ in steps), default=0)
    for number, (command, purpose) in enumerate(steps):
        say(f"{'' if number else 'next:':6}{command:{width}}  # {purpose}", "dim", stderr=True)

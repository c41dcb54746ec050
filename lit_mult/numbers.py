"""Numbers as people write them: 0.125, 1e-3, 2^-7.5."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator


def read_number(value: Any) -> Any:
    """2^x as a float, where x is a decimal number, and so 1e-3, which is text in YAML; anything else as it is."""
    if not isinstance(value, str):
        return value
    if power := re.fullmatch(r"2\^([+-]?\d{1,3}(?:\.\d+)?)", value):
        return 2.0 ** float(power[1])
    return float(value) if re.fullmatch(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+", value) else value


def read_numbers(value: Any) -> Any:
    """The same for all values in plain mappings and lists."""
    if isinstance(value, dict):
        return {key: read_numbers(part) for key, part in value.items()}
    return [read_numbers(part) for part in value] if isinstance(value, list) else read_number(value)


class _OrPower(BeforeValidator):
    __module__ = BeforeValidator.__module__  # jsonargparse lets pydantic validate what pydantic's own classes annotate

    def __repr__(self) -> str:  # in --help, as part of the type
        return "or 2^x"


Number = Annotated[float, _OrPower(read_number)]
"""A float of a config or a study, which may be written as 2^x."""


def written(value: Any) -> str:
    """A value as a person writes it: 0.125, 2^-7.5 for a power of two that is longer, three digits of others."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:.3g}"
    if value > 0 and float(short) != value:
        eighths = 8 * math.log2(value)
        if math.isclose(eighths, round(eighths), abs_tol=1e-6):
            return f"2^{round(eighths) / 8:g}"
    return short

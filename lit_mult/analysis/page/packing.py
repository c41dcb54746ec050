"""Data made small for a page: text is deflated, columns share repeated values, curves have 16 bits a point.

`assets/packed.js` reads what this module writes.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lit_mult.analysis.seeds import Floats

MOST_POINTS = 400
"""A longer curve is shown as means over neighbours."""
_NO_VALUE = 0xFFFF
_TOP = _NO_VALUE - 1


def deflated(content: bytes) -> str:
    """Bytes as base64 of a zlib stream, which a browser's DecompressionStream reads."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def packed(data: Any) -> str:
    """JSON data, deflated; what is not finite in it must be None."""
    return deflated(json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode())


def columns(table: pd.DataFrame) -> dict[str, Any]:
    """A table as {"length": rows, "columns": {name: column}}, for `packed`; NaN and None are null.

    A column is {"all": value}, {"of": values, "at": their places, a row each}, or {"each": values}.
    """
    return {"length": len(table), "columns": {str(name): _column(plain(table[name])) for name in table}}


def plain(values: Iterable[Any]) -> list[Any]:
    """Values as JSON has them: None for NaN and infinities, Python's types for numpy's."""
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _column(values: list[Any]) -> dict[str, Any]:
    # True == 1 == 1.0 in a dict, and the page must not show one for the other.
    different = {(type(value), value): value for value in values}
    if len(different) == 1:
        return {"all": values[0]}
    if 2 * len(different) > len(values):
        return {"each": values}
    places = {key: place for place, key in enumerate(different)}
    return {"of": list(different.values()), "at": [places[type(value), value] for value in values]}


def packed_curves(curves: Iterable[tuple[ArrayLike, ArrayLike]]) -> str:
    """Curves of (steps, values), for a page: base64 of a deflated stream.

    A value is off by 1/131068 of the range of its curve at most. Of a curve of more than `MOST_POINTS` points, means of
    neighbours stand at the last of their steps. The stream is a JSON header in a line, then the values of all curves as
    16-bit integers: differences to the value before, all low bytes before all high ones, which deflates best.
    """
    header: list[Any] = []
    points = [np.zeros(0, dtype=np.uint16)]
    for steps, values in curves:
        at, y = _thinned(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=float))
        finite = y[np.isfinite(y)]
        low, high = (float(f"{end:.7g}") for end in (finite.min(), finite.max())) if len(finite) else (0.0, 0.0)
        scale = (high - low) / _TOP or 1.0
        codes = np.where(np.isfinite(y), np.clip(np.rint((y - low) / scale), 0, _TOP), _NO_VALUE)
        points.append(codes.astype(np.uint16))
        header.append([len(y), low, high, *_progression(at)])
    codes = np.concatenate(points)
    moves = np.diff(codes, prepend=np.uint16(0))  # modulo 2^16
    planes = (moves & 0xFF).astype(np.uint8).tobytes() + (moves >> 8).astype(np.uint8).tobytes()
    return deflated(json.dumps(header, separators=(",", ":")).encode() + b"\n" + planes)


def _thinned(steps: NDArray[np.int64], values: Floats) -> tuple[NDArray[np.int64], Floats]:
    if len(steps) <= MOST_POINTS:
        return steps, values
    starts = np.arange(0, len(steps), -(-len(steps) // MOST_POINTS))
    sizes = np.diff(starts, append=len(steps))
    return steps[starts + sizes - 1], np.add.reduceat(values, starts) / sizes


def _progression(steps: NDArray[np.int64]) -> list[Any]:
    """First step, stride, and a list of the steps that do not follow from them."""
    if not len(steps):
        return [0, 0, []]
    stride = int(steps[1] - steps[0]) if len(steps) > 1 else 0
    regular = int((steps == steps[0] + stride * np.arange(len(steps))).cumprod().sum())
    return [int(steps[0]), stride, steps[regular:].tolist()]

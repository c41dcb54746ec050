"""The readings of a run: in memory, in checkpoints and, at the end, in a parquet file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_mult.atomic import new_file
from lit_mult.diagnostics.keys import COLUMNS, MetricKey, layer_of
from lit_mult.errors import UserError


class Reading(NamedTuple):
    """One measurement of one module; see `MetricKey`."""

    quantity: str
    name: str
    role: str
    value: Tensor
    """() on the model's device; float32, as not every device supports float64."""


def require_pyarrow() -> None:
    """Raises: UserError when pyarrow, which writes parquet, is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("train.diagnostics: writing parquet needs pyarrow: pip install 'lit-mult[data]'") from None


class Readings:
    """Rows (step, key, value), each key kept once."""

    def __init__(self) -> None:
        self._numbers: dict[MetricKey, int] = {}
        self._steps: list[int] = []
        self._keys: list[int] = []
        self._values: list[float] = []

    def add(self, group: str, step: int, readings: Iterable[Reading]) -> None:
        """Add a group's readings of one step, with one transfer from the device."""
        added = list(readings)
        if not added:
            return
        self._values += torch.stack([reading.value for reading in added]).tolist()
        self._steps += [step] * len(added)
        for quantity, name, role, _ in added:
            key = MetricKey(group, quantity, name, layer_of(name), role)
            self._keys.append(self._numbers.setdefault(key, len(self._numbers)))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors, which load with weights_only."""
        return {
            "numbers": [list(key) for key in self._numbers],
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "keys": torch.tensor(self._keys, dtype=torch.int64),
            "values": torch.tensor(self._values, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._numbers = {MetricKey(*key): number for number, key in enumerate(state["numbers"])}
        self._steps, self._keys = state["steps"].tolist(), state["keys"].tolist()
        self._values = state["values"].tolist()

    def write(self, path: Path) -> None:
        """Write all rows, atomically, over the file of an earlier attempt. Raises: UserError when that fails."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        keys = list(self._numbers)
        rows = [
            (step, *keys[number], value)
            for step, number, value in zip(self._steps, self._keys, self._values, strict=True)
        ]
        types = (pa.int64(), pa.string(), pa.string(), pa.string(), pa.int64(), pa.string(), pa.float64())
        columns = {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}
        table = pa.table(columns, pa.schema(list(zip(COLUMNS, types, strict=True))))
        try:
            with new_file(path, overwrite=True) as scratch:
                pq.write_table(table, scratch, compression="zstd")
        except OSError as error:
            raise UserError(f"{path}: cannot write the diagnostics ({error.strerror or error})") from None

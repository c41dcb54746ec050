"""The readings of a run while it is under way, in checkpoints and, at the end, as a parquet file."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lit_mult.diagnostics.keys import COLUMNS, MetricKey
from lit_mult.diagnostics.parts import Reading
from lit_mult.errors import UserError


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

    def add(self, step: int, readings: Iterable[Reading]) -> None:
        """Take readings of one step, with one transfer from the device."""
        taken = list(readings)
        if not taken:
            return
        self._values += torch.stack([value for _, value in taken]).tolist()
        self._keys += [self._numbers.setdefault(key, len(self._numbers)) for key, _ in taken]
        self._steps += [step] * len(taken)

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
        """Write all rows; the file appears complete or not at all, and replaces one from an earlier attempt.

        Raises:
            UserError: the place cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = dict(zip(COLUMNS, (pa.int64(), *[pa.string()] * 3, pa.int64(), pa.string(), pa.float64()), strict=True))
        keys = list(self._numbers)
        fields = (
            zip(*(keys[number] for number in self._keys), strict=True) if self._keys else [()] * len(MetricKey._fields)
        )
        columns = dict(zip(COLUMNS, (self._steps, *fields, self._values), strict=True))
        table = pa.table({name: pa.array(column, types[name]) for name, column in columns.items()})
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, scratch, compression="zstd")
            scratch.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot write the diagnostics ({error.strerror or error})") from None
        finally:
            scratch.unlink(missing_ok=True)

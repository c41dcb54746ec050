"""Diagnostics of runs as one table."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from lit_mult.diagnostics.keys import COLUMNS
from lit_mult.errors import UserError
from lit_mult.layout import cell_name, find_diagnostics


def load_diagnostics(
    folder: Path | str, *, group: str | None = None, cells: Collection[str] | None = None
) -> pd.DataFrame:
    """One row a reading: cell, step, group, quantity, name, layer, role, value.

    Merges with `load_records` on `cell`; `layer` is NA outside the blocks. See `diagnostics.keys` for the meaning of a
    step.

    Args:
        folder: of a run, or results folder of a study.
        group: read this group only.
        cells: read these cells only.

    Raises:
        UserError: there are no diagnostics, a file is damaged, or pyarrow is not installed.
    """
    folder = Path(folder)
    paths = [path for path in find_diagnostics(folder) if cells is None or cell_name(path, folder) in cells]
    if not paths:
        raise UserError(f"{folder}: no diagnostics here; ask for them with train.diagnostics when the run is made")
    return pd.concat([_read(path, folder, group) for path in paths], ignore_index=True)


def _read(path: Path, folder: Path, group: str | None) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path, engine="pyarrow", filters=None if group is None else [("group", "==", group)])
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'lit-mult[data]'") from None
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if tuple(frame.columns) != COLUMNS:
        raise UserError(f"{path}: damaged, its columns are {', '.join(map(str, frame.columns))}")
    frame.insert(0, "cell", cell_name(path, folder))
    return frame.astype({"layer": "Int64"})

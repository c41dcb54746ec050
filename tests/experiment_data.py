"""Evidence of made-up cells, for the tests of experiments: what the analysis sees of a study, without training one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lit_mult.analysis import drawing
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.diagnostics.keys import layer_of

Reading = tuple[int, str, str, float]
"""(step, quantity, name, value)"""


def evidence(cells: Iterable[tuple[Mapping[str, Any], Iterable[Reading]]], folder: Path = Path()) -> Evidence:
    """Evidence of (columns of the run, readings) pairs.

    A run has the defaults arm "a", AdamW, width 64, lr 0.01, seed 0 and final loss 3; factors are given by their dotted
    names.
    """
    defaults = {"arm": "a", "optimizer": "adamw", "d_model": 64, "lr": 0.01, "seed": 0, "final_loss": 3.0}
    runs, readings = [], []
    for number, (columns, found) in enumerate(cells):
        cell = f"cell{number}"
        runs.append({**defaults, "status": "completed", **columns, "cell": cell})
        for step, quantity, name, value in found:
            place = {"name": name, "layer": layer_of(name), "role": name.rpartition(".")[2]}
            readings.append({"cell": cell, "step": step, "quantity": quantity, **place, "value": value})
    made = Evidence(folder, pd.DataFrame(runs))
    factors = [name for name in made.runs if "." in str(name)]
    columns = ["cell", "arm", "optimizer", "d_model", "lr", "seed", *factors]
    if readings:
        frame = pd.DataFrame(readings).astype({"layer": "Int64"}).merge(made.runs[columns], on="cell")
        made.__dict__["readings"] = frame  # in place of what is read from files
    return made


def outcomes(found: Findings) -> list[str]:
    return list(found.tables["verdicts"]["outcome"])


def outcomes_by_claim(found: Findings) -> dict[str, str]:
    return dict(zip(found.tables["verdicts"]["claim"], outcomes(found), strict=True))


def saved(found: Findings) -> None:
    """Every figure has a caption and can be saved."""
    assert found.captions.keys() == found.figures.keys()
    for figure in found.figures.values():
        assert drawing.save(figure)["png"].startswith(b"\x89PNG")

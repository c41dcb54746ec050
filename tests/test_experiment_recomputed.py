"""The committed results of experiments, recomputed from records and diagnostics by code that shares nothing."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from test_results import RESULTS, table

pq = pytest.importorskip("pyarrow.parquet")

STUDIES = ["projector_norm", "mlp_scale"]
pytestmark = pytest.mark.skipif(
    not all((RESULTS / study).is_dir() for study in STUDIES), reason="these studies have no committed results"
)

Key = tuple[str, str, int]
"""(optimizer, arm, seed)"""
Lines = dict[Key, dict[float, tuple[float, float, float]]]
"""Curve -> scale -> (final loss, log norm, distance of that from noise)"""


def scale_of(record: dict[str, Any]) -> float:
    factors = record["cell"]["factors"]
    if "parametrization.lr.lm_head" in factors:
        return float(factors["parametrization.lr.lm_head"])
    gate, up, down = (float(factors["parametrization.lr"][role]) for role in ("gate_proj", "up_proj", "down_proj"))
    assert gate == up == down
    return gate


def log_norm(path: Path) -> tuple[float, float]:
    """Log RMS, and how far it is from that of noise, of the LM head or on average over the MLP matrices at the end."""
    head = path.parent.parent.name == "projector_norm"
    readings = pq.read_table(path).to_pylist()
    last = max(row["step"] for row in readings if row["quantity"] == "weight_rms")
    norms, noise = (
        {
            row["name"]: math.log(row["value"])
            for row in readings
            if (row["quantity"], row["step"]) == (quantity, last)
            and (row["name"] == "lm_head" if head else ".mlp." in row["name"])
        }
        for quantity in ("weight_rms", "weight_noise_rms")
    )
    assert len(norms) == 1 if head else len(norms) % 3 == 0
    distances = [abs(norm - noise[name]) for name, norm in norms.items()]
    return sum(norms.values()) / len(norms), sum(distances) / len(norms)


def fitted_slope(line: dict[float, float]) -> float:
    """Of y against log x, from pairs x: y."""
    points = [(math.log(x), y) for x, y in line.items()]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


@pytest.fixture(scope="module", params=STUDIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return RESULTS / str(request.param)


@pytest.fixture(scope="module")
def lines(folder: Path) -> Lines:
    """See `Lines`."""
    found = Lines()
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text())
        key = (record["config"]["optimizer"], record["cell"]["arm"], record["seed"])
        reading = log_norm(folder / "diagnostics" / f"{path.stem}.parquet")
        found.setdefault(key, {})[scale_of(record)] = (record["final_loss"], *reading)
    assert {len(line) for line in found.values()} == {5}
    return found


def key_of(row: dict[str, str]) -> Key:
    return row["optimizer"], row["arm"], int(row["seed"])


def test_slopes_of_norms_agree_to_1e_9(folder: Path, lines: Lines) -> None:
    compared = defaultdict[float, set[Key]](set)
    for row in table(folder.name, "slopes"):
        if row["measure"] in ("head_rms", "mlp_rms"):
            smallest = float(row["from_scale"])
            norms = {scale: norm for scale, (_, norm, _) in lines[key_of(row)].items() if scale >= smallest}
            assert float(row["slope"]) == pytest.approx(fitted_slope(norms), abs=1e-9)
            compared[smallest].add(key_of(row))
    scales = {scale for line in lines.values() for scale in line}
    assert min(compared) == min(scales)
    assert all(keys == set(lines) for keys in compared.values())


def test_rises_of_losses_agree_to_1e_9(folder: Path, lines: Lines) -> None:
    compared = 0
    for row in table(folder.name, "rises"):
        optimizer, arm, _ = key = key_of(row)
        at = float(row["at"])
        totals = defaultdict[float, float](float)  # over the seeds
        for (other_optimizer, other_arm, _), line in lines.items():
            if (other_optimizer, other_arm) == (optimizer, arm):
                for scale, (loss, *_) in line.items():
                    totals[scale] += loss
        best = min((scale for scale in totals if scale != at), key=totals.__getitem__)
        assert float(row["rise"]) == pytest.approx(lines[key][at][0] - lines[key][best][0], abs=1e-9)
        compared += 1
    assert compared == 2 * len(lines)  # both ends


def test_noise_factors_agree_to_1e_9(folder: Path, lines: Lines) -> None:
    compared = 0
    for row in table(folder.name, "noise_factors"):
        if row["measure"] in ("head_over_noise", "mlp_noise_factor"):
            distances = [distance for _, _, distance in lines[key_of(row)].values()]
            assert float(row["factor"]) == pytest.approx(math.exp(sum(distances) / len(distances)), abs=1e-9)
            compared += 1
    assert compared == len(lines)

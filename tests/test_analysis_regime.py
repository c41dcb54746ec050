"""The part of a report on decay times and the noise scale, of made-up records; all numbers by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_analysis_frame import write_run

from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.regime import regime
from lit_mult.analysis.report import write_report
from lit_mult.errors import UserError

RATES = (2**-7, 2**-6, 2**-5)
LONG = {"train.steps": 6000, "optim.weight_decay": 0.1}
"""wsd: 6000 - 600 - 1000 = 4400 steps at the peak rate, so 6.875 decay times at lr 2^-6 and width 32."""


def write_rates(folder: Path, losses: Iterable[float | None], **settings: Any) -> None:
    for lr, loss in zip(RATES, losses, strict=True):
        write_run(folder, loss, lr=lr, **settings)


def row_of(folder: Path, label: str, width: int) -> dict[str, Any]:
    table = regime(folder, load_records(folder)).tables["regime"]
    (row,) = table[(table["label"] == label) & (table["d_model"] == width)].to_dict("records")
    return row


def test_a_row_is_about_the_best_rate_and_about_all_rates(tmp_path: Path) -> None:
    for width, best in ((32, 1.9), (64, 2.1)):  # the best rates are 2^-6 and 2^-7
        write_rates(tmp_path, [2.0, best, 2.2], width=width, factors=LONG)
    label = "muP · AdamW, weight_decay=0.1, steps=6000"
    expected = {
        "lr": 2**-6, "decay_times_hidden_low": 6.875, "decay_times_hidden_high": 6.875, "decay_times_head": 6.875,
        "decay_times_embedding": 6.875, "equilibrium_hidden_low": 640, "equilibrium_hidden_high": 640,
        "all_rates_low": 6.875 / 2, "all_rates_high": 6.875 * 2, "runs": 3, "below": 0,
    }  # fmt: skip
    row = row_of(tmp_path, label, 32)
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    # At width 64 the lr of hidden matrices and head is halved; 6.875 / 4 = 1.72 at the best rate.
    row = row_of(tmp_path, label, 64)
    expected = {
        "lr": 2**-7, "decay_times_hidden_low": 6.875 / 4, "decay_times_head": 6.875 / 4,
        "decay_times_embedding": 6.875 / 2, "equilibrium_hidden_high": 2560, "all_rates_high": 6.875, "below": 1,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_warnings_name_lines_and_widths_below_the_balance(tmp_path: Path) -> None:
    for width, best in ((32, 1.9), (64, 2.1)):
        write_rates(tmp_path, [2.0, best, 2.2], width=width, factors=LONG)
    assert regime(tmp_path, load_records(tmp_path)).warnings == [
        "at the best rate hidden matrices do not reach the balance of noise and decay (lr * weight_decay * steps = "
        "1.7, below 2), so there is no fixed norm yet for multipliers to free: "
        "muP · AdamW, weight_decay=0.1, steps=6000, d = 64",
        "1 of 6 runs have hidden matrices below 2 decay times, where norms still depend on the start",
    ]


def test_warnings_are_few_where_nothing_reaches_the_balance(tmp_path: Path) -> None:
    # 220 steps at the peak rate: 2^-6 * 0.1 * 220 = 0.34 at width 32, 0.086 at width 128; Muon has 0.17 there.
    for arm in ("muP", "vectors"):
        for optimizer in ("adamw", "muon"):
            for width in (32, 128):
                write_rates(tmp_path, [2.0, 1.9, 2.2], arm=arm, optimizer=optimizer, width=width)
    report = write_report(tmp_path)
    assert report.warnings[-2:] == (
        "at the best rate hidden matrices do not reach the balance of noise and decay (lr * weight_decay * steps = "
        "0.086 to 0.34, below 2), so there is no fixed norm yet for multipliers to free: every line and width",
        "24 of 24 runs have hidden matrices below 2 decay times, where norms still depend on the start",
    )
    page = report.paths[-1].read_text()
    assert "### Regime" in page
    assert "| vectors · Muon | 128 | 2^-6.00 | 0.17 | 0.086 | 0.34 | 1,280 | 0.086 to 0.34 | 3 of 3 |" in page
    assert "noise scale" not in page
    assert {"regime.csv", "regime.md"} < {path.name for path in report.paths}


def test_without_a_best_rate_there_are_the_other_numbers(tmp_path: Path) -> None:
    write_rates(tmp_path, [None, None, None], width=32)
    row = row_of(tmp_path, "muP · AdamW", 32)
    assert math.isnan(row["lr"])
    assert math.isnan(row["decay_times_hidden_low"])
    assert row["all_rates_high"] == pytest.approx(0.1 * 220 / 32)
    found = regime(tmp_path, load_records(tmp_path))
    assert found.warnings == [
        "3 of 3 runs have hidden matrices below 2 decay times, where norms still depend on the start"
    ]
    assert found.display_tables["regime"].iloc[0].tolist() == [
        "muP · AdamW", "32", "n/a", "n/a", "n/a", "n/a", "n/a", "0.17 to 0.69", "3 of 3",
    ]  # fmt: skip


def test_an_optimizer_that_holds_norms_is_not_warned_about(tmp_path: Path) -> None:
    write_rates(tmp_path, [2.0, 1.9, 2.2], optimizer="hyperball")
    found = regime(tmp_path, load_records(tmp_path))
    assert found.warnings == []
    assert found.display_tables["regime"].iloc[0].tolist() == [
        "muP · Hyperball", "64", "2^-6.00", "n/a", "n/a", "0.34", "n/a", "n/a", "0 of 3",
    ]  # fmt: skip


def test_ranges_over_roles_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0, width=32, factors={**LONG, "parametrization.lr": {"q_proj": 0.25}})
    found = regime(tmp_path, load_records(tmp_path))
    assert found.display_tables["regime"]["decay times, hidden"].tolist() == ["1.7 to 6.9"]
    assert "= 1.7, below 2)" in found.warnings[0]
    assert found.warnings[1].startswith("1 of 1 runs have")


def write_noise(path: Path, readings: Iterable[tuple[int, str, str, float]]) -> None:
    """Diagnostics of one cell, of (step, quantity, name, value)."""
    columns = ["step", "quantity", "name", "value"]
    frame = pd.DataFrame(list(readings), columns=columns).assign(group="noise", layer=None, role="q_proj")
    other = frame.assign(group="norms", quantity="weight_noise", value=1e9)  # not to be read
    path.parent.mkdir(exist_ok=True)
    whole = pd.concat([frame, other])[["step", "group", "quantity", "name", "layer", "role", "value"]]
    whole.astype({"layer": "Int64"}).to_parquet(path)


def noise_at(step: int, noise: float, signal: float) -> list[tuple[int, str, str, float]]:
    """Two matrices that share noise and signal, and a multiplier that has much of both."""
    halves = [
        (step, quantity, name, value / 2)
        for quantity, value in (("weight_noise", noise), ("weight_signal", signal))
        for name in ("lm_head", "embed_tokens")
    ]
    return [*halves, (step, "row_noise", "lm_head", 1e6), (step, "row_signal", "lm_head", 1.0)]


def recorded(folder: Path, **settings: Any) -> str:
    """Write a run that recorded the noise; its cell."""
    path = write_run(folder, nuisance={"train.diagnostics": ["norms", "noise"]}, **settings)
    return str(json.loads(path.read_text())["cell"]["cell"])


def test_the_noise_scale_is_the_median_over_the_main_stage_at_the_best_rate(tmp_path: Path) -> None:
    # 300 steps: the main stage is 30 to 249. Scales of seed 0 are 10, 20 and none seen, of seed 1 30 and 40; outside of
    # the stage 1000. The median of 10, 20, 30, 40 and infinity is 30.
    first, second, worse = (
        recorded(tmp_path, loss=2.0 + lr, seed=seed, lr=lr) for seed, lr in ((0, 0.01), (1, 0.01), (0, 0.02))
    )
    recorded(tmp_path, loss=2.02, seed=1, lr=0.02)
    edges = noise_at(29, 1000.0, 1.0) + noise_at(250, 1000.0, 1.0)
    folder = tmp_path / "diagnostics"
    write_noise(
        folder / f"{first}.parquet",
        [*edges, *noise_at(30, 20.0, 2.0), *noise_at(100, 20.0, 1.0), *noise_at(150, 5.0, -1.0)],
    )
    write_noise(folder / f"{second}.parquet", [*edges, *noise_at(30, 30.0, 1.0), *noise_at(249, 20.0, 0.5)])
    write_noise(folder / f"{worse}.parquet", noise_at(100, 7.0, 1.0))

    found = regime(tmp_path, load_records(tmp_path))

    (row,) = found.tables["regime"].to_dict("records")
    names = ["noise_scale", "noise_scale_tokens", "batch_size", "batch_tokens"]
    assert [row[name] for name in names] == pytest.approx([30, 30 * 128, 16, 16 * 128])
    assert found.display_tables["regime"].iloc[0].tolist()[-2:] == ["30 (3,840 tokens)", "16 (2,048 tokens)"]
    assert "B_simple" in found.how_to_read


def test_noise_that_was_recorded_and_is_not_at_hand_is_said(tmp_path: Path) -> None:
    cell = recorded(tmp_path, loss=2.0)
    missing = write_report(tmp_path)
    assert missing.warnings[2].startswith("1 of 1 runs")
    assert missing.warnings[3].startswith("no gradient-noise scale: no diagnostics here")
    (tmp_path / "diagnostics").mkdir()
    (tmp_path / "diagnostics" / f"{cell}.parquet").write_bytes(b"not parquet")
    damaged = write_report(tmp_path)
    assert damaged.warnings[3].startswith(f"no gradient-noise scale: diagnostics/{cell}.parquet: cannot be read")


def test_a_file_without_readings_of_matrices_gives_no_noise_scale(tmp_path: Path) -> None:
    cell = recorded(tmp_path, loss=2.0)
    write_noise(tmp_path / "diagnostics" / f"{cell}.parquet", [])
    found = regime(tmp_path, load_records(tmp_path))
    assert found.tables["regime"]["noise_scale"].isna().all()
    assert "noise scale" not in found.display_tables["regime"]


def test_a_group_and_cells_of_diagnostics_can_be_read_alone(tmp_path: Path) -> None:
    for cell in ("a", "b"):
        write_noise(tmp_path / "diagnostics" / f"{cell}.parquet", noise_at(0, 1.0, 1.0))
    found = load_diagnostics(tmp_path, group="noise", cells=["b"])
    assert set(found["cell"]) == {"b"}
    assert set(found["group"]) == {"noise"}
    assert len(load_diagnostics(tmp_path)) == 4 * len(found)
    with pytest.raises(UserError, match="no diagnostics here"):
        load_diagnostics(tmp_path, cells=["c"])


def test_a_lone_run_has_a_regime(tmp_path: Path) -> None:
    record = json.loads(write_run(tmp_path / "study", 2.0, width=32, lr=2**-7).read_text())
    record["config"]["train"]["diagnostics"] = ["noise"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"cell": None}))
    write_noise(tmp_path / "run" / "diagnostics.parquet", noise_at(100, 12.0, 1.0))
    report = write_report(tmp_path / "run")
    page = report.paths[-1].read_text()
    assert (
        "| none · AdamW | 32 | 2^-7.00 | 0.17 | 0.17 | 0.17 | 1,280 | 0.17 | 1 of 1 | 12 (1,536 tokens) | 16 (" in page
    )
    assert "below 2), so there is no fixed norm yet for multipliers to free: none · AdamW, d = 32" in page

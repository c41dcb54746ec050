"""The plane of learning rate and weight decay, over losses made by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from test_analysis_frame import write_run

from lit_mult.analysis.frame import load_records
from lit_mult.analysis.plane import ALONG, plane
from lit_mult.analysis.report import write_report

RATES, DECAYS = [2**-8, 2**-7, 2**-6], [0.1, 0.2, 0.4]
LOSSES = {
    "muP": [[2.3, 2.0, 2.2], [2.1, 1.9, 2.2], [2.0, 2.1, None]],  # a row a decay, a column a rate; one diverged
    "vectors": [[2.0, 1.9, 2.0], [1.9, 1.8, 1.9], [1.8, 1.9, 2.0]],
}
INITIAL = 5.5


def write_plane(folder: Path, arm: str, seed: int = 0, shift: float = 0.0, mode: str = "coupled") -> None:
    for decay, row in zip(DECAYS, LOSSES[arm], strict=True):
        for lr, loss in zip(RATES, row, strict=True):
            write_run(
                folder,
                None if loss is None else loss + shift,
                arm=arm,
                lr=lr,
                seed=seed,
                factors={"optim.weight_decay_mode": mode} if mode != "coupled" else {},
                nuisance={"optim.weight_decay": decay},
                cell=f"{arm}-{lr}-{decay}-{seed}",
            )


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    for arm in LOSSES:
        for seed in range(3):
            write_plane(tmp_path, arm, seed, 0.01 * seed)
    return load_records(tmp_path)


@pytest.mark.parametrize("mode", ["independent", "timescale", "cautious"])
def test_lines_of_equal_balance_are_those_of_equal_products_only_if_the_lr_counts(mode: str, tmp_path: Path) -> None:
    for arm in LOSSES:
        write_plane(tmp_path, arm, mode=mode)
    found = set(plane(load_records(tmp_path)).tables["plane_excess"]["along"])
    assert found == set(ALONG) - (set() if mode == "cautious" else {"balance"})


def test_excess_along_each_direction_by_hand(runs: pd.DataFrame) -> None:
    found = plane(runs).tables["plane_excess"]
    by_hand = {
        ("muP", "lr"): ((0.3 + 0 + 0.2) / 3 + (0.2 + 0 + 0.3) / 3 + (0 + 0.1 + INITIAL - 2.0) / 3) / 3,
        ("muP", "weight_decay"): ((0.3 + 0.1 + 0) / 3 + (0.1 + 0 + 0.2) / 3 + (0 + 0 + INITIAL - 2.2) / 3) / 3,
        ("muP", "balance"): (2.0 + 1.9 + 2.2) / 3 - 1.9,  # the one line of three points, of equal product
        ("muP", "plane"): (2.3 + 2.0 + 2.2 + 2.1 + 1.9 + 2.2 + 2.0 + 2.1 + INITIAL) / 9 - 1.9,
        ("vectors", "balance"): (1.8 + 1.8 + 2.0) / 3 - 1.8,
        ("vectors", "lr"): (0.2 / 3 + 0.2 / 3 + 0.3 / 3) / 3,
    }
    first = found[found["seed"] == 0].set_index(["arm", "along"])["excess"]
    assert set(first.index.get_level_values("along")) == set(ALONG)
    for key, value in by_hand.items():
        assert first[key] == pytest.approx(value), key


def test_differences_are_at_equal_rate_decay_and_seed(runs: pd.DataFrame) -> None:
    found = plane(runs).tables["plane_differences"].set_index(["optim.lr", "optim.weight_decay"])
    assert (found["seeds"] == 3).all()
    assert found.loc[(2**-8, 0.1), "difference"] == pytest.approx(-0.3)
    assert found.loc[(2**-8, 0.1), "high"] == pytest.approx(-0.3)
    assert found.loc[(2**-6, 0.4), "difference"] == pytest.approx(2.01 - INITIAL)
    (line,) = [line for line in plane(runs).statements.popitem()[1] if "constant lr" in line]
    assert line.startswith("Excess along constant lr · weight decay, vectors - muP (AdamW, d = 64, 3 seeds): -0.0667")


def test_a_report_shows_the_plane_and_others_have_none(tmp_path: Path) -> None:
    for arm in LOSSES:
        for seed in range(2):
            write_plane(tmp_path / "plane", arm, seed)
            write_run(tmp_path / "line", 2.0, arm=arm, seed=seed)
    report = write_report(tmp_path / "plane")
    assert {"plane.png", "plane.svg", "plane_differences.csv"} <= {path.name for path in report.paths}
    assert "![plane](figures/plane.png)" in (tmp_path / "plane" / "report.md").read_text()
    assert not any("plane" in path.stem for path in write_report(tmp_path / "line").paths)
    write_run(tmp_path / "plane", 2.0, arm="vectors", seed=9)  # of another search: without a weight decay
    assert not plane(load_records(tmp_path / "plane")).tables


def test_a_best_weight_decay_at_the_edge_is_a_warning(runs: pd.DataFrame) -> None:
    assert plane(runs[runs["arm"] == "muP"]).warnings == []
    (warning,) = plane(runs[runs["optim.weight_decay"] < 0.3]).warnings
    assert warning.startswith("best weight decay at the edge of those tried, so a better one may lie outside: muP")
    assert "vectors" in warning

"""The bill of a result, tuning included, and whether tuning paid, against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_analysis_frame import read_study, tuned_spec, tuning, write_run, write_study
from test_analysis_sensitivity import LRS, sweep

from lit_mult.analysis import cost, plots
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.sensitivity import points
from lit_mult.analysis.tables import scientific


def bill_of(folder: Path) -> pd.DataFrame:
    runs = load_records(folder)
    return cost.bill(runs, points(runs), read_study(folder))


def sentences(folder: Path) -> list[str]:
    runs, study = load_records(folder), read_study(folder)
    table = points(runs)
    return list(cost.statements(cost.bill(runs, table, study), table, study))


def test_the_bill_by_hand(tmp_path: Path) -> None:
    # 6 FLOPs x 1000 parameters x tokens, 4096 of them and 2 s in a whole run. Seed 0: two whole runs and one that
    # diverged after 1024 tokens, 9216 tokens; seed 1: three whole runs and an added one, 16384. Mean 12800 tokens, 7 s.
    for arm in ("muP", "muP-tuned"):
        sweep(tmp_path, arm, [3.0, 2.0], lrs=LRS[:2])
        write_run(tmp_path, None, arm=arm, lr=LRS[2], tokens=1024)
        sweep(tmp_path, arm, [3.0, 2.6, 2.5], seed=1)
        write_run(tmp_path, 2.7, arm=arm, seed=1, lr=2**-2, added=True)
    write_study(tmp_path, cells=12, spec=tuned_spec(adamw=tuning()))
    plain, tuned = bill_of(tmp_path).to_dict("records")
    assert (plain["label"], plain["d_model"], plain["seeds"]) == ("muP · AdamW", 64, 2)
    # The second rate is best: 2.0 and 2.6, standard error 0.3, t(0.975, 1) = tan(0.475 pi).
    reach = 0.3 * math.tan(0.475 * math.pi)
    ends = [plain[name] for name in ("best_loss", "best_loss_low", "best_loss_high")]
    assert ends == pytest.approx([2.3, 2.3 - reach, 2.3 + reach])
    expected = {
        "run_flops": 24_576_000, "search_flops": 76_800_000, "tuning_flops": 0, "total_flops": 76_800_000,
        "run_tokens": 4096, "search_tokens": 12_800, "tuning_tokens": 0, "total_tokens": 12_800,
        "run_seconds": 2, "search_seconds": 7, "tuning_seconds": 0, "total_seconds": 7,
    }  # fmt: skip
    assert {name: plain[name] for name in expected} == expected
    expected |= {"tuning_flops": 1e8, "total_flops": 176_800_000, "tuning_tokens": 50_000, "total_tokens": 62_800}
    expected |= {"tuning_seconds": 40, "total_seconds": 47}
    assert {name: tuned[name] for name in expected} == expected


def test_pruned_runs_are_paid_for_and_are_no_result(tmp_path: Path) -> None:
    sweep(tmp_path, "muP", [3.0, 2.0], lrs=LRS[:2])
    write_run(tmp_path, None, lr=LRS[2], status="pruned", tokens=1024)
    write_run(tmp_path, None, arm="vectors", status="pruned", tokens=1024)
    some, none = bill_of(tmp_path).set_index("arm").loc[["muP", "vectors"]].to_dict("records")
    assert (some["run_tokens"], some["search_tokens"]) == (4096, 9216)
    assert (none["search_tokens"], none["total_tokens"]) == (1024, 1024)
    assert math.isnan(none["run_tokens"])
    assert math.isnan(none["best_loss"])


@pytest.mark.parametrize(
    ("spec", "changes", "expected"),
    [
        (tuned_spec(adamw=tuning()), {}, 1e8),
        (tuned_spec(adamw=None), {}, None),  # a preset from elsewhere
        (tuned_spec(muon=tuning()), {}, None),  # tuned for another optimizer
        ({"arms": {"muP-tuned": {"parametrization.preset": "falcon-h1-0.5b"}}}, {}, None),
        ({"arms": {"muP-tuned": {}}, "base": {"parametrization": {"preset": "falcon-h1-0.5b"}}}, {}, None),
        ({"arms": {"muP-tuned": {"parametrization.preset": "neutral"}}}, {}, 0.0),
        ({"arms": {"muP-tuned": None}}, {}, 0.0),
        (None, {}, 0.0),
        (None, {"preset": "mine.yaml"}, None),  # as its config says
        (tuned_spec(adamw=tuning()), {"tier": "NONE"}, 0.0),
        (tuned_spec(adamw=tuning()), {"arm": "muP", "parametrization.preset": "ours"}, 1e8),  # a factor of the study
        (tuned_spec(adamw=tuning()), {"parametrization.preset": "neutral"}, 0.0),
    ],
)
def test_what_a_preset_cost(
    tmp_path: Path, spec: dict[str, Any] | None, changes: dict[str, Any], expected: float | None
) -> None:
    write_run(tmp_path, 2.0, arm="muP-tuned")
    write_study(tmp_path, cells=1, spec=spec)
    runs = load_records(tmp_path).assign(**changes)
    row = cost.bill(runs, points(runs), read_study(tmp_path)).to_dict("records")[0]
    assert row["tuning_flops"] == pytest.approx(float("nan") if expected is None else expected, nan_ok=True)
    assert row["total_flops"] == pytest.approx(row["search_flops"] + row["tuning_flops"], nan_ok=True)


def tuned_against_plain(folder: Path, tuned: list[float], plain: list[float], **where: Any) -> None:
    for arm, losses in (("muP-tuned", tuned), ("muP", plain)):
        for seed, loss in enumerate(losses):
            sweep(folder, arm, [3.0, loss, 3.0], seed=seed, **where)


def test_tuning_is_judged_on_held_out_seeds_at_its_own_width(tmp_path: Path) -> None:
    # AdamW: seed 0 was tuned on and counts for nothing; -0.125 and -0.125 remain. Muon: -0.1 and +0.1, standard error
    # 0.1 with one degree of freedom. Width 128 is not the one of the tuning.
    tuned_against_plain(tmp_path, [1.0, 1.875, 2.0], [2.0, 2.0, 2.125])
    tuned_against_plain(tmp_path, [2.0, 1.9, 2.1], [2.0, 2.0, 2.0], optimizer="muon")
    tuned_against_plain(tmp_path, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0], width=128)
    sweep(tmp_path, "vectors", [3.0, 2.0, 3.0])
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning(), muon=tuning(seeds=[0])))
    assert sentences(tmp_path)[:2] == [
        f"Preset ours, {name}: best of 60 trials of study tune at d = 64, seed 0, which took 1.0e8 FLOPs, 5.0e4 tokens "
        "and 40 s."
        for name in ("AdamW", "Muon")
    ]
    assert sentences(tmp_path)[-2:] == [
        "Tuned against default preset, AdamW, d = 64, muP-tuned - muP: -0.1250, [-0.1250, -0.1250] (held-out seeds "
        "1, 2; the tuning used seed 0): **the tuned preset beats the default preset by 0.1250, more than the seed "
        "noise**.",
        "Tuned against default preset, Muon, d = 64, muP-tuned - muP: +0.0000, [-1.2706, 1.2706] (held-out seeds 1, 2; "
        "the tuning used seed 0): the tuned preset does not beat the default preset by more than the seed noise.",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": [0, 1]}, "d = 64, muP-tuned - muP: no held-out seed (the tuning used seeds 0, 1), so nothing is"),
        ({"base_d_model": 32}, "d = 32, muP-tuned - muP: no runs at this width, the one of the tuning, so nothing is"),
        ({}, "-0.2000, 1 seed: no interval (held-out seed 1; the tuning used seed 0): the tuned preset does not beat"),
    ],
)
def test_nothing_is_claimed_without_held_out_seeds(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    tuned_against_plain(tmp_path, [1.0, 1.8], [2.0, 2.0])
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning(**changes)))
    assert expected in sentences(tmp_path)[-1]


def test_a_gain_that_rests_on_an_optimum_at_the_edge_is_doubtful(tmp_path: Path) -> None:
    tuned_against_plain(tmp_path, [1.0, 1.8, 1.8], [])
    for seed in range(3):
        sweep(tmp_path, "muP", [3.0, 2.5, 2.0], seed=seed)
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning()))
    assert sentences(tmp_path)[-1].endswith("more than the seed noise**; doubtful, as 2 of 2 pairs are.")


def test_an_arm_that_differs_in_more_than_the_preset_does_not_judge_it(tmp_path: Path) -> None:
    tuned_against_plain(tmp_path, [1.0, 1.8], [2.0, 2.0])
    spec = tuned_spec(adamw=tuning())
    spec["arms"]["muP"]["optim.weight_decay"] = 0.2
    write_study(tmp_path, cells=1, spec=spec)
    assert not any("Tuned against" in line for line in sentences(tmp_path))


def test_the_price_of_each_arm_stands_in_a_sentence(tmp_path: Path) -> None:
    tuned_against_plain(tmp_path, [1.9], [2.0])
    sweep(tmp_path, "vectors", [3.0, 1.8, 3.0])
    sweep(tmp_path, "vectors", [3.0, 1.7, 3.0], width=128)  # alone at its width
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning()))
    # 3 runs x 6 x 1000 x 4096 = 7.4e7 FLOPs.
    assert sentences(tmp_path)[1:-1] == [
        "Best loss, AdamW, d = 64: muP 2.0000 with 7.4e7 FLOPs, muP-tuned 1.9000 with 1.7e8 FLOPs (of it 1.0e8 "
        "tuning), vectors 1.8000 with 7.4e7 FLOPs."
    ]
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=None))
    assert "muP-tuned 1.9000 with 7.4e7 FLOPs and a tuning that is not on record" in sentences(tmp_path)[0]
    write_study(tmp_path, cells=1)
    assert sentences(tmp_path) == []


def test_the_figure_leads_from_the_search_to_search_and_tuning(tmp_path: Path) -> None:
    for width in (32, 64):
        tuned_against_plain(tmp_path, [1.9], [2.0], width=width)
    write_run(tmp_path, 5.0, arm="untuned")
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning()))
    figure = plots.loss_vs_compute(bill_of(tmp_path))
    (ax,) = figure.axes
    leaders = [segment.tolist() for lines in ax.collections for segment in lines.get_segments()]
    search, total = 3 * 6 * 1000 * 4096, 3 * 6 * 1000 * 4096 + 1e8
    assert leaders == [[[search, 2.0]] * 2] * 2 + [[[search, 1.9], [total, 1.9]]] * 2
    assert [text.get_text() for text in ax.texts] == ["$d$ = 32"] * 2 + ["$d$ = 64"] * 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"muP", "muP-tuned"}


def test_labels_in_the_figure_cover_nothing(tmp_path: Path) -> None:
    # The tuned arm is as good at width 32 as the plain one at 64, and near it in cost: two labels want one place.
    for width, gain in ((32, 0.0), (64, 0.1)):
        total = {"parameters": {"total": 20 * width**2, "non_embedding": width, "multipliers": 0}}
        tuned_against_plain(tmp_path, [1.9 - gain], [2.0 - gain], width=width, **total)
    write_study(tmp_path, cells=1, spec=tuned_spec(adamw=tuning(flops=3e9)))
    figure = plots.loss_vs_compute(bill_of(tmp_path))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    texts = [text.get_window_extent() for text in ax.texts]
    assert len(texts) == 4
    assert not any(one.overlaps(other) for one, other in combinations(texts, 2))
    lines = [line.get_transform().transform_path(line.get_path()) for line in ax.lines]
    assert not any(path.intersects_bbox(text, filled=False) for path in lines for text in texts)
    assert all(ax.bbox.contains(*corner) for text in texts for corner in text.corners())


def test_scientific_numbers() -> None:
    assert [scientific(value) for value in (3.14e15, 0.0, 4096, float("nan"))] == ["3.1e15", "0", "4.1e3", "n/a"]

"""Sides of a comparison: what is paired, the speed-up by hand, and what the command prints."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_data import make_record
from refusals import refusal
from test_page import unpacked

from lit_mult.analysis.compare import compare, step_costs
from lit_mult.analysis.sides import load_sides
from lit_mult.analysis.speedup import factor, reached, speedups, statement
from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.schema import CellInfo, Question

LOSSES = {"muP": 3.0, "vectors": 2.9}
OF_OPTIMIZER = {"adamw": 0.0, "muon": -0.05}


def write(folder: Path, arm: str, loss: float, lr: float, seed: int, fields: dict[str, Any], **changes: Any) -> None:
    """A record of a cell whose scientific factors are `fields`; without a study where there are none."""
    config = RunConfig().with_overrides({"optim.lr": lr, "seed": seed, **fields})
    name = "-".join(map(str, (arm, *fields.values(), lr, seed)))
    nuisance = {"optim.lr": lr}
    cell = CellInfo(study=folder.name, cell=name, arm=arm, sampler="grid", factors=fields, nuisance=nuisance)
    path = folder / "records" / f"{name}.json"
    if not fields:
        cell, path = None, folder / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    make_record(config, loss, cell=cell, **changes).write(path)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two arms and optimizers, three rates and seeds; a seed shifts all losses, the arms' differences by 0.01."""
    for arm, at_best in LOSSES.items():
        for optimizer, shift in OF_OPTIMIZER.items():
            for power in (-8, -7, -6):
                for seed in (1, 2, 3):
                    loss = at_best + shift + 0.1 * (power + 7) ** 2 + 0.3 * seed + 0.01 * seed * (arm == "vectors")
                    write(tmp_path / "pays", arm, loss, 2.0**power, seed, {"optimizer": optimizer})
    return tmp_path / "pays"


def test_arms_are_paired_by_setting_and_seed(study: Path) -> None:
    found = compare([f"{study}:muP", f"{study}:vectors"])
    table = found.tables["differences"].query("measure == 'best_loss'")
    assert list(table["within"]) == ["AdamW", "Muon"]
    assert table["difference"].to_numpy() == pytest.approx([-0.08, -0.08])
    assert table["high"].to_numpy() == pytest.approx([-0.08 + 4.302653 * 0.01 / 3**0.5] * 2, rel=1e-5)
    assert not found.warnings
    assert "With vectors in place of muP (AdamW) the best loss is 0.0800 nats lower" in str(found.statements)


def test_a_folder_is_a_side_for_each_arm_and_the_first_is_the_base(study: Path) -> None:
    for sides in ([str(study)], [f"{study}:muP", f"{study}:vectors"]):
        assert set(compare(sides).tables["differences"]["against"]) == {"muP"}
    write(study, "aVector", 2.9, 2.0**-7, 1, {"optimizer": "adamw", "multipliers": "vector"})
    write(study, "zero", 2.9, 2.0**-7, 1, {"optimizer": "adamw", "multipliers": "none"})
    assert next(iter(load_sides([str(study)])["arm"])) != "aVector"  # from no multipliers to vectors, as in reports
    reverse = compare([f"{study}:vectors", f"{study}:muP"]).tables["differences"]
    assert reverse.query("measure == 'best_loss'")["difference"].to_numpy() == pytest.approx([0.08, 0.08])


def test_a_fixed_field_sets_sides_apart_and_is_not_paired(study: Path) -> None:
    runs = load_sides([f"{study}:vectors@optimizer=adamw", f"{study}:vectors@optimizer=muon"])
    assert list(runs["arm"].unique()) == ["vectors adamw", "vectors muon"]
    assert set(runs["setting"]) == {""}
    table = compare([f"{study}:vectors@optimizer=adamw", f"{study}:vectors@optimizer=muon"]).tables["differences"]
    assert table.query("measure == 'best_loss'")["difference"].to_numpy() == pytest.approx([-0.05])


def test_a_run_pairs_with_a_study_by_its_config(study: Path, tmp_path: Path) -> None:
    write(tmp_path / "mine", "none", 3.25, 2.0**-7, 2, {}, git_commit="beef", wall_seconds=3.0)
    found = compare([f"{study}:muP@optimizer=adamw", f"{tmp_path / 'mine'}@optimizer=adamw"])
    (row,) = found.tables["differences"].query("measure == 'best_loss'").to_dict("records")
    assert (row["seeds"], row["difference"], row["outcome"]) == (1, pytest.approx(3.25 - 3.6), "undecided")
    assert [line for line in found.warnings if line.startswith("runs of 2 git commits")]
    (cost,) = found.tables["steps"].to_dict("records")
    assert (cost["seconds"], cost["ratio"]) == (pytest.approx(0.015), pytest.approx(1.5))


def test_lone_runs_are_compared_over_what_they_differ_in(tmp_path: Path) -> None:
    """And a field that a record is too old to have has its default."""
    for seed in (1, 2):
        for optimizer, loss in (("adamw", 3.0), ("muon", 2.9)):
            config = RunConfig().with_overrides({"optimizer": optimizer, "seed": seed})
            record = make_record(config, loss + seed, val_curve=[])
            del record.config["model"]["qk_norm"]
            path = tmp_path / optimizer / str(seed) / "record.json"
            path.parent.mkdir(parents=True)
            record.write(path)
    sides = [str(tmp_path / "adamw"), str(tmp_path / "muon")]
    for named in (sides, [f"{side}@model.qk_norm=false,optim.lr=1.5625e-2" for side in sides]):
        (row,) = compare(named).tables["differences"].to_dict("records")
        assert (row["seeds"], row["difference"], row["within"]) == (2, pytest.approx(-0.1), "")


def test_runs_on_different_texts_or_tokens_are_not_paired(tmp_path: Path) -> None:
    for name, tokenizer, corpus_hash in (("one", "bytes", "a"), ("two", "bpe:384", "b"), ("three", "bytes", "a")):
        for seed in (1, 2):
            fields = {"data.corpus": "notes.txt", "data.tokenizer": tokenizer, "optimizer": "adamw"}
            config = RunConfig().with_overrides({**fields, "seed": seed})
            path = tmp_path / name / str(seed) / "record.json"
            path.parent.mkdir(parents=True)
            make_record(config, 3.0 + seed, corpus_hash=corpus_hash).write(path)
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))

    apart = compare([one, two])
    assert apart.tables["differences"].empty
    assert apart.tables["speedups"].empty
    (warning,) = [line for line in apart.warnings if "two" in line]
    assert warning == (
        "two (notes.txt as bpe:384) and one (notes.txt as bytes) are of different texts or tokenizers, on which losses "
        "do not compare"
    )
    assert not [line for line in compare([one, three]).warnings if "texts" in line]
    table = compare([one, two, three]).tables["differences"]
    assert set(table["of"]) == {"three"}
    assert set(table["seeds"]) == {2}


def test_costs_of_a_step_are_compared_on_equal_devices_alone(study: Path, tmp_path: Path) -> None:
    for name, changes in (("alone", {}), ("stacked", {"members": 8}), ("gpu", {"device": "cuda"})):
        write(tmp_path / name, "none", 3.25, 2.0**-7, 2, {}, **changes)
    runs = load_sides([str(tmp_path / name) for name in ("alone", "stacked", "gpu")])
    assert step_costs(runs, "alone")["ratio"].isna().all()


def test_speed_up_by_hand() -> None:
    """Losses 4 at 100 steps, 3 at 400: 3.5 half-way in log steps, at 200."""
    curve = [(100, 4.0), (400, 3.0)]
    assert reached(curve, 3.5) == pytest.approx(200)
    assert reached(curve, 3.0) == pytest.approx(400)
    assert reached(curve, 5.0) == 100
    assert reached([(100, 3.0), (200, 4.0), (400, 2.0)], 3.0) == pytest.approx(200 * 2**0.5)  # for good
    assert factor(curve, [(100, 4.0), (400, 3.5)]) == pytest.approx(2)
    assert factor([(100, 4.0), (400, 3.5)], curve) == pytest.approx(0.5)
    assert factor([(100, math.nan), (400, 3.0)], [(100, 9.0), (400, 3.5)]) == pytest.approx(1)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=8), st.floats(1.05, 4))
def test_a_curve_run_k_times_faster_has_a_speed_up_of_k(drops: list[float], k: float) -> None:
    """At k times the speed a curve is the same, shifted in log steps."""
    steps = [100 * 1.3**index for index in range(len(drops))]
    losses = [10 - sum(drops[: index + 1]) for index in range(len(drops))]
    base = list(zip(steps, losses, strict=True))
    faster = [(step / k, loss) for step, loss in base] + [(steps[-1], losses[-1] - 1)]
    assert factor(faster, base) == pytest.approx(k)


def test_speed_up_over_budgets_and_over_curves(tmp_path: Path) -> None:
    """`vectors` reaches at 100 and 200 steps what muP has at 200 and 400."""
    for arm, ahead in (("muP", 0), ("vectors", 1)):
        for doublings in (0, 1, 2):
            for seed in (1, 2):
                loss = 5 - 0.5 * (doublings + ahead) + seed
                fields = {"train.steps": 100 * 2**doublings}
                write(tmp_path / "budgets", arm, loss, 0.01, seed, fields, steps=fields["train.steps"])
    question = Question(of="vectors", against="muP")
    (row,) = speedups(load_sides([str(tmp_path / "budgets")]), [question]).itertuples()
    assert (row.measured_on, row.seeds, row.speedup) == ("budgets", 2, pytest.approx(2))
    assert (
        statement(row)
        == "vectors reaches the loss of muP 2.00 [2.00, 2.00] times as fast (budgets with a schedule each, 2 seeds)."
    )

    write(tmp_path / "single", "muP", 3.0, 0.01, 1, {"train.steps": 400})
    assert speedups(
        load_sides([str(tmp_path / "budgets"), str(tmp_path / "single")]),
        [Question(of="single", against="budgets:muP")],
    ).empty

    for arm, steps in (("muP", 100), ("vectors", 200)):  # the same curve, of runs that end at different steps
        for name, far in (("lengths", steps), ("long", 200)):
            curve = [(step, 9 - math.log(max(step, 1))) for step in range(0, far + 1, 10)]
            write(tmp_path / name, arm, curve[-1][1], 0.01, 1, {"optimizer": "adamw"}, val_curve=curve)
    assert speedups(load_sides([str(tmp_path / "lengths")]), [question]).empty
    (row,) = speedups(load_sides([str(tmp_path / "long")]), [question]).itertuples()
    assert row.speedup == pytest.approx(1)

    for arm, speed in (("muP", 1), ("vectors", 1.5)):
        curve = [(step, 9 - math.log(max(step, 1) * speed)) for step in range(0, 101, 10)]
        write(tmp_path / "curves", arm, curve[-1][1], 0.01, 1, {"optimizer": "adamw"}, val_curve=curve)
    (row,) = speedups(load_sides([str(tmp_path / "curves")]), [question]).itertuples()
    assert (row.measured_on, row.speedup) == ("curves", pytest.approx(1.5, rel=1e-3))
    assert math.isnan(row.low)


def test_the_command_prints_text_markdown_and_json(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [f"{study}:muP", f"{study}:vectors"]
    assert main(["compare", *sides]) == 0
    assert capsys.readouterr().out.rstrip().endswith("after Holm's correction.")
    assert main(["compare", *sides, "--markdown"]) == 0
    assert "| vectors - muP | best loss | AdamW | 3 | -0.0800 |" in capsys.readouterr().out
    assert main(["compare", *sides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"][0]["difference"] == pytest.approx(-0.08)


def test_the_page_of_a_comparison_shows_the_sides(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = study / "pages" / "sides.html"
    sides = [f"{study}:muP@optimizer=adamw", f"{study}:vectors@optimizer=adamw"]
    assert main(["compare", *sides, "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"\npage: {page}\n")
    text = page.read_text()
    assert "<title>vectors adamw against muP adamw</title>" in text
    assert "With vectors adamw in place of muP adamw the best loss is 0.0800 nats lower" in text
    data = unpacked(re.findall(r'id="data">([^<]*)<', text)[0])
    assert [arm["name"] for arm in data["arms"]] == ["muP adamw", "vectors adamw"]
    assert data["runs"]["length"] == 18
    assert "muP-adamw-0.00390625-1" in data["runs"]["columns"]["cell"]["each"]  # not its number in the comparison
    assert data["provenance"][-1] == f"Made by: `lit-mult compare {shlex.join(sides)} --html FILE`"
    assert main(["compare", *sides, "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_page_that_cannot_be_written_is_one_line(study: Path, refused: Callable[..., str]) -> None:
    assert "Is a directory" in refused("compare", f"{study}:muP", f"{study}:vectors", "--html", str(study))


def test_runs_that_differ_in_what_is_no_factor_are_refused(tmp_path: Path) -> None:
    for decay in (0.1, 0.2):
        config = RunConfig().with_overrides({"optim.weight_decay": decay})
        path = tmp_path / "a" / str(decay) / "record.json"
        path.parent.mkdir(parents=True)
        make_record(config, 3.0).write(path)
    write(tmp_path / "b", "none", 3.0, 2.0**-6, 0, {})
    with refusal("two runs of a at equal lr and seed; name one of them"):
        load_sides([str(tmp_path / "a"), str(tmp_path / "b")])


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["{}:muP"], "muP: nothing to compare it with; give two sides or more"),
        (["{}:muP", "{}:vector"], "no arm vector in {}; there are muP, vectors"),
        (["{}:muP", "{}:vectors@optimizer=sgd"], "no run has optimizer = sgd; there are adamw, muon"),
        (
            ["{}:muP@optimizer=muon", "{}:vectors"],
            "vectors: has several values of optimizer, which another side fixes; give vectors@optimizer=adamw",
        ),
        (["{}:muP", "{}:vectors@muon"], "muon must be FIELD=VALUE"),
        (["{}:muP", "{}:vectors@optim.rate=1"], "optim.rate: unknown field"),
        (["{}:muP", "{}:muP"], "muP: is given twice"),
        (["{}:muP", "{}/nothing"], "nothing: no run records here"),
        (["{}:muP", "{}:vectors@optimizer=["], "no run has optimizer = [; there are adamw, muon"),
    ],
)
def test_refused_in_one_line(study: Path, sides: list[str], message: str) -> None:
    with refusal(message.format(study)):
        load_sides([side.format(study) for side in sides])

"""The committed results: complete, and their numbers recomputed from the records by code that shares nothing."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, get_args

import pytest

from lit_mult.config import Experiment
from lit_mult.method.presets import load_preset
from lit_mult.mini.benchmark import TASKS
from lit_mult.study.files import load_study
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import canonical
from lit_mult.study.tuning import tuned_preset

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs" / "results").glob("*.md")}
EXPERIMENTS = [name for name in get_args(Experiment) if (RESULTS / name).is_dir()]

Records = list[dict[str, Any]]


def table(study: str, name: str) -> list[dict[str, str]]:
    with (RESULTS / study / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def read(study: str) -> Records:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / study / "records").glob("*.json"))]


@pytest.fixture(
    scope="module",
    params=[
        "pays",
        "pays_tuning",
        "dose",
        "dose_groups",
        "dose_noise",
        "dose_vocabulary",
        "plane",
        "pays_ablation",
        "pays_other_text",
        "pays_relative_lr",
        "pays_decay",
        "pays_wide",
        "pays_downstream",
        "sphere_or_decay",
        "reference",
        "lr_width",
        "mup_tuning",
        "downstream",
        *EXPERIMENTS,
    ],
)
def study(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def records(study: str) -> Records:
    return read(study)


def test_the_study_is_complete_and_is_the_one_that_ships(study: str, records: Records) -> None:
    spec = load_study(study)

    assert canonical(StudyFolder(RESULTS / study).spec()) == canonical(spec)
    cells = [record["cell"] for record in records]
    if spec.trial_seeds:  # further seeds depend on what was pruned, and those of the re-ranking on the losses
        of_first_seed = sum(record["seed"] == spec.seeds[0] for record in records)
        assert of_first_seed == (spec.budget.trials or 0) * len(list(spec.points()))
    else:
        judges = sum(bool(cell.get("judged")) for cell in cells)
        assert judges == len(spec.judge_seeds) * len(list(spec.points()))
        assert sum(not cell.get("added") for cell in cells) == spec.n_cells + judges
    assert len({cell["cell"] for cell in cells}) == len(cells)


def test_every_record_says_where_it_comes_from(records: Records) -> None:
    hashes = {(record["config"]["data"]["tokenizer"], record["corpus_hash"]) for record in records}
    assert len(hashes) == len({tokenizer for tokenizer, _ in hashes})
    assert all(len(record["git_commit"]) == 40 for record in records)  # and not +dirty


@pytest.mark.parametrize("name", ["mup_tuning", "pays_tuning"])
def test_a_shipped_preset_is_what_its_tuning_study_found(name: str) -> None:
    assert load_preset(name) == tuned_preset(RESULTS / name)


def _losses(curve: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    return [(lr, min(loss, initial)) for lr, loss, initial in curve]


@pytest.mark.parametrize(("study", "arms"), [("reference", 2), ("lr_width", 3)], indirect=["study"])
def test_sensitivities_agree_with_a_recomputation_to_1e_9(study: str, records: Records, arms: int) -> None:
    curves: dict[tuple[str, str, int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for record in records:
        config = record["config"]
        key = (record["cell"]["arm"], config["optimizer"], config["model"]["d_model"], record["seed"])
        loss = math.inf if record["final_loss"] is None else record["final_loss"]
        curves[key].append((config["optim"]["lr"], loss, record["initial_loss"]))
    recomputed = {}
    for key, curve in curves.items():
        losses = [min(loss, initial) for _, loss, initial in curve]
        recomputed[key] = sum(losses) / len(losses) - min(losses)

    compared = 0
    for row in table(study, "points"):
        key = (row["arm"], row["optimizer"], int(row["d_model"]), int(row["seed"]))
        of_all = [other for other in curves if other[:3] == key[:3]]
        means = {lr: sum(dict(_losses(curves[one]))[lr] for one in of_all) for lr, _ in _losses(curves[key])}
        assert float(row["best_loss"]) == dict(_losses(curves[key]))[min(means, key=lambda lr: means[lr])]
        if row["sensitivity"]:
            assert float(row["sensitivity"]) == pytest.approx(recomputed[key], abs=1e-9)
            compared += 1
    assert compared == arms * 2 * 3 * 3  # arms x optimizers x widths x seeds; the reference arm has one rate


def test_the_answers_of_pays_agree_with_a_recomputation_to_1e_9() -> None:
    """Differences by seed, means over widths and Student's t, from the records alone."""
    losses: dict[tuple[str, str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    added = set()
    for record in read("pays"):
        config = record["config"]
        line = losses[record["cell"]["arm"], config["optimizer"], config["model"]["d_model"]]
        line[config["optim"]["lr"]][record["seed"]] = min(record["final_loss"], record["initial_loss"])
        if record["cell"]["added"]:
            added.add(config["optim"]["lr"])

    def value(line: tuple[str, str, int], measure: str, seed: int) -> float:
        if measure == "best_loss":
            return min(losses[line].values(), key=lambda by_seed: sum(by_seed.values()))[seed]
        curve = [by_seed[seed] for lr, by_seed in losses[line].items() if lr not in added]
        mean = sum(curve) / len(curve)
        return mean if measure == "mean_loss" else mean - min(curve)

    answers = table("pays", "answers")
    assert len(answers) == len(load_study("pays").questions) * 2 - 2  # one an optimizer; two name it themselves
    for row in answers:
        of, against = ([*row[side].split(" under "), row["within"]][:2] for side in ("of", "against"))
        widths = [int(width) for width in re.findall(r"\d+", row["over"] or row["within"])]
        by_seed = [
            sum(
                value((of[0], of[1].lower(), width), row["measure"], seed)
                - value((against[0], against[1].lower(), width), row["measure"], seed)
                for width in widths
            )
            / len(widths)
            for seed in range(3, 8)
        ]
        found = [float(row[name]) for name in ("difference", "low", "high")]
        assert found == pytest.approx(interval_of_five(by_seed), abs=1e-9)


def interval_of_five(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of five values by Student's t."""
    mean = sum(values) / 5
    sd = math.sqrt(sum((one - mean) ** 2 for one in values) / 4)
    reach = 2.7764451051977987 * sd / math.sqrt(5)  # t(0.975, 4)
    return mean, mean - reach, mean + reach


def test_swept_arms_beat_the_untuned_standard_one() -> None:
    records = read("reference")
    best: dict[tuple[str, str, int, int], float] = defaultdict(lambda: math.inf)
    for record in records:
        config = record["config"]
        key = (record["cell"]["arm"], config["optimizer"], config["model"]["d_model"], record["seed"])
        best[key] = min(best[key], record["final_loss"])
    for (arm, *place), loss in best.items():
        if arm != "standard":
            assert loss < best["standard", *place], (arm, *place)


def downstream_scores() -> dict[tuple[str, str, int, int], dict[str, list[float]]]:
    """(arm, optimizer, seed, step) -> task -> score of each item."""
    arms = {record["config_hash"]: record for record in read("downstream")}
    found = {}
    for path in sorted((RESULTS / "downstream" / "evaluations").rglob("*.json")):
        evaluation = json.loads(path.read_text())
        run = arms[evaluation["config_hash"]]
        key = (run["cell"]["arm"], run["config"]["optimizer"], run["seed"], evaluation["step"])
        assert len(evaluation["git_commit"]) == 40  # and not +dirty
        assert evaluation["corpus_hash"] == run["corpus_hash"]
        found[key] = {score["task"]: score["items"] for score in evaluation["scores"]}
    return found


def test_downstream_scores_and_differences_agree_with_a_recomputation_to_1e_9() -> None:
    found = downstream_scores()
    assert len(found) == 2 * 2 * 3 * 3  # arms x optimizers x seeds x checkpoints
    tasks = list(next(iter(found.values())))
    assert len(tasks) == 7

    def score(arm: str, optimizer: str, seed: int, step: int, task: str) -> float:
        if task == "average":
            return sum(score(arm, optimizer, seed, step, one) for one in tasks) / len(tasks)
        items = found[arm, optimizer, seed, step][task]
        return sum(items) / len(items)

    compared = 0
    for row in table("downstream", "scores_mini"):
        if row["task"] in (*tasks, "average"):
            place = (row["arm"], row["optimizer"])
            values = [score(*place, seed, int(row["step"]), row["task"]) for seed in range(3)]
            assert float(row["value"]) == pytest.approx(sum(values) / 3, abs=1e-9)
            compared += 1
    assert compared == 2 * 2 * 3 * 8
    for row in table("downstream", "scores_mini_differences"):
        if row["between"] == "arm" and row["task"] in (*tasks, "average"):
            optimizer = row["within"].lower()
            of, against = (
                sum(score(row[side], optimizer, seed, 1500, row["task"]) for seed in range(3)) / 3
                for side in ("of", "against")
            )
            assert float(row["difference"]) == pytest.approx(of - against, abs=1e-9)
            assert float(row["low"]) <= of - against <= float(row["high"])
            compared += 1
    assert compared == 2 * 2 * 3 * 8 + 2 * 8


def test_trained_models_score_well_above_chance_on_what_the_mixture_teaches() -> None:
    chance = {task.name: task.chance for task in TASKS}
    for (_, _, _, step), tasks in downstream_scores().items():
        if step == 1500:
            for name in ("mini_facts_common", "mini_facts_rare", "mini_arithmetic", "mini_algebra", "mini_symbolic"):
                assert sum(tasks[name]) / len(tasks[name]) > chance[name] + 0.1


def said(page: str, heading: str | None = None) -> str:
    """The words of a results page, or of its section under a heading, on one line."""
    text = PAGES[page] if heading is None else PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return " ".join(text.split())


def interval(row: dict[str, str], value: str = "difference") -> str:
    """A difference with its interval, as the pages write it."""
    return f"{float(row[value]):+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]"


def test_the_pages_count_the_verdicts_of_the_tables() -> None:
    row = r"^\| \[(\w+)\]\(\S*results/\w+/report.md\) .*\| (\d+) / (\d+) / (\d+) / (\d+) \|"
    rows = [found for text in PAGES.values() for found in re.findall(row, text, re.M)]
    assert sorted(name for name, *_ in rows) == sorted(path.parts[-3] for path in RESULTS.glob("*/tables/verdicts.csv"))
    for name, *counts in rows:
        found = Counter(row["outcome"] for row in table(name, "verdicts"))
        wanted = [found[name] for name in ("reproduced", "undecided", "not at this scale", "contradicted")]
        assert list(map(int, counts)) == wanted, name


def test_the_pages_and_the_readme_give_the_answers_of_pays() -> None:
    page = said("pays")
    answers = [tuple(float(row[name]) for name in ("difference", "low", "high")) for row in table("pays", "answers")]
    vertices = {
        (row["optimizer"], row["arm"], row["seed"], row["d_model"]): float(row["optimum_loss"])
        for row in table("pays", "points")
    }
    widths = {key[-1] for key in vertices if key[1] == "vectors"}
    for optimizer in ("adamw", "muon"):
        of, against = (
            [sum(vertices[optimizer, arm, str(seed), width] for width in widths) / len(widths) for seed in range(3, 8)]
            for arm in ("vectors", "muP")
        )
        answers.append(interval_of_five([one - other for one, other in zip(of, against, strict=True)]))
    for value, low, high in answers:
        assert f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" in page
    best = [row for row in table("pays", "answers") if row["measure"] == "best_loss" and "under" not in row["of"]]
    assert len(best) == 4 * 2
    for front in ("README.md", "docs/index.md"):
        assert all(interval(row) in (ROOT / front).read_text() for row in best)


def test_the_page_gives_the_answers_at_each_arms_own_decay_and_over_width() -> None:
    decay, width = said("pays", "At each arm's own weight decay"), said("pays", "Over width")
    answers = table("pays_decay", "answers")
    assert len(answers) == 4 * 2 + 1
    for row in answers:
        if "under" not in row["of"]:
            assert interval(row) in decay, row
    best = {
        (study, row["setting"]): float(row["best_loss"])
        for study in ("pays", "pays_decay")
        for row in table(study, "summary")
        if (row["arm"], row["d_model"]) == ("muP", "32")
    }
    lower = [f"{best['pays', name] - best['pays_decay', name]:.3f}" for name in ("AdamW", "Muon")]
    assert f"muP ends {lower[0]} (AdamW) and {lower[1]} (Muon) lower" in decay
    for front in ("README.md", "docs/index.md"):
        words = " ".join((ROOT / front).read_text().split())
        assert all(interval(row) in words for row in answers[:2])
    of_width = [
        row for row in table("pays", "differences") if row["measure"] == "best_loss" and row["d_model"] != "all"
    ]
    pairs = [("vectors", "muP"), ("vectors", "muP-tuned"), ("Muon", "AdamW")]
    given = [row for row in of_width if (row["of"], row["against"]) in pairs and row["within"] != "vectors"]
    given = [row for row in given if "tuned" not in row["within"]]
    assert len(given) == 2 * 2 * 2 + 2
    tuned = [row for row in table("pays_wide", "answers") if row["of"] == "muP-tuned"]
    for row in [*given, *table("pays_wide", "answers")]:
        assert row in tuned or interval(row) in width, row
    over_rates = [row for row in table("pays_wide", "differences") if row["measure"] == "mean_loss"]
    for row in over_rates:
        if (row["of"], row["against"]) == ("vectors", "muP"):
            assert interval(row) in width, row


def test_the_page_gives_the_answers_of_the_studies_around_pays() -> None:
    page = said("where")
    answers = table("dose_groups", "answers") + table("dose", "answers") + table("plane", "answers")
    given = [row for row in answers if row["measure"] == "best_loss" or "steps" in row["within"]]
    assert len(given) == 8 + 20 + 2
    for row in [*given, *(row for row in table("plane", "answers") if row["measure"] == "mean_loss")]:
        assert interval(row) in page, row


def test_the_page_gives_the_gains_on_top_of_tuning() -> None:
    page = said("where", "On top of tuning")
    ends: dict[tuple[str, str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read("pays_ablation"):
        config = record["config"]
        key = (config["optimizer"], config["parametrization"]["tier"], record["cell"]["arm"])
        ends[key][config["optim"]["lr"]].append(record["final_loss"])
    for optimizer in ("adamw", "muon"):
        for tier, arm in (("LRWD", "vectors"), ("FULL", "fixed")):
            best = min(sum(losses) / 5 for losses in ends[optimizer, tier, arm].values())
            assert f"{best:.3f}" in page, (optimizer, tier, arm)
    for row in table("pays_ablation", "verdicts"):
        if "improve their parent" in row["claim"] and ("LRWD" in row["claim"] or "FULL" in row["claim"]):
            assert interval(row, "value") in page, row


def test_the_page_gives_the_answers_by_batch_size() -> None:
    page = said("where", "By batch size")
    for row in table("dose_noise", "answers"):
        if row["measure"] == "best_loss" or "batch_size 2;" in row["within"]:
            assert interval(row) in page, row


def test_the_page_gives_the_answers_at_rates_tied_to_the_matrices_and_on_another_machine() -> None:
    page = said("where", "By the multipliers' own rate") + said("where", "On another machine")
    for row in table("pays_relative_lr", "answers"):
        if row["of"] != "vectors" or row["measure"] != "mean_loss":
            assert interval(row) in page, row
    losses: dict[str, dict[str, Any]] = defaultdict(dict)
    for study in ("pays", "pays_relative_lr"):
        for record in read(study):
            losses[record["config_hash"]][study] = record
    pairs = [(one["pays"], one["pays_relative_lr"]) for one in losses.values() if len(one) == 2]
    assert len(pairs) == 80
    assert {(one["device"][:8], other["device"][:10]) for one, other in pairs} == {("cpu: AMD", "cpu: Intel")}
    apart: dict[float, list[float]] = defaultdict(list)
    for one, other in pairs:
        apart[math.log2(one["config"]["optim"]["lr"])].append(abs(one["final_loss"] - other["final_loss"]))
    at = {rate: sum(values) / len(values) for rate, values in sorted(apart.items())}
    assert max(apart[-9.0] + apart[-7.75]) < 0.001
    assert f"by {at[-6.5]:.3f} and {at[-5.25]:.3f} on the average" in page


def test_the_page_gives_the_answers_on_another_text() -> None:
    page = said("where", "On another text")
    for row in table("pays_other_text", "answers"):
        assert interval(row) in page, row


def test_the_page_gives_the_losses_and_scores_in_the_balance() -> None:
    page = said("downstream", "In the balance of noise and decay")
    for row in table("pays_downstream", "answers"):
        assert interval(row) in page, row
    wanted = {"vectors": ["average"], "Muon": ["average", "reasoning", "knowledge"]}
    given = 0
    for row in table("pays_downstream", "scores_mini_differences"):
        if row["task"] in wanted.get(row["of"], ()) and row["within"] in ("AdamW", "Muon", "muP"):
            value, low, high = (100 * float(row[name]) for name in ("difference", "low", "high"))
            assert f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" in page, row
            given += 1
    assert given == 2 + 3


def test_the_page_gives_the_gains_on_a_sphere() -> None:
    page = said("sphere_or_decay")
    answers = table("sphere_or_decay", "answers")
    assert len(answers) == 4 + 2 + 2 + 1 + 1 + 4
    for row in answers:
        assert interval(row) in page, row
    best = {
        (row["arm"], row["optimizer"], int(row["seed"])): float(row["best_loss"])
        for row in table("sphere_or_decay", "points")
    }
    for sphere, decay in (("sphere", "adamw"), ("muon-sphere", "muon")):
        gains = {
            optimizer: [best["vectors", optimizer, seed] - best["muP", optimizer, seed] for seed in range(3, 8)]
            for optimizer in (sphere, decay)
        }
        value, low, high = interval_of_five([a - b for a, b in zip(gains[sphere], gains[decay], strict=True)])
        assert f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" in page


def test_the_page_gives_the_answers_by_vocabulary() -> None:
    page = said("where", "By vocabulary")
    for row in table("dose_vocabulary", "answers"):
        assert interval(row) in page, row


def test_the_page_gives_every_contestant_of_the_arena() -> None:
    page = said("arena")
    rows = [row for row in table("arena", "contestants") if row["arm"] != "AdamW"]
    assert len(rows) == 15 * 2
    for row in rows:
        ends = {"low": row["difference_low"], "high": row["difference_high"]}
        assert interval(row | ends) in page, row
    chosen = {(record["cell"]["arm"], record["seed"]) for record in read("arena") if record["cell"].get("judged")}
    assert {seed for _, seed in chosen} == {3, 4, 5, 6, 7}

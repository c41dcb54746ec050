"""Tiny sweeps whose records decide on further cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refusals import refusal
from study_data import states
from tiny_runs import MakeStudy

from lit_mult.analysis import sensitivity
from lit_mult.analysis.cost import bill
from lit_mult.analysis.frame import best_rates, load_records
from lit_mult.analysis.questions import answers
from lit_mult.analysis.report import write_report
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.study.tuning import tuned_preset


def test_a_sweep_adds_seeds_and_is_resumed_for_free(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        seeds=[0, 1],
        questions=[{"of": "vectors", "against": "muP"}],
        precision=1e-9,
        budget={"steps": 2, "batch_size": 4, "seeds": 3},
    )
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path, workers=0)

    # 2 arms x 2 rates x 2 seeds, and a third seed at both rates of both arms.
    assert (result.ran, result.cells, result.failures) == (12, 12, {})
    cells = [made.cell for made in map(RunRecord.read, find_records(tmp_path)) if made.cell]
    assert sum(cell.refines for cell in cells) == 4
    assert states(tmp_path / "optuna.journal") == {"COMPLETE": 12}
    lost = next(path for path in find_records(tmp_path) if RunRecord.read(path).seed == 2)
    before = RunRecord.read(lost)
    lost.unlink()
    assert sweep(spec, tmp_path, workers=0).ran == 1
    assert (RunRecord.read(lost).cell, RunRecord.read(lost).final_loss) == (before.cell, before.final_loss)


def test_a_search_on_several_seeds_is_ranked_again_and_resumed_for_free(
    small_study_dict: MakeStudy, tmp_path: Path
) -> None:
    study = small_study_dict(
        arms={"muP": {"multipliers": "fixed", "parametrization.tier": "LR"}},
        nuisance={"optim.lr": {"low": 2**-9, "high": 2**-3, "log": True}},
        search_multipliers=True,
        sampler="tpe",
        start=[{"optim.lr": 2**-6}],
        seeds=[100, 101],
        budget={"steps": 2, "batch_size": 4, "trials": 3, "seeds_per_trial": 2},
        rerank={"best": 1, "seeds": [200]},
    )
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path, workers=0)

    found = [RunRecord.read(path) for path in find_records(tmp_path)]
    again = [record for record in found if record.seed == 200]
    untuned = [record for record in again if set(record.config["parametrization"]["lr"].values()) == {1.0}]
    # 3 trials on 2 seeds; the best one and the untuned one, which may be the same, on the fresh seed.
    assert len(untuned) == 1
    assert (result.ran, result.cells, result.failures) == (6 + len(again), 6 + len(again), {})
    assert states(tmp_path / "optuna.journal") == {"COMPLETE": 3}
    tuning = tuned_preset(tmp_path).optimizers["adamw"].tuning
    assert tuning is not None
    assert (tuning.trials, tuning.runs, tuning.seeds, tuning.fresh_seeds) == (3, result.ran, [100, 101], [200])
    assert tuning.best_loss <= (tuning.default_loss or 0)
    lost = next(path for path in find_records(tmp_path) if RunRecord.read(path).seed == 200)
    lost.unlink()
    (tmp_path / "optuna.journal").unlink()
    assert sweep(spec, tmp_path, workers=0).ran == 1
    assert states(tmp_path / "optuna.journal") == {"COMPLETE": 3}


def test_the_best_values_of_a_grid_are_judged_on_fresh_seeds(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        arms={"muP": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector"}},
        nuisance={"optim.lr": [2**-9, 2**-6]},
        search={"vectors": {"optim.lr": [2**-8, 2**-5], "optim.multiplier_lr": [0.01, 0.03]}},
        seeds=[100, 101],
        judge_seeds=[3, 4, 5],
        questions=[{"of": "vectors", "against": "muP"}],
        budget={"steps": 2, "batch_size": 4},
    )
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path, workers=0)

    # 2 rates, and 2 rates x 2 rates, on 2 seeds, and the best of either on 3 others.
    assert (result.ran, result.cells, result.failures) == (2 * 2 + 4 * 2 + 6, 18, {})
    runs = load_records(tmp_path)
    judged = runs[runs["judged"]]
    assert sorted(judged["seed"]) == [3, 3, 4, 4, 5, 5]
    for arm, group in runs[~runs["judged"]].groupby("arm"):
        values = ["lr", "nuisance"]
        best = group.groupby(values)["final_loss"].mean().idxmin()
        assert list(map(tuple, judged.loc[judged["arm"] == arm, values].drop_duplicates().to_numpy())) == [best]

    points = sensitivity.points(runs)
    assert set(points.loc[points["best_loss"].notna(), "seed"]) == {3, 4, 5}
    assert set(points.loc[points["mean_loss"].notna(), "seed"]) == {100, 101}
    (answer,) = answers(runs, spec.questions).to_dict("records")
    by_arm = judged.groupby("arm")["final_loss"].mean()
    assert answer["seeds"] == 3
    assert answer["difference"] == pytest.approx(by_arm["vectors"] - by_arm["muP"], abs=1e-12)
    assert set(best_rates(runs)["seed"]) == {3, 4, 5}
    costs = bill(runs, points, None).set_index("label")
    assert costs["seeds"].to_dict() == {"muP": 3, "vectors": 3}
    tokens = {arm: group["tokens"].iloc[0] for arm, group in runs.groupby("arm")}
    for arm, searched in (("muP", 4), ("vectors", 8)):
        assert costs.loc[arm, "search_tokens"] == (searched + 1) * tokens[arm]
        assert costs.loc[arm, "run_tokens"] == tokens[arm]
    write_report(tmp_path)
    assert "6 runs are of seeds that judge" in (tmp_path / "report.md").read_text()
    find_records(tmp_path)[-1].unlink()
    assert sweep(spec, tmp_path, workers=0).ran == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_seeds": [0]}, "judge_seeds = [0]: must be fresh; [0] are among the study's seeds"),
        ({"judge_seeds": [7, 7]}, "must not repeat"),
        (
            {"judge_seeds": [7], "precision": 0.1, "budget": {"steps": 2, "batch_size": 4, "seeds": 9}}
            | {"questions": [{"of": "vectors", "against": "muP"}]},
            "judge_seeds = [7]: cannot go with precision",
        ),
        ({"search": {"vector": {}}}, "search.vector = '...': must be one of the arms muP, vectors"),
        ({"search": {"muP": {"multipliers": ["none"]}}}, "is set by arms.muP too; name it once"),
        ({"search": {"muP": {"optim.rate": [1.0]}}}, "search.muP.optim.rate"),
        ({"search": {"muP": {"optim.lr": {"low": 0.1, "high": 1}}}}, "needs a list, or sampler: random or tpe"),
    ],
)
def test_what_cannot_be_judged_or_searched_is_refused(
    small_study_dict: MakeStudy, changes: dict[str, Any], message: str
) -> None:
    with refusal(message):
        StudySpec.from_dict(small_study_dict(**changes))

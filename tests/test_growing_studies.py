"""Tiny sweeps whose records decide on further cells."""

from __future__ import annotations

from pathlib import Path

from study_data import states
from tiny_runs import MakeStudy

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

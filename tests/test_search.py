"""Sampled searches, pruning, tuned presets, and grids that follow their optimum."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal
from study_data import queues, trials
from tiny_runs import MakeStudy

from lit_mult.analysis.frame import load_records
from lit_mult.analysis.sensitivity import points
from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, UserError
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study.files import load_study
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import next_rate, rates_between
from lit_mult.study.search import distributions
from lit_mult.study.spec import StudySpec
from lit_mult.study.status import study_status
from lit_mult.study.storage import open_storage
from lit_mult.study.sweep import sweep
from lit_mult.study.tuning import tuned_preset
from lit_mult.training import run as run_module


@pytest.fixture
def tuning_dict(study_dict: MakeStudy) -> MakeStudy:
    """A tuning study of one arm at one width."""

    def make(**changes: Any) -> dict[str, Any]:
        study = study_dict(
            arms={"muP": {"multipliers": "fixed"}},
            factors={"model.d_model": [8]},
            nuisance={"optim.lr": {"low": 2**-9, "high": 2**-3, "log": True}},
            search_multipliers=True,
            sampler="tpe",
            start=[{"optim.lr": 2**-8}, {"optim.lr": 2**-5}],
            seeds=[100],
            budget={"steps": 6, "batch_size": 4, "trials": 6},
        )
        return {**study, **changes}

    return make


def records(folder: Path) -> list[RunRecord]:
    return [RunRecord.read(path) for path in find_records(folder)]


@pytest.mark.parametrize(("tier", "searched"), [("NONE", 0), ("LR", 9), ("LRWD", 18), ("FULL", 24)])
def test_the_arm_s_tier_says_which_multipliers_are_searched(tuning_dict: MakeStudy, tier: str, searched: int) -> None:
    arms = {"fixed": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector"}}
    arms = {arm: overrides | {"parametrization.tier": tier} for arm, overrides in arms.items()}
    fixed, vectors = StudySpec.from_dict(tuning_dict(arms=arms)).points()

    assert len(fixed.nuisance) == 1 + searched
    # Learnable multipliers take the place of the forward ones, of which there are 6.
    assert len(vectors.nuisance) == 1 + min(searched, 18)
    assert fixed.start()[1] == {"optim.lr": 2**-5} | dict.fromkeys(list(fixed.nuisance)[1:], 1.0)


def test_a_tuning_study_begins_with_the_default_and_yields_a_preset(tuning_dict: MakeStudy, tmp_path: Path) -> None:
    spec = StudySpec.from_dict(tuning_dict())

    assert sweep(spec, tmp_path / "out", workers=0).ran == 6

    found = records(tmp_path / "out")
    defaults = [r for r in found if set(r.config["parametrization"]["lr"].values()) == {1.0}]
    assert {r.config["optim"]["lr"] for r in defaults} == {2**-8, 2**-5}
    searched = [r for r in found if r not in defaults]
    assert len({json.dumps(r.config["parametrization"]) for r in searched}) == 4
    preset = tuned_preset(tmp_path / "out")
    tuning = preset.optimizers["adamw"].tuning
    assert tuning is not None
    assert tuning.trials == 6
    assert tuning.best_loss == pytest.approx(min(r.final_loss for r in found if r.final_loss), rel=1e-5)
    assert tuning.default_loss == pytest.approx(min(r.final_loss for r in defaults if r.final_loss), rel=1e-5)
    assert tuning.tokens == 6 * 6 * 4 * 16
    # Nothing is lost with the journal: the trials come back from the records, and none is run again.
    (tmp_path / "out" / "optuna.journal").unlink()
    assert sweep(spec, tmp_path / "out", workers=0).ran == 0
    assert sorted(t.value for t in trials(tmp_path / "out", "tiny/muP-8")) == sorted(r.final_loss for r in found)


def test_a_preset_makes_cells_that_need_no_file(study_dict: MakeStudy, tmp_path: Path) -> None:
    preset = tmp_path / "tuned.yaml"
    preset.write_text("name: mine\nsource: a test\nlr: {q_proj: 4.0}\nforward: {o_proj: 0.5}\n")
    path = tmp_path / "study.yaml"
    arms = {"muP": {"multipliers": "fixed"}}
    arms["tuned"] = arms["muP"] | {"parametrization.preset": "best"}
    path.write_text(yaml.safe_dump(study_dict(arms=arms, presets={"best": None})))

    with pytest.raises(UserError, match=r"presets\.best = None: must be given with --preset FILE"):
        load_study(str(path))
    with pytest.raises(UserError, match=r"--preset other=.*: the study names best"):
        load_study(str(path), [f"other={preset}"])
    spec = load_study(str(path), [str(preset)])

    assert spec == load_study(str(path), [f"best={preset}"])
    plain, tuned = (next(p for p in spec.points() if p.arm == arm).first_cell().config for arm in ("muP", "tuned"))
    section = tuned.parametrization
    assert (section.preset, section.lr, section.forward) == ("neutral", {"q_proj": 4.0}, {"o_proj": 0.5})
    assert plain.parametrization.lr == {}
    preset.unlink()
    assert sweep(spec, tmp_path / "out", workers=0).ran == spec.n_cells
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert held["spec"]["presets"]["best"]["lr"] == {"q_proj": 4.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": "grid", "nuisance": {"optim.lr": [0.1, 0.2]}}, "budget.trials"),
        (
            {"sampler": "grid", "nuisance": {}, "budget": {"steps": 6, "batch_size": 4}},
            "search_multipliers = True: needs",
        ),
        ({"start": [{"model.d_model": 8}]}, "start.0.model.d_model = 8: names no nuisance factor"),
        (
            {"nuisance": {"optim.lr": [0.1, 0.2]}, "start": [{"optim.lr": 0.3}]},
            "start.0.optim.lr = 0.3: is not in the list [0.1, 0.2]",
        ),
        (
            {"nuisance": {"optim.lr": [0.1, 0.2]}, "search_multipliers": False, "start": [], "seeds": [0, 1]},
            "budget.trials = 6: the lists of arm muP make 4 cells; sampler: grid runs them all",
        ),
        ({"pruner": {"name": "median"}}, "pruner = 'median': needs base.train.eval_every"),
        ({"pruner": {"name": "oracle"}}, "pruner.name = 'oracle'"),
        ({"follow_optimum": 2}, "follow_optimum = 2: needs sampler: grid"),
        ({"refine_optimum": 1}, "refine_optimum = 1: needs sampler: grid"),
    ],
)
def test_a_bad_search_is_refused_in_one_line(tuning_dict: MakeStudy, changes: dict[str, Any], said: str) -> None:
    with refusal(said, kind=ConfigError):
        StudySpec.from_dict(tuning_dict(**changes))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("n_trials", [5, 6])
def test_a_search_over_lists_ends_though_its_sampler_repeats_itself(
    tuning_dict: MakeStudy, tmp_path: Path, sampler: str, n_trials: int
) -> None:
    rates, budget = [2**-8, 2**-7, 2**-6], {"steps": 2, "batch_size": 4, "trials": n_trials}
    study = tuning_dict(search_multipliers=False, nuisance={"optim.lr": rates}, start=[], seeds=[3, 4], budget=budget)

    assert sweep(StudySpec.from_dict(study | {"sampler": sampler}), tmp_path, workers=0).ran == n_trials

    cells = {(record.config["optim"]["lr"], record.seed) for record in records(tmp_path)}
    assert len(cells) == n_trials  # none twice
    assert {rate for rate, _ in cells} <= set(rates)  # and nothing between them


def test_trials_that_wait_to_be_sampled_are_counted_when_another_sweep_joins(
    tuning_dict: MakeStudy, tmp_path: Path
) -> None:
    spec, folder = StudySpec.from_dict(tuning_dict()), StudyFolder(tmp_path)
    for queue in queues(spec, folder, "a", "b", "c"):
        queue.refresh()
        assert queue.counts().waiting == spec.n_cells == 6


def test_two_sweeps_sample_no_more_than_the_budget(tuning_dict: MakeStudy, tmp_path: Path) -> None:
    spec, folder = StudySpec.from_dict(tuning_dict()), StudyFolder(tmp_path)
    both = queues(spec, folder, "a", "b")
    taken = []
    for number in range(9):
        if ticket := both[number % 2].next():
            assert folder.attempts.begin(ticket.cell.id, 0)
            taken.append(ticket.cell.id)

    assert len(set(taken)) == len(taken) == 6
    assert len(list(folder.trials_folder.glob("*.json"))) == 6


def test_a_search_begun_by_an_earlier_version_is_resumed(tuning_dict: MakeStudy, tmp_path: Path) -> None:
    """It has no slots: its records count, and an interrupted cell is a trial that waits with all its parameters."""
    spec, folder = StudySpec.from_dict(tuning_dict()), StudyFolder(tmp_path)
    sweep(spec, tmp_path, workers=0)
    shutil.rmtree(folder.trials_folder)
    folder.journal.unlink()
    interrupted = RunRecord.read(find_records(tmp_path)[2])
    assert interrupted.cell is not None
    for path in find_records(tmp_path)[2:4]:
        path.unlink()
    study = optuna.create_study(storage=open_storage(folder.journal), study_name="tiny/muP-8")
    parameters = interrupted.cell.nuisance | {"seed": interrupted.seed}
    study.enqueue_trial(parameters, user_attrs={"enqueued": parameters})
    study.enqueue_trial({"seed": 100}, user_attrs={"enqueued": {"seed": 100}})
    attempt = folder.attempts.begin(interrupted.cell.cell, 0)
    assert attempt is not None
    attempt.close("stopped")

    assert sweep(spec, tmp_path, workers=0).ran == 2

    assert len(records(tmp_path)) == 6
    assert folder.record(interrupted.cell.cell).is_file()
    found = Counter(t.state.name for t in trials(tmp_path, "tiny/muP-8"))
    assert (found["COMPLETE"], found.keys()) == (6, {"COMPLETE", "FAIL"})


def test_bad_pruner_options_are_found_before_anything_is_written(tuning_dict: MakeStudy, tmp_path: Path) -> None:
    study = tuning_dict(pruner={"name": "median", "options": {"warmup": 3}})
    study["base"]["train"]["eval_every"] = 2

    with pytest.raises(UserError, match=r"pruner\.options = .*warmup"):
        sweep(StudySpec.from_dict(study), tmp_path / "out", workers=0)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pruner_counts_optimizer_steps(tuning_dict: MakeStudy, tmp_path: Path, workers: int) -> None:
    """Every trial is worse than the one before it at every step, so the median ends all but the first few."""
    rates = [2**-4, 2**-6, 2**-8, 2**-10, 2**-12, 2**-14]
    study = tuning_dict(
        search_multipliers=False,
        nuisance={"optim.lr": {"low": 2**-15, "high": 2**-3, "log": True}},
        start=[{"optim.lr": rate} for rate in rates],
        budget={"steps": 12, "batch_size": 4, "trials": 6},
        pruner={"name": "median", "options": {"n_startup_trials": 2, "n_warmup_steps": 4}},
    )
    study["base"]["train"]["eval_every"] = 2

    result = sweep(StudySpec.from_dict(study), tmp_path / "out", workers=workers)

    found = records(tmp_path / "out")
    pruned = [record for record in found if record.status == "pruned"]
    assert result.pruned == len(pruned)
    if workers == 0:  # side by side, trials are not in an order
        assert {record.config["optim"]["lr"] for record in pruned} == set(rates[2:])
    assert pruned
    # As soon as the warm-up is over, by optimizer step; the validation there is the last.
    assert {record.steps for record in pruned} <= ({4} if workers == 0 else {4, 6, 8, 10})
    assert all(record.final_loss is None and record.val_curve[-1][0] == record.steps for record in pruned)
    assert {t.state.name for t in trials(tmp_path / "out", "tiny/muP-8")} == {"COMPLETE", "PRUNED"}
    assert all(set(t.intermediate_values) <= {2, 4, 6, 8, 10} for t in trials(tmp_path / "out", "tiny/muP-8"))
    assert (load_records(tmp_path / "out")["status"] == "pruned").sum() == len(pruned)


@given(st.lists(st.integers(-12, 0), min_size=2, max_size=8, unique=True), st.data())
def test_a_grid_grows_beyond_the_edge_at_which_its_optimum_lies(exponents: list[int], data: st.DataObject) -> None:
    exponents = list(range(min(exponents), max(exponents) + 1))
    rates = [2.0**exponent for exponent in exponents]
    best = data.draw(st.sampled_from(exponents))
    losses = {2.0**exponent: abs(exponent - best) for exponent in exponents}

    grown = next_rate(data.draw(st.permutations(rates)), losses)

    if best == exponents[0]:
        assert grown == 2.0 ** (best - 1)
    elif best == exponents[-1]:
        assert grown == 2.0 ** (best + 1)
    else:
        assert grown is None
    assert next_rate(rates, dict.fromkeys(rates, math.inf)) is None


def set_losses(monkeypatch: pytest.MonkeyPatch, loss: Callable[[RunConfig], float]) -> None:
    """Runs end with this final loss."""
    real = run_module.run

    def graded(config: RunConfig, *arguments: Any, record_path: Path, **options: Any) -> RunRecord:
        record = real(config, *arguments, record_path=record_path, **options)
        graded = record.model_copy(update={"final_loss": loss(config)})
        record_path.unlink()
        graded.write(record_path)
        return graded

    monkeypatch.setattr(run_module, "run", graded)


def test_trials_at_added_rates_are_within_the_range_that_optuna_is_told(study_dict: MakeStudy) -> None:
    """Rates of steps that are no power of two, at which rounding goes either way."""
    for step in (0.7, 1.25, 4 / 3):
        exponents = [-9 + step * i for i in range(3)]
        study = study_dict(nuisance={"optim.lr": {"log2": exponents}}, follow_optimum=3)
        allowed = distributions(next(StudySpec.from_dict(study).points()))["optim.lr"]
        up = down = [2.0**exponent for exponent in exponents]
        for _ in range(3):
            up = [*up, next_rate(up, {rate: -rate for rate in up}) or 0]
            down = [next_rate(down, {rate: rate for rate in down}) or 0, *down]
            assert allowed._contains(up[-1])
            assert allowed._contains(down[0])


@given(st.floats(-9, -5), st.integers(1, 4))
def test_refined_rates_close_in_on_the_optimum(optimum: float, halvings: int) -> None:
    rates = {2.0**exponent: abs(exponent - optimum) for exponent in (-9, -8, -7, -6, -5)}
    spacing = 2 ** (1 / 2**halvings)
    while added := rates_between(rates, spacing):
        assert len(added) <= 2
        assert not rates.keys() & set(added)
        rates |= {rate: abs(math.log2(rate) - optimum) for rate in added}
    assert min(rates.values()) <= math.log2(spacing) / 2 + 1e-9
    assert len(rates) <= 5 + 2 * halvings


def test_nothing_is_refined_where_all_rates_diverge() -> None:
    assert rates_between({0.1: math.inf, 0.2: math.inf}, 1.1) == []


def test_a_study_follows_its_optimum_within_its_budget(
    study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss that falls with the rate at width 8 and rises at 16, both grids grow, one at each side."""
    sign = {8: -1, 16: 1}
    set_losses(monkeypatch, lambda config: 20 + sign[config.model.d_model] * math.log2(config.optim.lr))
    arms = {"muP": {"multipliers": "fixed"}}
    study = study_dict(arms=arms, seeds=[0, 1], nuisance={"optim.lr": {"log2": [-8, -7, -6]}}, follow_optimum=2)
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path / "out", workers=0)

    found = records(tmp_path / "out")
    rates = {
        (width, added): {
            math.log2(r.config["optim"]["lr"])
            for r in found
            if r.cell and r.cell.added == added and r.config["model"]["d_model"] == width
        }
        for width in (8, 16)
        for added in (False, True)
    }
    assert rates == {(8, False): {-8, -7, -6}, (8, True): {-5, -4}, (16, False): {-8, -7, -6}, (16, True): {-9, -10}}
    assert (result.ran, result.cells, spec.n_cells) == (20, 20, 12)
    assert study_status(tmp_path / "out", retries=3).cells == 20
    # Whatever is lost, the same cells come again; the trials that stand for those with a record are closed by it.
    (tmp_path / "out" / "optuna.journal").unlink()
    lost = next(path for path, r in zip(find_records(tmp_path / "out"), found, strict=True) if r.cell and r.cell.added)
    lost.unlink()
    assert sweep(spec, tmp_path / "out", workers=0).ran == 1
    assert RunRecord.read(lost).cell == next(r.cell for r in found if r.cell and r.cell.cell == lost.stem)


def test_rates_are_added_around_the_optimum_and_count_for_the_best_loss_alone(
    small_study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, lambda config: 2 + abs(math.log2(config.optim.lr) + 7.2))
    rates = {"optim.lr": {"log2": [-8, -7, -6]}}
    study = small_study_dict(arms={"muP": {"multipliers": "fixed"}}, seeds=[0, 1], nuisance=rates, refine_optimum=2)
    spec = StudySpec.from_dict(study)

    result = sweep(spec, tmp_path, workers=0)

    found = records(tmp_path)
    added = {math.log2(r.config["optim"]["lr"]) for r in found if r.cell and r.cell.added}
    assert added == {-7.5, -6.5, -7.25, -6.75}
    assert (result.ran, spec.n_cells, study_status(tmp_path, retries=3).cells) == (14, 6, 14)
    shown = points(load_records(tmp_path))
    assert shown["best_loss"].tolist() == pytest.approx([2.05, 2.05])
    assert shown["mean_loss"].tolist() == pytest.approx([2 + (0.8 + 0.2 + 1.2) / 3] * 2)
    assert shown["complete"].all()
    assert not shown["at_edge"].any()

"""Studies: what a file means, what is refused, and a sweep that loses and repeats nothing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from refusals import refusal
from study_data import assert_undisturbed, losses, queues, states, trials, workers_of
from tiny_runs import MakeStudy

from lit_mult.config import Experiment, RunConfig
from lit_mult.errors import ConfigError, Interrupted, UserError
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study import stack as stacks
from lit_mult.study.files import load_study
from lit_mult.study.folder import StudyFolder
from lit_mult.study.grids import Distribution
from lit_mult.study.spec import StudySpec, canonical
from lit_mult.study.sweep import sweep
from lit_mult.training import run


def test_the_cells_of_a_grid(study_dict: MakeStudy) -> None:
    spec = StudySpec.from_dict(study_dict(seeds=[0, 1]))

    points = list(spec.points())

    assert [point.name for point in points] == [
        f"{arm}-{width}" for arm in ("muP", "vectors", "standard") for width in (8, 16)
    ]
    # 2 rates x 2 seeds for the tuned arms; the reference sets the rate itself: 2 seeds.
    assert [point.n_cells for point in points] == [4, 4, 4, 4, 2, 2]
    assert spec.n_cells == 20
    cell = points[2].cell({"optim.lr": 2**-5}, seed=1)
    config = cell.config
    assert (config.multipliers, config.model.d_model, config.optim.lr) == ("vector", 8, 2**-5)
    assert (config.seed, config.train.steps, config.train.batch_size) == (1, 6, 4)
    assert points[4].first_cell().config.optim.lr == 0.001
    ids = [point.cell(n, s).id for point in points for n in point.grid() for s in spec.seeds]
    assert len(set(ids)) == 20


def test_shipped_studies_are_valid_and_fair() -> None:
    for name, cells in (
        ("quick", 2 * 2 * 2 * 3 * 3),
        ("pays", 4 * 2 * 2 * 4 * 5),
        ("pays_tuning", 2 * (60 * 2 + 8 * 3)),
        ("dose", 2 * 2 * 5 * 3 * 5),
        ("dose_noise", 2 * 2 * 3 * 3 * 5),
        ("dose_groups", 5 * 2 * 3 * 5),
        ("dose_vocabulary", 2 * 2 * 3 * 3 * 5),
        ("sphere_or_decay", 2 * 4 * 4 * 5),
        ("plane", 2 * 2 * 42 * 3),
        ("depth", 4 * 4 * 4 * 3),
        ("pays_downstream", 2 * 2 * 3 * 5),
        ("pays_other_text", 2 * 2 * 3 * 5),
        ("pays_wide", 3 * 2 * 3 * 5),
        ("pays_relative_lr", 4 * 2 * 4 * 5),
        ("pays_decay", 3 * 2 * 3 * 5 * 5),
        ("lr_width", 3 * 3 * 7 * 3 * 2),
        ("mup_tuning", 2 * 100),
        ("adam_vs_muon", None),
    ):
        spec = load_study(name)
        assert spec.name == name
        assert cells in (None, spec.n_cells)
        # Arms differ in multipliers and parametrization alone: same data, budget, schedule and vector-like rates.
        touched = {field for overrides in spec.arms.values() for field in overrides}
        if name == "pays_relative_lr":  # its question; see below
            touched -= {"optim.vector_lr", "optim.vector_lr_mode"}
        of_the_arm = {"rule", "depth_rule", "preset", "tier"}
        parametrization = {f"parametrization.{field}" for field in of_the_arm}
        assert touched <= {"multipliers", "placement.init", "placement.overrides", "optim.lr", *parametrization}


def test_the_study_of_tied_rates_trains_norms_alike_on_both_sides() -> None:
    spec = load_study("pays_relative_lr")
    for question in spec.questions:
        of, against = (spec.arms[side["arm"]] for side in (question.of, question.against))
        for field in ("optim.vector_lr", "optim.vector_lr_mode"):
            assert of.get(field) == against.get(field)


@pytest.mark.parametrize("name", get_args(Experiment))
def test_every_experiment_ships_as_a_study_with_a_larger_profile(name: str) -> None:
    spec, larger = load_study(name), load_study(name, profile="gpu")

    assert (spec.name, spec.experiment) == (name, name)
    assert (larger.name, larger.experiment) == (f"{name}-gpu", name)
    assert len(spec.judge_seeds or spec.seeds) >= 3
    assert larger.budget.steps
    assert spec.budget.steps
    assert larger.budget.steps > spec.budget.steps
    assert set(larger.arms) == set(spec.arms)
    if name == "arena":
        return  # contestants differ in more: see below
    # Arms differ in the one thing that the experiment is about, never in data, schedule or the rates of norms.
    touched = {field.partition(".")[0] for overrides in spec.arms.values() for field in overrides}
    assert touched <= {"multipliers", "model", "optim", "placement"}
    assert len({tuple(sorted(overrides)) for overrides in spec.arms.values()}) <= 2


def test_arms_that_train_the_same_models_are_named() -> None:
    arms = {"none": {"multipliers": "none"}, "muP": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector"}}
    tuned = {"multipliers": "fixed", "parametrization.preset": "falcon-h1-0.5b"}
    standard = {"multipliers": "fixed", "parametrization.rule": "standard"}
    study = {"name": "mine", "seeds": [0], "budget": {"steps": 10, "batch_size": 2}}
    spec = StudySpec.from_dict(study | {"arms": arms | {"tuned": tuned, "standard": standard}})
    assert list(spec.same_arms()) == [("none", "muP")]
    for name in ("quick", "pays", "pays_ablation", "pays_tuning", "arena"):
        assert not list(load_study(name).same_arms()), name


def test_the_arena_tunes_every_contestant_alike() -> None:
    for spec in (load_study("arena"), load_study("arena", profile="gpu")):
        assert len(spec.arms) >= 10
        tuned = [point for point in spec.points() if not point.arm.endswith("-authors")]
        assert {len(list(point.grid())) for point in tuned} == {6}
        assert {len(list(point.grid())) for point in spec.points() if point not in tuned} == {1}
        decays = {
            arm: repr(space["optim.weight_decay"])
            for arm, space in spec.search.items()
            if "optim.weight_decay" in space
        }
        assert len({*decays.values()}) == 1
        # These never decay, but for Scion, of which one number, lr over radius, is both.
        assert {*spec.search} - {*decays} == {"Hyperball", "MD", "Muon-Hyperball", "Muon-MD", "Scion"}
        assert len(spec.judge_seeds) >= 3
        touched = {field for overrides in spec.arms.values() for field in overrides}
        touched |= {field for grids in spec.search.values() for field in grids}
        assert not any(field.startswith(("data.", "model.", "schedule.", "train.")) for field in touched)
        assert "optim.vector_lr" not in touched  # of norms, the same for all


def test_a_profile_is_merged_into_the_file(study_dict: MakeStudy, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    plain = study_dict()
    profile = {"base": {"model": {"n_layers": 2}}, "seeds": [5], "budget": {"steps": 7}}
    path.write_text(yaml.safe_dump(plain | {"profiles": {"big": profile}}))

    assert canonical(load_study(str(path))) == canonical(StudySpec.from_dict(plain))
    big = load_study(str(path), profile="big")
    assert big.name == "tiny-big"
    assert big.base_config.model.n_layers == 2
    assert big.base_config.model.head_dim == plain["base"]["model"]["head_dim"]  # fields it does not name stay
    assert (big.seeds, big.budget.steps, big.budget.batch_size) == ([5], 7, plain["budget"]["batch_size"])
    with pytest.raises(UserError, match=r"--profile = 'huge': must be one of the study's: big"):
        load_study(str(path), profile="huge")
    path.write_text(yaml.safe_dump(plain | {"profiles": ["big"]}))
    with pytest.raises(UserError, match=r"profiles = .*: must map names to parts of a study"):
        load_study(str(path))


def test_a_plan_with_overrides_in_its_base_is_read_back(study_dict: MakeStudy, tmp_path: Path) -> None:
    plain = study_dict()
    overrides = {"*": "none", "layers.0.*": "scalar"}
    spec = StudySpec.from_dict({**plain, "base": {**plain["base"], "placement": {"overrides": overrides}}})
    folder = StudyFolder(tmp_path)
    folder.claim(spec, ["corpus"])
    assert folder.spec().base_config.hash == spec.base_config.hash
    assert list(folder.spec().base_config.placement.overrides) == list(overrides)


def test_the_batch_may_be_the_question(study_dict: MakeStudy) -> None:
    spec = StudySpec.from_dict(study_dict(factors={"train.batch_size": [2, 8]}))
    assert {point.first_cell().config.train.batch_size for point in spec.points()} == {2, 8}
    with pytest.raises(ConfigError, match=r"nuisance.train.batch_size .* is set by budget.batch_size"):
        StudySpec.from_dict(study_dict(nuisance={"train.batch_size": [2, 8]}))


def test_the_length_may_be_the_question(study_dict: MakeStudy) -> None:
    spec = StudySpec.from_dict(study_dict(factors={"train.steps": [3, 9]}))
    assert {point.first_cell().config.train.steps for point in spec.points()} == {3, 9}


def test_a_budget_of_tokens_gives_every_batch_size_as_many(study_dict: MakeStudy) -> None:
    budget = {"tokens": 16 * 4 * 10, "batch_size": 4}
    spec = StudySpec.from_dict(study_dict(factors={"train.batch_size": [2, 8]}, budget=budget))
    configs = [point.first_cell().config for point in spec.points()]
    assert {config.data.seq_len for config in configs} == {16}
    assert {(config.train.batch_size, config.train.steps) for config in configs} == {(2, 20), (8, 5)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factors": {"model.d_modle": [8]}}, "factors.model.d_modle = [8]: no such field"),
        ({"factors": {"model.d_modle": [8]}}, "did you mean model.d_model?"),
        ({"factors": {"model.d_model": []}}, "factors.model.d_model = []: an empty grid"),
        ({"nuisance": {"optim.lr": []}}, "nuisance.optim.lr = []: an empty grid"),
        ({"nuisance": {"optim.lr": {"log2": []}}}, "nuisance.optim.lr.log2 = []: list should have at least 1 item"),
        ({"nuisance": {"optim.lr": {"log2": ["x"]}}}, "nuisance.optim.lr.log2.0 = 'x': input should be a valid number"),
        ({"nuisance": {"optim.lr": {"low": 1e-3}}}, "nuisance.optim.lr.high = None: must be given"),
        ({"nuisance": {"optim.lr": 0.01}}, "nuisance.optim.lr = 0.01: must be a list, such as [0.01]"),
        ({"nuisance": {"optim.lr": {"low": 1e-3, "high": 1e-1}}}, "needs a list, or sampler"),
        ({"nuisance": {"optim.lr": {"low": 1e-1, "high": 1e-3}}, "sampler": "random"}, "must be above low"),
        ({"nuisance": {"model.d_model": [8]}}, "is a scientific factor too"),
        ({"factors": {"seed": [0, 1]}}, "is set by seeds"),
        ({"arms": {"short": {"train.steps": 2}}}, "arms.short.train.steps = 2: is set by budget.steps"),
        ({"budget": {"batch_size": 4}}, "budget.steps = None: set it or budget.tokens, one of the two"),
        ({"budget": {"batch_size": 4, "steps": 2, "tokens": 64}}, "budget.steps = 2: set it or budget.tokens"),
        (
            {"budget": {"batch_size": 4, "tokens": 64}, "factors": {"train.steps": [1, 2]}},
            "factors.train.steps = '...': are set by budget.tokens",
        ),
        ({"factors": {"model.d_model": [8, 9]}}, "model.d_model = 9: must be a multiple of model.head_dim = 8"),
        ({"factors": {"optimizer": ["sgd"], "model.d_model": [8]}}, "optimizer = 'sgd': must be one of adamw, muon"),
        ({"base": {"model": {"depth": 3}}}, "model.depth = 3: unknown field"),
        ({"factors": {"model.d_model": [8, 8]}}, "factors.model.d_model = [8, 8]: must not repeat"),
        ({"nuisance": {"optim.lr": [0.01, 0.02, 0.01]}}, "must not repeat"),
        ({"nuisance": {"optim.lr": [0.01, -1.0]}}, "optim.lr = -1.0: input should be greater than 0"),
        ({"arms": {"w/o": {}}}, "arms.w/o"),
        ({"seeds": []}, "seeds = []"),
        ({"seeds": 2}, "seeds = 2: must be a list of seeds, such as [0, 1]"),
        ({"judge_seeds": 2}, "judge_seeds = 2: must be a list of seeds"),
        ({"factors": {}, "base": {"model": {"d_model": 9}}}, "a multiple of model.head_dim = 32 (arm muP)"),
        ({"factors": {"model.width": [8]}}, "did you mean model.d_model?"),
        ({"seeds": [1, 1]}, "must not repeat"),
        ({"arms": {}}, "arms = {}"),
        ({"budget": {"steps": 0, "batch_size": 4}}, "budget.steps = 0"),
        ({"sampler": "tpe"}, "budget.trials = None: must be set with this sampler"),
        ({"budget": {"steps": 6, "batch_size": 4, "trials": 3}}, "must be left out with sampler: grid"),
        ({"name": "../evil"}, "name = '../evil'"),
        ({"typo": 1}, "typo = 1: unknown field"),
        ({"budget": {"steps": 1}}, "budget.batch_size = None: must be given"),
    ],
)
def test_a_bad_study_is_refused_in_one_line(study_dict: MakeStudy, changes: dict[str, Any], said: str) -> None:
    with refusal(said, kind=ConfigError):
        StudySpec.from_dict(study_dict(**changes))


def test_a_misspelt_field_is_not_reported_as_a_missing_one(study_dict: MakeStudy) -> None:
    study = study_dict()
    with refusal("nme = 'tiny': unknown field; did you mean name?"):
        StudySpec.from_dict({"nme": study.pop("name"), **study})
    with refusal("arm = {'muP': {", "...: unknown field; did you mean arms?") as error:
        StudySpec.from_dict({"name": "tiny", "arm": study.pop("arms"), **study})
    assert len(str(error.value)) < 150


def test_powers_of_two_in_a_study_are_numbers(study_dict: MakeStudy) -> None:
    written = study_dict(
        arms={"a": {"optim.weight_decay": "2^-3"}},
        factors={"optim.vector_lr": ["2^-7.5", "1e-3"], "data.corpus": ["2^-x"]},
        nuisance={"optim.lr": ["2^-7", 0.5]},
        questions=[],
    )
    plain = study_dict(
        arms={"a": {"optim.weight_decay": 0.125}},
        factors={"optim.vector_lr": [2**-7.5, 0.001], "data.corpus": ["2^-x"]},
        nuisance={"optim.lr": [2**-7, 0.5]},
        questions=[],
    )
    assert canonical(StudySpec.from_dict(written)) == canonical(StudySpec.from_dict(plain))
    ranged = study_dict(nuisance={"optim.lr": {"low": "2^-9", "high": "2^-4"}}, sampler="random")
    ranged["budget"]["trials"] = 2
    assert StudySpec.from_dict(ranged).nuisance["optim.lr"] == Distribution(low=2**-9, high=2**-4)


def test_study_files_are_found_by_path_or_by_name(study_dict: MakeStudy, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(study_dict()))
    assert load_study(str(path)).name == "tiny"

    with pytest.raises(UserError, match=r"no such file, nor a shipped study .*lr_width.*quick"):
        load_study("nope")
    path.write_text("name: [")
    with pytest.raises(UserError, match="not a YAML file"):
        load_study(str(path))
    path.write_text("- 1")
    with pytest.raises(UserError, match="must be a mapping"):
        load_study(str(path))


def test_a_sweep_leaves_a_record_for_every_cell_and_is_resumed_for_free(spec: StudySpec, tmp_path: Path) -> None:
    first = sweep(spec, tmp_path / "out", workers=0)

    assert (first.ran, first.cells, first.failures) == (10, 10, {})
    records = [RunRecord.read(path) for path in find_records(tmp_path / "out")]
    assert len({record.cell.cell for record in records if record.cell}) == 10
    one = next(record for record in records if record.cell and record.cell.arm == "vectors")
    assert one.cell is not None
    assert one.cell.study == "tiny"
    assert one.cell.factors.keys() == {"model.d_model"}
    assert one.cell.nuisance == {"optim.lr": one.config["optim"]["lr"]}
    assert not any((tmp_path / "out" / "cells").iterdir())  # nothing to keep

    # A lost record is made again, bit by bit; the others are not touched.
    before = losses(tmp_path / "out")
    victim = find_records(tmp_path / "out")[3]
    victim.unlink()
    assert sweep(spec, tmp_path / "out", workers=0).ran == 1
    assert losses(tmp_path / "out") == before
    # Without the journal, the records alone say what is done.
    (tmp_path / "out" / "optuna.journal").unlink()
    assert sweep(spec, tmp_path / "out", workers=0).ran == 0


def test_optuna_knows_every_cell(spec: StudySpec, tmp_path: Path) -> None:
    sweep(spec, tmp_path / "out", workers=0)

    shown = trials(tmp_path / "out", "tiny/vectors-16")
    found = {(trial.params["optim.lr"], trial.params["seed"], trial.value) for trial in shown}
    records = [RunRecord.read(path) for path in (tmp_path / "out" / "records").glob("vectors-16-*.json")]
    assert found == {(record.config["optim"]["lr"], record.seed, record.final_loss) for record in records}
    assert all(trial.state.name == "COMPLETE" for trial in shown)


def test_a_study_that_changed_is_refused_with_the_difference(study_dict: MakeStudy, tmp_path: Path) -> None:
    sweep(StudySpec.from_dict(study_dict()), tmp_path / "out", workers=0)
    before = losses(tmp_path / "out")

    sweep(StudySpec.from_dict(study_dict(title="another title")), tmp_path / "out", workers=0)
    with pytest.raises(UserError, match=r"budget\.steps: 6 -> 7"):
        sweep(StudySpec.from_dict(study_dict(budget={"steps": 7, "batch_size": 4})), tmp_path / "out", workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        sweep(StudySpec.from_dict(study_dict()), tmp_path / "other", workers=0)

    assert losses(tmp_path / "out") == before


def test_bad_data_are_found_before_anything_is_written(study_dict: MakeStudy, tmp_path: Path) -> None:
    study = study_dict()
    study["base"]["data"]["corpus"] = str(tmp_path / "missing.txt")

    with pytest.raises(UserError, match="no such file"):
        sweep(StudySpec.from_dict(study), tmp_path / "out", workers=0)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampled_search_spends_its_trials_and_pairs_its_arms(
    study_dict: MakeStudy, tmp_path: Path, sampler: str
) -> None:
    study = study_dict(
        nuisance={"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        sampler=sampler,
        budget={"steps": 2, "batch_size": 4, "trials": 3},
        factors={"model.d_model": [8]},
        seeds=[0, 1],
    )
    spec = StudySpec.from_dict(study)
    assert spec.n_cells == 3 + 3 + 2  # the reference has nothing to search: one cell a seed

    sweep(spec, tmp_path / "out", workers=0)

    records = [RunRecord.read(path) for path in find_records(tmp_path / "out")]
    assert len(records) == 8
    rates = {
        arm: {(r.config["optim"]["lr"], r.seed) for r in records if r.cell and r.cell.arm == arm}
        for arm in ("muP", "vectors")
    }
    assert rates["muP"] == rates["vectors"]  # the first suggestions of a seeded sampler are the same for both
    assert all(1e-3 <= rate <= 1e-1 for rate, _ in rates["muP"])
    assert sorted(seed for _, seed in rates["muP"]) == [0, 0, 1]
    assert sweep(spec, tmp_path / "out", workers=0).ran == 0


def test_a_killed_sweep_leaves_no_trial_running(study_dict: MakeStudy, tmp_path: Path) -> None:
    rates = {"low": 1e-3, "high": 1e-1, "log": True}
    budget = {"steps": 2, "batch_size": 4, "trials": 4}
    study = study_dict(arms={"muP": {}}, nuisance={"optim.lr": rates}, sampler="random", budget=budget)
    spec = StudySpec.from_dict(study)
    folder = StudyFolder(tmp_path / "out")
    (queue,) = queues(spec, folder, "killed")
    sampled = [queue.next(), queue.next()]  # and then the process is gone

    assert states(folder.journal) == {"RUNNING": 2}
    assert sweep(spec, tmp_path / "out", workers=0).ran == 8
    assert states(folder.journal) == {"COMPLETE": 8, "FAIL": 2}
    assert {ticket.cell.id for ticket in sampled if ticket} < losses(tmp_path / "out").keys()


def test_a_cell_that_fails_is_named_and_tried_again_when_asked(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.run

    def sabotage(config: RunConfig, *arguments: Any, **options: Any) -> Any:
        if config.parametrization.rule == "standard":
            raise RuntimeError("out of luck")
        return real(config, *arguments, **options)

    monkeypatch.setattr(run, "run", sabotage)
    result = sweep(spec, tmp_path / "out", workers=0)
    assert result.ran == 8
    assert sorted(result.failures.values()) == ["RuntimeError: out of luck"] * 2

    monkeypatch.undo()
    again = sweep(spec, tmp_path / "out", workers=0)
    assert (again.ran, again.failures) == (0, result.failures)  # given up, and said so
    once_more = sweep(spec, tmp_path / "out", workers=0, retry_failed=True)
    assert (once_more.ran, once_more.failures) == (2, {})


def test_workers_give_what_one_process_gives(study_dict: MakeStudy, tmp_path: Path) -> None:
    spec = StudySpec.from_dict(study_dict(base=study_dict()["base"] | {"trainer": {"tensorboard": False}}))

    assert sweep(spec, tmp_path / "out", workers=2).ran == 10

    assert_undisturbed(spec, tmp_path / "out")  # to the bit: one thread each


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
def test_a_killed_worker_is_replaced_and_its_cell_run_again(study_dict: MakeStudy, tmp_path: Path) -> None:
    spec = StudySpec.from_dict(study_dict(budget={"steps": 60, "batch_size": 4}))
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if any((tmp_path / "out" / "records").glob("*.json")):  # the workers are up and at it
                victim = workers_of(os.getpid())[0]
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = sweep(spec, tmp_path / "out", workers=2)
    killer.join()

    assert killed
    assert result.failures == {}
    assert len(losses(tmp_path / "out")) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_goes_on(study_dict: MakeStudy, tmp_path: Path, number: signal.Signals) -> None:
    study = study_dict(budget={"steps": 60, "batch_size": 4})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "lit_mult", "sweep", str(path), "--out", str(tmp_path / "out"), "--workers", "2"]

    # A shell may have started the tests in the background, where SIGINT is ignored, and children inherit that.
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heard)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any((tmp_path / "out" / "records").glob("*.json")):
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert f"to resume, give the same command again: lit-mult {shlex.join(command[3:])}\n" in stderr
    assert "Traceback" not in stderr
    finished = losses(tmp_path / "out")
    assert 0 < len(finished) < 10
    spec = load_study(str(path))
    assert sweep(spec, tmp_path / "out", workers=0).ran == 10 - len(finished)
    assert_undisturbed(spec, tmp_path / "out")


def test_the_folder_says_what_the_study_is(spec: StudySpec, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "out")
    with folder.locked():
        folder.claim(spec, ["c0ffee"])

    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (held["name"], held["title"], held["cells"]) == ("tiny", "a tiny study", 10)
    assert held["spec"]["base"]["model"]["head_dim"] == 8


def test_an_arm_may_fix_a_scientific_factor_or_a_pattern(study_dict: MakeStudy, tmp_path: Path) -> None:
    arms = {
        "small": {"model.d_model": 8, "multipliers": "vector"},
        "partial": {"multipliers": "vector", "placement.overrides.layers.0.*": "none"},
    }
    spec = StudySpec.from_dict(study_dict(arms=arms))

    assert [point.name for point in spec.points()] == ["small-8", "partial-8", "partial-16"]
    partial = list(spec.points())[1].first_cell().config
    assert partial.placement.overrides == {"layers.0.*": "none"}
    assert sweep(spec, tmp_path / "out", workers=0).ran == 3 * 2


def test_a_sampled_search_that_goes_on_does_not_repeat_its_samples(
    study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_dict(
        arms={"vectors": {"multipliers": "vector"}},
        nuisance={"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        sampler="random",
        budget={"steps": 2, "batch_size": 4, "trials": 4},
        factors={"model.d_model": [8]},
    )
    spec = StudySpec.from_dict(study)
    real = stacks.run_job

    def stop_after_two(job: Any, post: Any, stop: Any) -> Any:
        if len(find_records(tmp_path / "out")) == 2:
            raise Interrupted
        return real(job, post, stop)

    monkeypatch.setattr(stacks, "run_job", stop_after_two)
    with pytest.raises(Interrupted):
        sweep(spec, tmp_path / "out", workers=0)
    monkeypatch.undo()

    assert sweep(spec, tmp_path / "out", workers=0).ran == 2
    assert len({RunRecord.read(path).config["optim"]["lr"] for path in find_records(tmp_path / "out")}) == 4


def test_a_study_on_another_text_is_refused(study_dict: MakeStudy, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} is {n * n}\n" for n in range(900)))
    study = study_dict()
    study["base"]["data"]["corpus"] = str(text)
    spec = StudySpec.from_dict(study)
    sweep(spec, tmp_path / "out", workers=0)

    text.write_text("".join(f"{n} is {n + n}\n" for n in range(900)))

    with pytest.raises(UserError, match=r"holds another version of this study \(corpora"):
        sweep(spec, tmp_path / "out", workers=0)


@pytest.mark.parametrize("change", [{"parametrization.preset": "nope"}, {"placement.overrides.lm_haed": "row"}])
def test_what_would_stop_every_cell_is_found_before_anything_is_written(
    study_dict: MakeStudy, tmp_path: Path, change: dict[str, Any]
) -> None:
    spec = StudySpec.from_dict(study_dict(arms={"bad": {"multipliers": "vector", **change}}))

    with pytest.raises(UserError, match=r"nope|matches no matrix"):
        sweep(spec, tmp_path / "out", workers=0)

    assert not (tmp_path / "out").exists()


def test_a_damaged_journal_is_set_aside_and_a_damaged_plan_is_named(spec: StudySpec, tmp_path: Path) -> None:
    sweep(spec, tmp_path / "out", workers=0)
    journal = tmp_path / "out" / "optuna.journal"
    journal.write_text(journal.read_text()[:-40] + "\n{torn\n{}\n")

    assert sweep(spec, tmp_path / "out", workers=0).ran == 0
    assert journal.with_name("optuna.journal.damaged").exists()

    (tmp_path / "out" / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"study\.json: damaged"):
        sweep(spec, tmp_path / "out", workers=0)


def test_a_sweep_killed_while_it_claimed_its_folder_can_be_started_again(spec: StudySpec, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".study.json").write_text('{"name": "ti')

    assert sweep(spec, tmp_path, workers=0).ran == 10

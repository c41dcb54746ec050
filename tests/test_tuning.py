"""From records of a tuning study, written by hand, to the preset of its best trials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from record_data import make_record

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.method.plan import plan_run
from lit_mult.method.presets import RoleMultipliers, apply_preset, load_preset
from lit_mult.registry.roles import Role
from lit_mult.schema import CellInfo
from lit_mult.study.tuning import tuned_preset

Q_LR, Q_WD, K_FORWARD = (f"parametrization.{name}" for name in ("lr.q_proj", "weight_decay.q_proj", "forward.k_proj"))


class Study:
    """A results folder to which trials are added one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n = 0

    def plan(self, **spec: Any) -> None:
        """Write the study's plan with these parts of its file."""
        self.folder.mkdir()
        (self.folder / "study.json").write_text(json.dumps({"name": "tune", "cells": 1, "spec": spec}))

    def trial(
        self,
        loss: float | None,
        nuisance: dict[str, Any],
        settings: dict[str, Any] | None = None,
        *,
        arm: str = "muP",
        seed: int = 0,
        factors: dict[str, Any] | None = None,
        **record: Any,
    ) -> None:
        """Add a record; a trial without a loss is diverged unless its status is given."""
        fixed = {"multipliers": "fixed", "train.steps": 100, "train.batch_size": 4, "data.seq_len": 32, "seed": seed}
        config = RunConfig().with_overrides(fixed | (settings or {}) | (factors or {}) | nuisance)
        self.n += 1
        cell = CellInfo(
            study="tune", cell=f"c{self.n:02}", arm=arm, sampler="tpe", factors=factors or {}, nuisance=nuisance
        )
        data = {"cell": cell, "git_commit": "abc", "corpus_hash": "c0ffee", "steps": 100, "tokens": 12_800}
        make_record(config, loss, **data | record).write(self.folder / "records" / f"c{self.n:02}.json")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "tune")


def tuned(study: Study, optimizer: Any = "adamw", arm: str | None = None) -> RoleMultipliers:
    return tuned_preset(study.folder, arm).optimizers[optimizer]


def test_the_best_completed_trial_gives_the_multipliers(study: Study) -> None:
    study.trial(2.4, {Q_LR: 1.0, K_FORWARD: 1.0, "optim.lr": 0.04})
    study.trial(2.3, {Q_LR: 1.0, K_FORWARD: 1.0, "optim.lr": 0.01})
    study.trial(2.1, {Q_LR: 2.0, K_FORWARD: 0.5, "optim.lr": 0.02})
    study.trial(2.2, {Q_LR: 4.0, K_FORWARD: 0.25, "optim.lr": 0.04})
    best = tuned(study)
    assert (best.lr, best.forward, best.weight_decay) == ({Role.Q_PROJ: 2.0}, {Role.K_PROJ: 0.5}, {})
    assert best.tuning is not None
    assert (best.tuning.lr, best.tuning.best_loss, best.tuning.default_loss) == (0.02, 2.1, 2.3)


def test_the_cost_is_that_of_all_trials(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0}, seed=0)
    study.trial(None, {Q_LR: 4.0}, seed=1, tokens=1_000, wall_seconds=0.5)
    pruned = {"status": "pruned", "tokens": 2_000, "wall_seconds": 0.25, "git_commit": "def"}
    study.trial(None, {Q_LR: 0.5}, seed=0, **pruned)
    study.trial(2.0, {"optim.lr": 0.5}, {Q_LR: 9.0}, arm="other")  # neither its loss nor its cost counts
    preset = tuned_preset(study.folder)
    tuning = preset.optimizers["adamw"].tuning
    assert tuning is not None
    assert tuning.model_dump() == {
        "study": "tune",
        "trials": 3,
        "runs": 3,
        "completed": 1,
        "pruned": 1,
        "diverged": 1,
        "tokens": 15_800,
        "flops": 94_800_000.0,  # 6 * 1000 parameters * 15 800 tokens
        "seconds": 2.75,
        "d_model": 64,
        "base_d_model": 32,
        "steps": 100,
        "batch_size": 4,
        "seq_len": 32,
        "lr": 2**-6,
        "best_loss": 2.1,
        "default_loss": None,  # no trial had all multipliers at 1
        "seeds": [0, 1],
        "fresh_seeds": [],
        "tier": "FULL",
        "git_commit": ["abc", "def"],
        "corpus_hash": "c0ffee",
    }
    assert preset.name == "tune"
    assert preset.source == (
        "Best of 3 trials of adamw in the tuning study tune, arm muP, on corpus c0ffee at commit abc, def."
    )


@pytest.mark.parametrize(("commit", "named"), [("abc", "abc"), (None, "unknown")])
def test_a_lone_commit_is_no_list(study: Study, commit: str | None, named: str) -> None:
    for value in (1.0, 2.0):
        study.trial(2.1, {Q_LR: value}, git_commit=commit)
    tuning = tuned(study).tuning
    assert tuning is not None
    assert tuning.git_commit == commit
    assert tuned_preset(study.folder).source.endswith(f"at commit {named}.")


def test_every_optimizer_has_numbers_of_its_own(study: Study) -> None:
    for optimizer, value, loss in (("adamw", 2.0, 2.1), ("adamw", 4.0, 2.2), ("muon", 2.0, 1.9), ("muon", 4.0, 1.8)):
        study.trial(loss, {Q_LR: value}, factors={"optimizer": optimizer})
    study.trial(None, {Q_LR: 8.0}, factors={"optimizer": "muon"})
    preset = tuned_preset(study.folder)
    assert {name: part.lr[Role.Q_PROJ] for name, part in preset.optimizers.items()} == {"adamw": 2.0, "muon": 4.0}
    trials = {name: part.tuning and part.tuning.trials for name, part in preset.optimizers.items()}
    assert trials == {"adamw": 2, "muon": 3}
    assert "2 trials of adamw and 3 trials of muon" in preset.source
    assert load_preset_text(preset.to_yaml(), study.folder) == preset


def load_preset_text(text: str, folder: Path) -> Any:
    (folder / "tuned.yaml").write_text(text)
    return load_preset(str(folder / "tuned.yaml"))


def test_a_run_with_the_preset_is_planned_as_the_best_trial_was(study: Study) -> None:
    base = RunConfig().with_overrides({"multipliers": "fixed"})
    study.trial(2.5, {Q_LR: 1.0, K_FORWARD: 1.0, Q_WD: 1.0})
    study.trial(2.1, {Q_LR: 1.75, K_FORWARD: 0.3, Q_WD: 0.0})
    best = base.with_overrides({Q_LR: 1.75, K_FORWARD: 0.3, Q_WD: 0.0})
    assert plan_run(apply_preset(base, tuned_preset(study.folder)), 64) == plan_run(best, 64)


def test_the_mean_over_seeds_decides_and_more_seeds_a_tie(study: Study) -> None:
    for seed, loss in ((0, 2.0), (1, 2.5)):  # the luckiest trial, 2.25 on average
        study.trial(loss, {Q_LR: 2.0}, seed=seed)
    for seed, loss in ((0, 2.25), (1, 2.125)):  # 2.1875
        study.trial(loss, {Q_LR: 0.5}, seed=seed)
    for seed, loss in ((0, 2.5), (1, 3.0)):
        study.trial(loss, {Q_LR: 1.0}, seed=seed)
    best = tuned(study)
    assert best.tuning is not None
    assert (best.lr[Role.Q_PROJ], best.tuning.best_loss, best.tuning.default_loss) == (0.5, 2.1875, 2.75)
    study.trial(2.1875, {Q_LR: 0.25}, seed=0)
    assert tuned(study).lr[Role.Q_PROJ] == 0.5  # two seeds
    for seed in (0, 1, 2):
        study.trial(2.1875, {Q_LR: 3.0}, seed=seed)
    assert tuned(study).lr[Role.Q_PROJ] == 3.0  # three


def test_a_trial_counts_when_it_completed_on_all_of_its_seeds(study: Study) -> None:
    study.plan(budget={"seeds_per_trial": 2})
    for seed, loss in ((0, 2.5), (1, 2.5)):
        study.trial(loss, {Q_LR: 1.0}, seed=seed)
    study.trial(2.0, {Q_LR: 2.0}, seed=0)  # its other seed has yet to run
    for seed, diverged in ((0, 1.0), (1, None)):
        study.trial(diverged, {Q_LR: 4.0}, seed=seed)
    tuning = tuned(study).tuning
    assert tuning is not None
    assert (tuning.best_loss, tuning.trials, tuning.runs, tuning.diverged) == (2.5, 3, 5, 1)


def test_fresh_seeds_alone_decide(study: Study) -> None:
    study.plan(budget={"seeds_per_trial": 2}, rerank={"best": 2, "seeds": [20, 21]})
    trials = {1.0: (2.5, 2.5), 2.0: (2.0, 2.0), 0.5: (2.2, 2.2), 4.0: (3.0, 3.0)}
    for value, losses in trials.items():
        for seed, loss in enumerate(losses):
            study.trial(loss, {Q_LR: value}, seed=seed)
    with pytest.raises(UserError, match="no trial of adamw has completed on all fresh seeds; resume the study"):
        tuned(study)
    # The best trial was lucky, and the default is better on these seeds than on its own.
    for value, losses in {2.0: (2.75, 2.25), 0.5: (2.25, 2.25), 1.0: (2.5, 2.25)}.items():
        for seed, loss in enumerate(losses, start=20):
            study.trial(loss, {Q_LR: value}, seed=seed)
    study.trial(1.0, {Q_LR: 3.0}, seed=20)  # not on all of them
    best = tuned(study)
    assert best.lr == {Role.Q_PROJ: 0.5}
    tuning = best.tuning
    assert tuning is not None
    assert (tuning.best_loss, tuning.default_loss) == (2.25, 2.375)
    assert (tuning.seeds, tuning.fresh_seeds, tuning.selected_on) == ([0, 1], [20, 21], [0, 1, 20, 21])
    assert (tuning.trials, tuning.runs, tuning.tokens) == (5, 15, 15 * 12_800)
    assert tuned_preset(study.folder).source.startswith(
        "Best of 5 trials of adamw, re-ranked on seeds 20, 21, in the tuning study tune, arm muP, on corpus"
    )


def test_a_preset_of_an_earlier_version_had_a_run_a_trial() -> None:
    tuning = load_preset("mup_tuning").optimizers["adamw"].tuning
    assert tuning is not None
    assert (tuning.trials, tuning.runs, tuning.fresh_seeds, tuning.selected_on) == (100, 100, [], [100])


@pytest.mark.parametrize(
    ("tier", "parts"), [("LR", {"lr"}), ("LRWD", {"lr", "weight_decay"}), ("FULL", {"lr", "weight_decay", "forward"})]
)
def test_what_the_tier_leaves_out_is_dropped(study: Study, tier: str, parts: set[str]) -> None:
    study.trial(2.1, {Q_LR: 2.0, Q_WD: 3.0, K_FORWARD: 0.5}, {"parametrization.tier": tier})
    # All that the lowest tier uses is 1: the default, as far as LR goes.
    study.trial(2.4, {Q_LR: 1.0, Q_WD: 3.0, K_FORWARD: 0.5}, {"parametrization.tier": tier})
    best = tuned(study)
    assert {part for part in ("forward", "lr", "weight_decay") if getattr(best, part)} == parts
    assert best.tuning is not None
    assert best.tuning.tier == tier
    assert best.tuning.default_loss == (2.4 if tier == "LR" else None)


def test_forward_multipliers_that_no_run_used_are_dropped(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0, K_FORWARD: 0.5}, {"multipliers": "vector"})
    assert (tuned(study).lr, tuned(study).forward) == ({Role.Q_PROJ: 2.0}, {})


def test_the_multipliers_of_a_preset_below_are_kept(study: Study) -> None:
    falcon = {"parametrization.preset": "falcon-h1-0.5b"}
    study.trial(2.1, {K_FORWARD: 0.5}, falcon)
    assert tuned(study).forward == dict(load_preset("falcon-h1-0.5b").forward) | {
        Role.EMBEDDING: 5.65685,  # six digits of 5.656854
        Role.DOWN_PROJ: 0.585938,  # and of 0.5859375
        Role.K_PROJ: 0.5,
    }


def test_numbers_have_six_digits(study: Study) -> None:
    study.trial(2.123456789, {Q_LR: 1.23456789, "optim.lr": 0.0123456789}, wall_seconds=1234.56789, tokens=123_456_789)
    best = tuned(study)
    assert best.lr == {Role.Q_PROJ: 1.23457}
    assert best.tuning is not None
    assert (best.tuning.best_loss, best.tuning.lr, best.tuning.seconds) == (2.12346, 0.0123457, 1234.57)
    assert best.tuning.flops == 7.40741e11  # 6 * 1000 * 123 456 789
    assert best.tuning.tokens == 123_456_789


def test_an_arm_is_named_when_there_are_several(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0}, {"parametrization.tier": "LR"}, arm="rates")
    study.trial(2.0, {Q_LR: 4.0}, arm="full")
    study.trial(1.9, {"optim.lr": 0.5}, arm="vectors")
    assert tuned(study, arm="rates").lr == {Role.Q_PROJ: 2.0}
    assert tuned_preset(study.folder, "rates").source.split(", ")[1] == "arm rates"
    assert tuned(study, arm="full").lr == {Role.Q_PROJ: 4.0}
    refused(study, None, "several arms were tuned; choose one with --arm: full, rates")
    for arm in ("vectors", "nothing"):
        refused(study, arm, f"no multipliers were tuned in an arm {arm}; --arm must be one of full, rates")


def refused(study: Study, arm: str | None, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        tuned_preset(study.folder, arm)
    assert str(caught.value) == f"{study.folder}: {complaint}"


def test_a_folder_without_records_is_refused(study: Study) -> None:
    refused(study, None, "no records of a study here; give the results folder of a tuning study")
    study.trial(2.1, {Q_LR: 2.0}, cell=None)  # a lone run
    refused(study, None, "no records of a study here; give the results folder of a tuning study")


def test_a_study_that_tunes_no_multiplier_is_refused(study: Study) -> None:
    study.trial(2.1, {"optim.lr": 0.5}, {Q_LR: 2.0})  # set for the arm, not searched
    complaint = "is not a tuning study: no trial set any of parametrization.forward, parametrization.lr, "
    refused(study, None, complaint + "parametrization.weight_decay")


def test_two_studies_are_refused(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0})
    cell = CellInfo(study="again", cell="c", arm="muP", sampler="tpe", factors={}, nuisance={Q_LR: 2.0})
    study.trial(2.1, {Q_LR: 2.0}, cell=cell)
    refused(study, None, "holds several studies (again, tune); give the folder of one")


def test_an_optimizer_without_a_completed_trial_is_refused(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0}, factors={"optimizer": "adamw"})
    study.trial(None, {Q_LR: 2.0}, factors={"optimizer": "muon"})
    study.trial(None, {Q_LR: 4.0}, factors={"optimizer": "muon"}, status="pruned")
    refused(study, None, "no trial of muon has completed; resume the study")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"settings": {"model.d_model": 32}}, "model.d_model: 64 -> 32"),
        ({"factors": {"model.n_layers": 2}}, "model.n_layers: 1 -> 2"),
        ({"corpus_hash": "other"}, "corpus: 'c0ffee' -> 'other'"),
    ],
)
def test_losses_that_do_not_compare_are_refused(study: Study, change: dict[str, Any], complaint: str) -> None:
    study.trial(2.1, {Q_LR: 2.0}, factors={"model.n_layers": 1})
    study.trial(2.2, {Q_LR: 1.0}, **{"factors": {"model.n_layers": 1}} | change)
    need = "a tuning study has one width and one corpus"
    refused(study, None, f"losses of adamw trials do not compare ({complaint}); {need}")


def test_widths_may_differ_between_arms(study: Study) -> None:
    study.trial(2.1, {Q_LR: 2.0})
    study.trial(2.1, {"optim.lr": 0.5}, {"model.d_model": 128}, arm="vectors")
    assert tuned(study).lr == {Role.Q_PROJ: 2.0}


def test_a_record_that_cannot_be_used_is_named(study: Study) -> None:
    study.trial(2.1, {"parametrization.lr.q_prj": 2.0})
    with pytest.raises(UserError, match=r"c01\.json: parametrization\.lr\.q_prj = 2\.0: the role must be one of"):
        tuned_preset(study.folder)


def test_neither_torch_nor_optuna_is_needed() -> None:
    code = "import sys, lit_mult.study.tuning; print(*{'torch', 'lightning', 'optuna'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""

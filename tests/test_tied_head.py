"""A tied LM head has the embedding's matrix, hence its lr and weight decay: factors of its own are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refusal
from test_parametrization import by_role, plan
from tiny_runs import MakeStudy, Tiny

from lit_mult.errors import ConfigError
from lit_mult.method.presets import load_preset
from lit_mult.registry.roles import Role
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep

SAID = "must be 1: a tied head (model.tie_embeddings) has the embedding's matrix and rates; 1 overrides a preset"
TIED = {"tie_embeddings": True}


@pytest.mark.parametrize("part", ["lr", "weight_decay"])
def test_a_factor_on_its_rates_is_refused(part: str) -> None:
    with refusal(kind=ConfigError) as caught:
        plan(parametrization={part: {"lm_head": 2.0}}, model=TIED)
    assert str(caught.value) == f"parametrization.{part}.lm_head = 2.0: {SAID}"

    plan(parametrization={part: {"lm_head": 2.0}})  # untied: a matrix of its own
    assert plan(parametrization={part: {"lm_head": 1.0}}, model=TIED) == plan(model=TIED)


def test_its_forward_factor_is_its_own() -> None:
    own = plan(32, {"forward": {"lm_head": 0.25}}, model=TIED, multipliers="fixed").matrices["lm_head"]
    assert own.constant == plan(32, model=TIED, multipliers="fixed").matrices["lm_head"].constant / 4


@pytest.mark.parametrize("own", [False, True], ids=["of a preset", "of the config"])
def test_the_tier_says_what_is_in_use(tmp_path: Path, own: bool) -> None:
    factors: dict[str, Any] = {"lr": {"lm_head": 1.0, "q_proj": 3.0}, "weight_decay": {"lm_head": 0.5}}
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump({"name": "mine", "source": "a test", **factors}))
    given = factors if own else {"preset": str(preset)}

    for tier in ("NONE", "LR"):
        plan(parametrization=given | {"tier": tier}, model=TIED)
    for tier in ("LRWD", "FULL"):
        with refusal("parametrization.weight_decay.lm_head = 0.5"):
            plan(parametrization=given | {"tier": tier}, model=TIED)


def test_a_presets_factor_is_overridden_by_1() -> None:
    tuned: dict[str, Any] = {"preset": "mup_tuning"}
    with refusal(f"parametrization.lr.lm_head = {load_preset('mup_tuning').optimizers['adamw'].lr[Role.LM_HEAD]}: "):
        plan(parametrization=tuned, model=TIED)
    plain = {"lr": {"lm_head": 1.0}, "weight_decay": {"lm_head": 1.0}}
    tied, untied = (by_role(plan(parametrization=tuned | plain, model=model)) for model in (TIED, {}))
    assert tied[Role.Q_PROJ] == untied[Role.Q_PROJ] != by_role(plan())[Role.Q_PROJ]


@pytest.mark.parametrize("command", [["parameters"], ["fit", "--out", "run"]], ids=lambda command: command[0])
def test_the_command_line_says_so_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny({"model.tie_embeddings": True}).to_dict()))
    line = refused(*command, "--config", "run.yaml", "--parametrization.lr", '{"lm_head": 2}')
    assert f"parametrization.lr.lm_head = 2.0: {SAID}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_search_offers_none(small_study_dict: MakeStudy) -> None:
    search = {"sampler": "tpe", "search_multipliers": True, "nuisance": {"optim.lr": [0.01, 0.02]}}
    search |= {"start": [{"optim.lr": 0.01}]}
    arms = {"untied": {"multipliers": "fixed"}, "tied": {"multipliers": "fixed", "model.tie_embeddings": True}}
    study = small_study_dict(arms=arms, budget={"steps": 6, "batch_size": 4, "trials": 4}, **search)

    untied, tied = StudySpec.from_dict(study).points()

    lost = {"parametrization.lr.lm_head", "parametrization.weight_decay.lm_head"}
    assert untied.nuisance.keys() - tied.nuisance.keys() == lost
    assert tied.start()[0].keys() == tied.nuisance.keys()
    assert "parametrization.forward.lm_head" in tied.nuisance


def test_a_study_is_refused_for_any_of_its_values_before_it_writes(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    nuisance = {"parametrization.lr.lm_head": [1, 2]}
    spec = StudySpec.from_dict(small_study_dict({"model.tie_embeddings": True}, nuisance=nuisance))
    with refusal("parametrization.lr.lm_head = 2.0: must be 1"):
        sweep(spec, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()

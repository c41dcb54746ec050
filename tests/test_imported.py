"""Optimizers of libraries by import path: what they train, that runs resume, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heavyball
import pytest
import torch
from foreign_models import foreign, token_ids
from refusals import refusal
from tiny_runs import MakeStudy, Tiny, weights
from torch import Tensor, nn

import lit_mult
from lit_mult.cli import main
from lit_mult.config import OptimConfig, RunConfig
from lit_mult.diagnostics.brownian import particles
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.method.plan import plan_run
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.registry.roles import HIDDEN_ROLES
from lit_mult.stacked.key import stack_key
from lit_mult.stacked.run import Member, run_stack
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.run import run

SOAP = "import:heavyball.SOAP"
STANDARD = {"parametrization.rule": "standard"}


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """heavyball compiles its formulas, which takes minutes."""
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)


def normal(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def test_torchs_adamw_trains_as_ours(tiny: Tiny, tmp_path: Path) -> None:
    extra = {"betas": [0.9, 0.95], "eps": 1e-8, "fused": True}
    theirs = tiny({**STANDARD, "optimizer": "import:torch.optim.AdamW", "optim.extra": extra})
    hidden = {matrix.optimizer for matrix in plan_run(theirs, 17).matrices.values() if matrix.role in HIDDEN_ROLES}
    assert hidden == {"import:torch.optim.AdamW"}
    run(theirs, tmp_path / "theirs")
    run(tiny(STANDARD), tmp_path / "ours")
    for name, value in weights(tmp_path / "ours").items():
        assert torch.equal(weights(tmp_path / "theirs")[name], value), name


def test_twenty_steps_are_those_of_the_library() -> None:
    ours, theirs = nn.Parameter(normal(99)), nn.Parameter(normal(99))
    group = {"params": [ours], "name": "w", "optimizer": SOAP, "lr": 0.02, "weight_decay": 0.1}
    settings = {"precondition_frequency": 3, "shampoo_beta": 0.9}
    optimizer = HybridOptimizer([group], OptimConfig(extra=settings))
    oracle = heavyball.SOAP([theirs], lr=0.02, weight_decay=0.1, **settings)
    for step in range(20):
        for parameter, own in ((ours, optimizer), (theirs, oracle)):
            parameter.grad = normal(step)
            own.step()
    assert torch.equal(ours, theirs)
    assert (ours - normal(99)).norm() > 0.1


@pytest.mark.parametrize(
    ("name", "precision"),
    [("heavyball.SOAP", "32-true"), ("heavyball.AdEMAMix", "32-true"), ("heavyball.AdEMAMix", "bf16-true")],
)
def test_a_stopped_run_goes_on_exactly(name: str, precision: str, tiny: Tiny, tmp_path: Path) -> None:
    """SOAP counts towards its next eigenbasis outside of the states of parameters, and stops here between two."""
    extra = {"optim.extra": {"precondition_frequency": 4}} if name == "heavyball.SOAP" else {}
    config = tiny(
        {**STANDARD, "optimizer": f"import:{name}", "multipliers": "vector", "trainer.precision": precision, **extra}
    )
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve
    assert whole.config["optimizer"] == f"import:{name}"
    for part, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "part")[part], value), part


def test_decay_rules_act_although_a_library_drops_the_gradients() -> None:
    """heavyball's steps set them to None."""
    ends = {}
    for name, extra in (("adamw", {}), ("import:heavyball.AdamW", {"betas": [0.9, 0.95]})):
        weight = nn.Parameter(normal(99))
        group = {"params": [weight], "name": "w", "optimizer": name, "lr": 0.02, "weight_decay": 0.5}
        optimizer = HybridOptimizer([group | {"decay_rule": "cautious"}], OptimConfig(extra=extra))
        for step in range(20):
            weight.grad = normal(step)
            optimizer.step()
        ends[name] = weight.detach()
    ours, theirs = ends.values()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_foreign_model_trains() -> None:
    model = lit_mult.add_multipliers(foreign("llama"), verbose=False)
    groups = lit_mult.build_param_groups(model, 0.01, optimizer=SOAP)
    assert {group["optimizer"] for group in groups} == {SOAP, "adamw"}
    optimizer, losses = HybridOptimizer(groups), []
    for _ in range(5):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with refusal(f"optimizer = '{SOAP}': has no width factor"):
        lit_mult.width_rules(model, foreign("llama", hidden_size=16), SOAP, verbose=False)


def test_a_study_and_its_report_name_it(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        {**STANDARD, "train.eval_every": 6},
        factors={"optimizer": ["muon", SOAP]},
        nuisance={"optim.lr": [0.01, 0.02]},
        budget={"steps": 12, "batch_size": 4},
    )
    sweep(StudySpec.from_dict(study), tmp_path / "out", workers=0)
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "vectors · SOAP (heavyball)" in (tmp_path / "out" / "report.md").read_text()
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert {record["config"]["optimizer"] for record in records} == {"muon", SOAP}


def test_arguments_count_in_the_hash(tiny_dict: Callable[..., dict[str, Any]]) -> None:
    plain, other = (tiny_dict({"optimizer": SOAP, "optim.extra": extra}) for extra in ({}, {"split": True}))
    assert RunConfig.from_dict(plain).hash != RunConfig.from_dict(other).hash
    assert "extra" not in RunConfig.from_dict(plain).hashed_fields()["optim"]


def test_names_are_known_but_not_listed() -> None:
    assert SOAP in OPTIMIZERS
    assert SOAP not in list(OPTIMIZERS)
    assert OPTIMIZERS[SOAP].label == "SOAP (heavyball)"
    for name in ("soap", "import:", "import:heavyball", "import:heavyball.", "import:a b.C", "heavyball.SOAP"):
        assert name not in OPTIMIZERS
        with pytest.raises(KeyError):
            OPTIMIZERS[name]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", "--optimizer", SOAP, "--parametrization.rule", "standard"]) == 0
    assert "import:heavyball.SOAP" in capsys.readouterr().out


class Odd(torch.optim.SGD):
    """Keeps a function in its groups."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__([group | {"rule": normal} for group in groups])


NOWHERE = "import:nowhere.Nothing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "muno"}, "optimizer = 'muno': must be one of adamw, muon"),
        ({"optimizer": "import:heavyball"}, "'import:heavyball': must be one of adamw, muon"),
        ({"optimizer": NOWHERE}, f"'{NOWHERE}': cannot be imported (No module named 'nowhere')"),
        (
            {"optimizer": "import:torch.optim.Adamw"},
            "imported (module 'torch.optim' has no attribute 'Adamw')",
        ),
        ({"optimizer": "import:torch.nn.Linear"}, "'import:torch.nn.Linear': is no torch.optim.Optimizer"),
        (
            {"optimizer": "import:test_imported.Odd"},
            "has a function in its groups (rule), which checkpoints",
        ),
        (
            {"optimizer": "import:torch.optim.LBFGS", "optim.weight_decay": 0.0},
            "'import:torch.optim.LBFGS': cannot make a step (",
        ),
        ({"optimizer": "import:torch.optim.Rprop"}, "has no weight_decay; set optim.weight_decay"),
        (
            {"optimizer": "import:torch.optim.SGD", "optim.extra": {"nope": 1}},
            "optim.extra = {'nope': 1}: SGD does not",
        ),
        ({"optimizer": SOAP, "optim.extra": {"lr": 1}}, "optim.extra.lr = 1: is set by optim.lr"),
        ({"optimizer": "muon", "optim.extra": {"eps": 1}}, "optim.extra = {'eps': 1}: is for import:MODULE.CLASS"),
        ({"optimizer": SOAP, "parametrization.rule": "mup"}, "has no width factor, which parametrization.rule = mup"),
        ({"optimizer": SOAP, "train.diagnostics": ["brownian"]}, "has no noise reference"),
        ({"optimizer": SOAP, "trainer.strategy": "fsdp2", "trainer.devices": 2}, "has no sharded form"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    changes: dict[str, Any], said: str, tiny_dict: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with refusal(said, kind=ConfigError):
        run(RunConfig.from_dict(tiny_dict({**STANDARD, **changes})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_study_with_what_cannot_be_trains_nothing(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    arms = {"plain": {}, "other": {"optimizer": NOWHERE}}
    study = small_study_dict(arms=arms)
    study["base"]["parametrization"] = {"rule": "standard"}
    with refusal(f"'{NOWHERE}': cannot be imported"):
        sweep(StudySpec.from_dict(study), tmp_path / "study", workers=0)
    assert not (tmp_path / "study").exists()


def test_stacks_and_noise_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({**STANDARD, "optimizer": SOAP})
    assert stack_key(config) is None
    with refusal(f"optimizer = '{SOAP}': has no stacked form"):
        run_stack([Member(config, tmp_path / "0")])
    with refusal(f"optimizer = '{SOAP}': has no noise reference"):
        particles(config, 17)

"""Tiny runs that train in a fraction of a second, on a text that the tests write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_mult.cli import main
from lit_mult.config import RunConfig, set_dotted
from lit_mult.study.spec import StudySpec

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network
# Tiny models gain nothing from threads, which moreover get in each other's way when tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

TINY: dict[str, Any] = {
    "model.d_model": 16,
    "model.n_layers": 1,
    "model.head_dim": 8,
    "parametrization.base_d_model": 8,
    "data.seq_len": 16,
    "data.val_windows": 4,
    "train.steps": 12,
    "train.batch_size": 4,
    "train.log_every": 2,
    "trainer.accelerator": "cpu",
    "trainer.progress_bar": False,
    "trainer.tensorboard": False,
}


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_MULT_CACHE", str(tmp_path_factory.getbasetemp() / "token-cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with something to learn: 400 lines of small sums."""
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("".join(f"{a} + {b} = {a + b}\n" for a in range(20) for b in range(20)))
    return path


@pytest.fixture
def tiny_dict(text_file: Path) -> Callable[..., dict[str, Any]]:
    """Nested plain values of a tiny run config with dotted overrides."""

    def make(overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for path, value in {**TINY, "data.corpus": str(text_file), **(overrides or {})}.items():
            set_dotted(data, path, value)
        return data

    return make


@pytest.fixture
def tiny(tiny_dict: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    """A tiny run config with dotted overrides."""
    return lambda overrides=None: RunConfig.from_dict(tiny_dict(overrides))


@pytest.fixture
def small_study_dict(tiny_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A study of 2 arms x 2 rates x 1 seed: 4 cells; with dotted overrides of its base, and other parts replaced."""

    def make(overrides: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        base = tiny_dict(overrides)
        del base["train"]["steps"], base["train"]["batch_size"]
        study = {
            "name": "tiny",
            "base": base,
            "arms": {"muP": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector"}},
            "nuisance": {"optim.lr": {"log2": [-8, -5]}},
            "seeds": [0],
            "budget": {"steps": 6, "batch_size": 4},
        }
        return study | changes

    return make


@pytest.fixture
def study_dict(small_study_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A study of 2 arms x 2 widths x 2 rates x 1 seed, and one untuned reference: 10 cells."""

    def make(**changes: Any) -> dict[str, Any]:
        study = small_study_dict(title="a tiny study", factors={"model.d_model": [8, 16]})
        study["arms"]["standard"] = {"parametrization.rule": "standard", "optim.lr": 0.001}
        del study["base"]["model"]["d_model"]
        return study | changes

    return make


@pytest.fixture
def precise_dict(small_study_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A study of 2 arms x 5 rates x 2 seeds (20 cells) that asks for a half width of 0.008 with at most 40 seeds."""

    def make(**changes: Any) -> dict[str, Any]:
        study = small_study_dict(
            nuisance={"optim.lr": {"log2": [-8, -7, -6, -5, -4]}},
            seeds=[0, 1],
            questions=[{"of": "vectors", "against": "muP"}],
            precision=0.008,
            budget={"steps": 6, "batch_size": 4, "seeds": 40},
        )
        return study | changes

    return make


@pytest.fixture
def spec(study_dict: Callable[..., dict[str, Any]]) -> StudySpec:
    """The study of `study_dict`, in a module that has one of its own that one."""
    return StudySpec.from_dict(study_dict())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives the command line bad input: exit code 2, and one line on stderr, which is returned."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return run

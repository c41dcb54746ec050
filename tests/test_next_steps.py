"""What a fit and a sweep say to do next: commands that run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_mult.cli import main
from lit_mult.cli.next_steps import after_sweep
from lit_mult.study.spec import StudySpec


def test_what_comes_next_runs(
    study_dict: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_dict(factors={"model.d_model": [8]}, keep_checkpoints=True)
    study["base"]["data"]["val_windows"] = 2
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(study["base"] | {"train": {"steps": 6, "batch_size": 4}}))

    def commands_after(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert main(list(arguments)) == 0
        return re.findall(r"^(?:next:)? +lit-mult (.*?) +# ", capsys.readouterr().err, re.M)

    after_study = commands_after(
        "sweep", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "a study"), "--workers", "0"
    )
    after_fit = commands_after("fit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "a run"))

    assert [command.split()[0] for command in after_study] == ["evaluate", "compare"]
    assert [command.split()[0] for command in after_fit] == ["report", "evaluate", "export"]
    for command in {*after_study, *after_fit}:
        arguments = shlex.split(command)
        longer = ["--max_length", "512", "--limit", "1"] if arguments[0] == "evaluate" else []
        assert main([*arguments, *longer]) == 0, command


def test_a_tuning_study_ends_with_its_preset(study_dict: Callable[..., dict[str, Any]]) -> None:
    tuned = {"sampler": "random", "search_multipliers": True, "budget": {"steps": 6, "batch_size": 4, "trials": 2}}
    spec = StudySpec.from_dict(study_dict(**tuned))
    assert [command for command, _ in after_sweep(spec, "out")] == ["lit-mult preset out --arm muP -o tuned.yaml"]

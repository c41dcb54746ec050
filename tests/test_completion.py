"""Completion in a shell: a script without Python in it, which knows commands, options, values and files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_mult.cli import COMMANDS, main

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
_TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); _shtab_lit_mult; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "lit-mult.bash"
    code = (
        "import sys; from lit_mult.cli import main; main(['completion', 'bash']);"
        "assert not {'torch', 'lightning', 'optuna', 'pandas'} & set(sys.modules)"
    )
    path.write_bytes(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    return path


@needs_bash
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["sw"], {"sweep"}),
        (["coord"], {"coord-check"}),
        (["fit", "--model.d"], {"--model.d_model", "--model.dropout"}),
        (["fit", "--multipliers", ""], {"none", "fixed", "scalar", "vector", "weight_norm", "softplus"}),
        (["fit", "--optimizer", "sph"], {"sphere"}),
        (["parameters", "--trainer.compile", ""], {"true", "false"}),
        (["parameters", "--parametrization.preset", "neu"], {"neutral"}),
        (["sweep", "pays_t"], {"pays_tuning"}),
        (["sweep", "quick", "--executor", "l"], {"local"}),
        (["export", "a", "b", "--dtype", ""], {"float32", "bfloat16"}),
        (["fit", "--config", "r"], {"run.yaml", "runs"}),
        (["report", "r"], {"runs"}),  # a folder, not a file
        (["preset", "runs", "-o", "r"], {"run.yaml", "runs"}),
        (["status", "--js"], {"--json"}),
    ],
)
def test_bash_offers(typed: list[str], offered: set[str], script: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    (tmp_path / "runs").mkdir()

    command = ["bash", "-c", _TRY, "bash", str(script), "lit-mult", *typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert set(done.stdout.split()) == offered


def test_what_asks_a_command_for_its_parser_cannot_be_typed(refused: Callable[..., str]) -> None:
    assert "unrecognized arguments: --describe" in refused("status", "".join(["--", "describe"]), "folder")


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in script] == []

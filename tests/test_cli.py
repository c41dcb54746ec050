"""The command line: help at once, one line and exit code 2 for bad input, and the whole way from study to report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_mult.cli import main
from lit_mult.config import RunConfig, flatten


@pytest.fixture
def config_file(tiny_dict: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_dict()))
    return path


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from lit_mult.cli import main; main(['--help']);"
        "heavy = {'torch', 'lightning', 'optuna', 'pandas', 'matplotlib', 'pydantic', 'jsonargparse', 'rich', 'shtab'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert all(re.search(rf"^  {command} ", done.stdout, re.M) for command in ("fit", "sweep", "report", "parameters"))


@pytest.mark.parametrize("command", ["--help", "completion bash"])
def test_a_reader_that_goes_away_ends_a_command_quietly(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "lit_mult", *command.split()], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, b"")  # 128 + SIGPIPE, as a shell reports it


def test_every_option_of_fit_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help"])

    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--multipliers", "--optim.vector_lr", "--data.corpus", "--trainer.precision", "--out"):
        assert option in shown
    options = re.split(r"\n(?=  --)", shown)[1:]
    assert len(options) > 50
    assert [
        one for one in options if re.fullmatch(r"  --\S+( \S+)?(\s+\((type|required|default).*)?\s*", one, re.S)
    ] == []


def test_print_config_prints_a_config_that_fit_takes(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config_file), "--multipliers", "vector", "--print_config"])
    assert exit_.value.code in (0, None)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)

    assert main(["fit", "--config", str(printed), "--train.steps", "4", "--out", str(tmp_path / "run")]) == 0

    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["config"]["multipliers"] == "vector"
    assert record["config"]["train"]["steps"] == 4
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit"], "the following arguments are required: --out"),
        (["preset"], "the following arguments are required: folder, --out"),
        (["fit", "--nonsense", "3"], "--nonsense"),
        (["fit", "--model.width", "3"], "--model.width"),
        (["fit", "--model.d_model", "-3"], "model.d_model: Input should be greater than 0"),
        (["fit", "--model.d_model", "100"], "model.d_model = 100: must be a multiple of model.head_dim"),
        (["fit", "--multipliers", "matrix"], "multipliers = 'matrix': must be one of none, fixed"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", "--data.corpus", "missing.txt"], "missing.txt: no such file"),
        (["fit", "--data.tokenizer", "bpe:12"], "data.tokenizer = 'bpe:12'"),
        (["fit", "--trainer.extra.foo", "3"], "trainer.extra.foo"),
        (
            ["fit", "--trainer.extra.gradient_clip_val", "1"],
            "trainer.extra.gradient_clip_val = 1: is set by optim.clip",
        ),
        (["fit", "--trainer.extra.devices", "2"], "is set by trainer.devices"),
        (["fit", "--trainer.extra.logger", "false"], "is set by trainer.tensorboard"),
        (["fit", "--trainer.extra.callbacks", "x"], "is set by lit_mult, and no field changes it"),
        (["fit", "--trainer.callbacks", "x"], "unrecognized arguments: --trainer.callbacks x\n"),
        (["fit", "--parametrization.preset", "nope"], "neutral"),
        (["parameters", "--optim.lr", "zero"], "optim.lr: Input should be a valid number, unable to parse string as a"),
        (["parameters", "--optim.lr", "2^9999"], "unable to parse string as a number, got 2^9999"),
        (["parameters", "--optim.clip", "2^x"], "unable to parse string as a number, or null, got 2^x"),
        (["parameters", "--train.eval_every", "x"], "train.eval_every: Expected a value of type int, or null, got x"),
        (["sweep", "nope"], "nope: no such file, nor a shipped study"),
        (["sweep", "quick", "--workers", "-1"], "--workers -1"),
        (["report", "missing"], "missing: no run records here"),
        (["train"], "no such command; there are fit, sweep, status, report, compare, evaluate, tasks, preset"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    needs_out = arguments[0] in ("fit", "sweep") and arguments != ["fit"]
    arguments = [*arguments, "--out", "out"] if needs_out else arguments

    assert said in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"\x00\x01\x02", "binary"), (b"short", "data.seq_len")])
def test_data_that_cannot_be_trained_on(content: bytes, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)

    assert said in refused("fit", "--data.corpus", str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_parameters_prints_a_row_for_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.n_layers", "1", "--model.d_model", "128", "--multipliers", "vector", "--optimizer", "muon"]

    assert main(["parameters", *arguments, "--parametrization.width_rule", "lr_wd"]) == 0

    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    # m = 128 / 32 = 4. Muon: lr / sqrt(4), weight decay * sqrt(4); the head under AdamW: lr / 4, weight decay * 4.
    assert rows["layers.0.self_attn.q_proj.weight"][1:7] == ["q_proj", "128x128", "row", "muon", "0.007812", "0.2"]
    assert rows["lm_head.weight"][1:7] == ["lm_head", "256x128", "-", "adamw", "0.003906", "0.4"]
    assert rows["layers.0.mlp.down_proj.weight"][3] == "row+column"
    assert rows["norm.weight"][1:6] == ["norm", "128", "adamw", "0.01", "0"]
    # lr * weight decay is 2^-6 * 0.1 for all: 640 steps, of which wsd has 300 - 30 - 50 = 220 at the peak rate.
    for name, row in rows.items():
        if name.endswith("_proj.weight") or name in ("embed_tokens.weight", "lm_head.weight"):
            assert row[-2:] == ["640", "0.344"], name
    assert rows["norm.weight"][-2:] == ["-", "-"]
    # 9 matrices, 3 norms, 11 multipliers, the heading, and the line at the end
    assert len(rows) == 9 + 3 + 11 + 2


@pytest.mark.parametrize("config", [{"optim": {"lr": "2^-7.5"}}, {"parametrization": {"lr": {"q_proj": "2^-1.5"}}}])
def test_powers_of_two_may_be_written_where_there_is_a_number(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    ((name, value),) = flatten(config).items()
    power = 2 ** float(value.removeprefix("2^"))
    shown = []
    for arguments in (["--config", str(tmp_path / "run.yaml")], [f"--{name}", value], [f"--{name}={power!r}"]):
        assert main(["parameters", *arguments, "--json"]) == 0
        shown.append(capsys.readouterr().out)

    assert shown[0] == shown[1] == shown[2]
    assert RunConfig.from_dict(config).hash == RunConfig().with_overrides({name: power}).hash


def test_parameters_for_programs_are_those_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "parameters --model.n_layers 1 --multipliers vector --optim.weight_decay_mode cautious".split()
    assert main(arguments) == 0
    *table, short = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["shortfall"].split() == short
    for row, shown in zip(found["parameters"], table[1:], strict=True):
        assert [row["name"], row["role"], "x".join(map(str, row["shape"]))] == shown[:3]
        assert f"{row['lr']:.4g}" in shown
        balance = {"equilibrium_steps": ",.0f", "decay_times": ".3g"}
        assert ["-" if row[key] is None else f"{row[key]:{style}}" for key, style in balance.items()] == shown[-2:]
    assert {row["decay_rule"] for row in found["parameters"]} == {"plain", "cautious"}


# At width 64 (m = 2) lr * weight decay of hidden matrices is 2^-7 * 0.1; of 4000 steps wsd has 4000 - 400 - 667 at the
# peak rate, which makes 2.29.
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "hidden matrices cannot reach the balance: lr * weight_decay * steps = 0.17, below 2 (220 steps at the "),
        (["--optim.weight_decay", "0"], "hidden matrices cannot reach the balance: lr * weight_decay * steps = 0, "),
        (["--train.steps", "4000"], ""),
        (
            ["--train.steps", "4000", "--parametrization.lr", '{"q_proj": 0.5, "up_proj": 0.25}'],
            "q_proj, up_proj cannot reach the balance: lr * weight_decay * steps = 0.57 to 1.1, below 2 (2933 steps",
        ),
        (["--optimizer", "hyperball"], ""),  # holds the norm of hidden matrices
    ],
)
def test_parameters_says_which_matrices_stay_short_of_the_balance(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parameters", *arguments]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(line or "lm_head.weight")


def test_parameters_shows_the_decay_of_multipliers_alike_in_both_modes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model.n_layers 1 --multipliers vector --optim.lr 0.1 --optim.weight_decay 0.01".split()
    shown = {}
    for mode in ("coupled", "independent"):
        assert main(["parameters", *arguments, "--optim.weight_decay_mode", mode]) == 0
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        shown[mode] = (rows["embed_tokens.row"][3:6], rows["embed_tokens.weight"][4:7])

    # the optimizer takes off lr * decay: 0.01 * 0.002 of the multipliers; 0.1 * 0.1 = 0.01 of an independent matrix
    assert shown["coupled"] == (["adamw", "0.01", "0.002"], ["adamw", "0.1", "0.01"])
    assert shown["independent"] == (["adamw", "0.01", "0.002"], ["adamw", "0.1", "0.1"])


def test_parameters_shows_what_a_depth_rule_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model.n_layers 8 --model.qk_norm true --optimizer muon --parametrization.depth_rule completep"
    assert main(["parameters", *arguments.split()]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["parameter"][-1] == "eps"
    # l = 8 / 2 = 4: branches by 1/4, and Adam's epsilon 1e-8 / 4 of what is not Muon's
    assert rows["layers.7.mlp.down_proj.weight"][3:5] == ["-", "*0.25"]
    assert rows["layers.7.self_attn.k_norm.weight"][1:5] == ["norm", "32", "adamw", "0.01"]
    names = ("layers.0.mlp.down_proj.weight", "layers.0.self_attn.q_norm.weight", "norm.weight", "lm_head.weight")
    assert [rows[name][-1] for name in names] == ["-", "2.5e-09", "-", "-"]

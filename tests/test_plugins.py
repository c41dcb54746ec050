"""A package of somebody else's that brings an optimizer and a kind by entry points, and what its entries leave out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SPEC = """
from dataclasses import replace

from lit_mult.registry.contracts import Kind
from lit_mult.registry.contracts import OptimizerSpec
from lit_mult.registry.roles import HIDDEN_ROLES

SIGN = OptimizerSpec("sign", "Sign descent", "signs of gradients", trains=HIDDEN_ROLES, build="tiny_plugin.update:Sign")
SCALED = replace(SIGN, name="scaled", width_factor=lambda matrix, base: base.d_in / matrix.d_in)
WRONG = "no entry at all"
EXP = Kind(
    "exponential", "exponential multipliers", "W exp(row)", axes=lambda table: table & {"row"}, forward="unused",
    formula="tiny_plugin.update:EXPONENTIAL", start=lambda axis, shape, init_std: 0.0, is_product=False,
)
"""
UPDATE = """
import torch
from lit_mult.nn.multipliers import Formula


class Sign(torch.optim.Optimizer):
    def __init__(self, groups, config):
        super().__init__(groups, {"lr": 1.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter *= 1 - group["lr"] * group["weight_decay"]
                parameter -= 0.1 * group["lr"] * parameter.grad.sign()


def effective_weight(weight, constant=1.0, scalar=None, row=None, column=None):
    return constant * weight if row is None else constant * row.exp()[..., None] * weight


EXPONENTIAL = Formula(effective_weight)
"""
RUN = """--model.d_model 16 --model.n_layers 1 --model.head_dim 8 --parametrization.base_d_model 8 --data.seq_len 16
--data.val_windows 4 --train.steps 4 --train.batch_size 4 --train.log_every 2 --trainer.accelerator cpu
--trainer.progress_bar false --trainer.tensorboard false"""
STANDARD = "--optimizer sign --parametrization.rule standard"


RUN_ALL = """
import contextlib, io, json, sys
from lit_mult.cli import main

done = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(arguments.split())
        except SystemExit as exit:  # of --help
            code = exit.code
    done.append((code, out.getvalue(), error.getvalue()))
print(json.dumps(done))
"""


@dataclass
class Done:
    """What became of a command."""

    code: int
    out: str
    error: str


class Installed:
    """The command line in a process in which the package is installed."""

    def __init__(self, folder: Path, text: Path, entry_points: str) -> None:
        package = folder / "tiny_plugin"
        package.mkdir()
        (package / "__init__.py").write_text(SPEC)
        (package / "update.py").write_text(UPDATE)
        info = folder / "tiny_plugin-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(entry_points)
        self.folder, self.text = folder, text

    def __call__(self, *commands: str) -> list[Done]:
        """Run commands one after the other in one process, which imports everything once."""
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run(
            [sys.executable, "-c", RUN_ALL],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert process.returncode == 0, process.stderr
        return [Done(*one) for one in json.loads(process.stdout.splitlines()[-1])]

    def run(self, command: str, options: str) -> str:
        """A command on a tiny run."""
        return " ".join(f"{command} {RUN} --data.corpus {self.text} {options}".split())


OWN = """
[lit_mult.optimizers]
sign = tiny_plugin:SIGN
scaled = tiny_plugin:SCALED
[lit_mult.kinds]
exponential = tiny_plugin:EXP
"""


@pytest.fixture
def installed(tmp_path: Path, text_file: Path) -> Installed:
    return Installed(tmp_path, text_file, OWN)


def one_line(done: Done, said: str) -> None:
    assert done.code == 2, done.error
    assert said in done.error
    assert done.error.count("\n") == 1


def test_a_run_with_both(installed: Installed, tmp_path: Path) -> None:
    run, help_text, shown = installed(
        installed.run("fit", f"{STANDARD} --multipliers exponential --out {tmp_path / 'a'}"),
        "parameters --help",
        installed.run("parameters", STANDARD),
    )
    assert run.code == 0, run.error
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["status"] == "completed"
    assert record["parameters"]["multipliers"] == 256 + 4 * 16 + 2 * 44 + 16  # rows of the full placement
    assert record["final_loss"] < record["initial_loss"]
    shown_help = " ".join(help_text.out.split())
    assert "; sign: signs of gradients; scaled: signs of gradients; import:MODULE.CLASS: an optimizer of" in shown_help
    assert "softplus,exponential}" in help_text.out
    assert shown.code == 0, shown.error
    assert "| adamw" not in shown.error


def test_the_entries_of_the_page_on_methods_are_found(tmp_path: Path, text_file: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "add_a_method.md").read_text()
    entries = re.findall(r'entry-points."(.*)"]\n(\w+) = "(.*)"', page)
    points = "".join(f"[{group}]\n{name} = {path}\n" for group, name, path in entries)
    installed = Installed(tmp_path, text_file, points)
    (tmp_path / "my_package.py").write_text("".join(re.findall(r"```python\n(.*?)```", page, re.S)))

    (done,) = installed("parameters --optimizer lion --multipliers row")

    assert done.code == 0, done.error
    rows = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert rows["layers.0.mlp.down_proj.weight"][3:5] == ["row", "lion"]
    assert "layers.0.mlp.down_proj.column" not in rows


def test_what_an_entry_leaves_out_is_one_line(installed: Installed, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    base = {"optimizer": "sign", "parametrization": {"rule": "standard"}, "data": {"corpus": str(installed.text)}}
    arms = {"arms": {"a": {}}, "seeds": [0], "budget": {"steps": 2, "batch_size": 2}}
    study.write_text(json.dumps({"name": "s", "base": base, **arms}))
    out = f"--out {tmp_path / 'out'}"
    refused = {
        installed.run("parameters", "--optimizer sign"): (
            "'sign': has no width factor, which parametrization.rule = mup needs; set parametrization.rule to standard"
        ),
        installed.run("parameters", f"{STANDARD} --parametrization.depth_rule completep"): (
            "'sign': has no such depth rule, which parametrization.depth_rule = completep needs"
        ),
        installed.run("coord-check", f"{STANDARD} --parametrization.rule mup"): "has no width factor",
        installed.run("coord-check", "--optimizer scaled --widths 16,24,32 --steps 1 --seeds 1"): (
            "'scaled': has no width exponent, which the coordinate check needs"
        ),
        installed.run("lint-placement", "--multipliers exponential"): (
            "is no product of multipliers and matrix, which"
        ),
        installed.run("fit", f"--multipliers exponential --train.diagnostics [symmetry] {out}"): (
            "is no product of multipliers and matrix"
        ),
        installed.run("fit", f"{STANDARD} --train.diagnostics [brownian] {out}"): (
            "'sign': has no noise reference, which the Brownian"
        ),
        f"sweep {study} --vectorize 2 {out}": "'sign': has no stacked form, which training runs together needs",
        f"brownian {tmp_path / 'a'}": "'sign': has no noise reference, which the Brownian reference",
    }
    finished, *refusals = installed(installed.run("fit", f"{STANDARD} --out {tmp_path / 'a'}"), *refused)
    assert finished.code == 0, finished.error
    for done, said in zip(refusals, refused.values(), strict=True):
        one_line(done, said)
    assert not (tmp_path / "out").exists()  # refused before the run, not after it


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("optimizer sign nowhere:SIGN", "cannot be loaded (No module named 'nowhere')"),
        ("optimizer sign tiny_plugin:WRONG", "is no OptimizerSpec of that name"),
        ("optimizer other tiny_plugin:SIGN", "is no OptimizerSpec of that name"),
        ("multipliers other tiny_plugin:EXP", "is no Kind of that name"),
    ],
)
def test_a_bad_entry_point_costs_its_entry_alone(tmp_path: Path, text_file: Path, point: str, said: str) -> None:
    field, name, path = point.split()
    group = {"optimizer": "lit_mult.optimizers", "multipliers": "lit_mult.kinds"}[field]
    installed = Installed(tmp_path, text_file, f"[{group}]\n{name} = {path}\n")
    (tmp_path / "run.yaml").write_text(f"{field}: {name}\n")
    others, *refused = installed(
        "parameters", f"parameters --{field} {name}", f"parameters --config {tmp_path / 'run.yaml'}"
    )
    assert (others.code, others.error) == (0, "")
    for done in refused:
        one_line(done, f"; entry point {group}:{name}: {said}\n")

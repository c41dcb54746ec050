"""Runs on several devices under FSDP2: the losses, the record and the checkpoints of one device."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsdp2_ranks as ranks
import pytest
import torch
import yaml
from conftest import TINY
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from tiny_runs import Tiny, weights
from torch import multiprocessing

from lit_mult.config import RunConfig, set_dotted
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import prepare
from lit_mult.data.module import TextDataModule
from lit_mult.schema import RunRecord
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import predict
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

SHARDED = {"trainer.devices": 2, "trainer.strategy": "fsdp2"}
CASES: dict[str, dict[str, Any]] = {
    "vectors, AdamW": {
        "multipliers": "vector",
        "optimizer": "adamw",
        "train.eval_every": 5,
        "model.qk_norm": True,
        "parametrization.depth_rule": "depth_mup",
    },
    # parameters () beside sharded ones, in the groups of norms and of multipliers
    "scalars, Muon": {
        "multipliers": "scalar",
        "placement.overrides": {"lm_head": "scalar+row"},
        "optimizer": "muon",
        "model.final_norm": "scalar",
        "trainer.accumulate_grad_batches": 2,
    },
    "tied vectors, Muon": {"multipliers": "vector", "optimizer": "muon", "model.tie_embeddings": True},
}
STOPPED = "scalars, Muon"


@dataclass
class Runs:
    folder: Path
    configs: dict[str, RunConfig]
    """Of one device."""

    def record(self, *parts: str) -> RunRecord:
        return RunRecord.read(self.folder.joinpath(*parts) / "record.json")


@pytest.fixture(scope="module")
def runs(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every case on one device and on two; and a run that was begun on one or on two and finished on two."""
    folder = tmp_path_factory.mktemp("runs")
    # Every step clips.
    shared = {"data.corpus": str(text_file), "data.cache_dir": str(folder), "train.log_every": 3, "optim.clip": 0.1}

    def config(overrides: dict[str, Any]) -> RunConfig:
        data: dict[str, Any] = {}
        for path, value in {**TINY, **shared, **overrides}.items():
            set_dotted(data, path, value)
        return RunConfig.from_dict(data)

    configs = {name: config(case) for name, case in CASES.items()}
    for name, one in configs.items():
        run(one, folder / "one" / name)
    ranks.begin(configs[STOPPED], folder / "from_one")
    sharded = {name: config(case | SHARDED).to_dict() for name, case in CASES.items()}
    multiprocessing.set_forkserver_preload([ranks.__name__])  # imports torch once, not in every process
    arguments = (find_free_network_port(), folder, sharded, STOPPED)
    multiprocessing.start_processes(ranks.work, arguments, nprocs=2, start_method="forkserver")
    return Runs(folder, configs)


def assert_alike(one: RunRecord, two: RunRecord, tolerance: float) -> None:
    for curve, expected in ((two.train_curve, one.train_curve), (two.val_curve, one.val_curve)):
        assert [step for step, _ in curve] == [step for step, _ in expected]
        losses = [loss for _, loss in expected]
        assert [loss for _, loss in curve] == pytest.approx(losses, rel=0, abs=tolerance)
        assert losses[0] - losses[-1] > 0.1


@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_the_losses_and_the_record_of_one(runs: Runs, case: str) -> None:
    one, two = runs.record("one", case), runs.record("two", case)
    assert_alike(one, two, 1e-5)
    for field in ("status", "parameters", "regime", "steps", "tokens", "device", "corpus_hash"):
        assert getattr(two, field) == getattr(one, field)


@pytest.mark.parametrize("case", CASES)
def test_their_checkpoint_is_the_file_that_one_device_writes(runs: Runs, case: str) -> None:
    paths = [RunFolder(runs.folder / devices / case).final_checkpoint for devices in ("one", "two")]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert two.keys() == one.keys()
    assert two["state_dict"].keys() == one["state_dict"].keys()
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)
    (own,), (expected,) = two["optimizer_states"], one["optimizer_states"]
    assert own["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(own["state"], expected["state"], rtol=0, atol=1e-5)
    assert paths[1].stat().st_size < 1.05 * paths[0].stat().st_size  # a tied matrix once


def test_a_stopped_run_resumes_on_two_devices_to_the_same_bits(runs: Runs) -> None:
    assert_alike(runs.record("two", STOPPED), runs.record("stopped"), 0)
    expected = weights(runs.folder / "two" / STOPPED)
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs.folder / "stopped").items())


def test_a_run_goes_on_on_another_number_of_devices(runs: Runs) -> None:
    assert RunFolder(runs.folder / "for_one").newest_checkpoint() is not None
    assert_alike(runs.record("one", STOPPED), run(runs.configs[STOPPED], runs.folder / "for_one"), 1e-5)
    assert_alike(runs.record("one", STOPPED), runs.record("from_one"), 1e-5)
    assert runs.record("from_one").config["trainer"]["devices"] == 2


def test_a_finished_run_is_that_of_its_devices(runs: Runs, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(runs.configs[STOPPED].to_dict()))
    line = refused("fit", "--config", str(tmp_path / "run.yaml"), "--out", str(runs.folder / "two" / STOPPED))
    assert "holds another run (trainer.devices: 2 -> 1; trainer.strategy: 'fsdp2' -> 'auto')" in line


def test_their_model_is_loaded_as_any_other(runs: Runs) -> None:
    trained = load_trained(runs.folder / "two" / STOPPED)
    windows_BT1 = torch.from_numpy(validation_windows(trained.corpus.val, 16, trained.config.data.val_windows))
    with torch.no_grad():
        _, loss = predict(trained.model, windows_BT1)
    assert float(loss) == pytest.approx(runs.record("two", STOPPED).final_loss, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_lightning_trains_a_foreign_model_as_on_one_device(runs: Runs, strategy: str, tmp_path: Path) -> None:
    """A model whose root is gathered when training begins, after the validation that comes before."""
    expected = ranks.foreign_losses(tmp_path, "auto", 1)
    assert len(expected) == ranks.FOREIGN_STEPS
    assert expected[0] - expected[-1] > 0.1
    for rank in range(2):
        found = torch.load(runs.folder / f"foreign.{rank}.pt")
        assert found[strategy] == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer.strategy": "fsdp"}, "trainer.strategy = 'fsdp': is not supported; use fsdp2"),
        ({"trainer.precision": "bf16-true"}, "trainer.precision = 'bf16-true': must be 32-true or bf16-mixed"),
        ({"trainer.precision": "16-mixed"}, "trainer.precision = '16-mixed': must be 32-true or bf16-mixed"),
        ({"trainer.compile": True}, "trainer.compile = True: does not compile sharded models"),
        ({"train.diagnostics": ["norms"]}, "train.diagnostics = 'norms': read whole parameters"),
        ({"optimizer": "hyperball"}, "optimizer = 'hyperball': has no sharded form, which trainer.strategy = fsdp2"),
        ({"optimizer": "muon-hyperball"}, "has no sharded form"),
        ({"optimizer": "muon-sphere"}, "has no sharded form"),
        ({"optimizer": "muown"}, "has no sharded form"),
        ({"optimizer": "normuon"}, "has no sharded form"),
        ({"train.batch_size": 3}, "train.batch_size = 3: must be a multiple of devices"),
    ],
)
def test_what_it_does_not_support_is_refused(
    changes: dict[str, Any], said: str, tiny: Tiny, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny(SHARDED | changes).to_dict()))
    assert said in refused("fit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("windows", [3, 4, 8, 9, 10])
def test_every_rank_validates_in_as_many_batches(tiny: Tiny, windows: int) -> None:
    config = tiny({"data.val_windows": windows})  # batches of at most 4
    module = TextDataModule(config, prepare(config.data))
    batches = []
    for rank in range(2):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        batches.append(list(module.val_dataloader()))
    assert len(batches[0]) == len(batches[1])
    assert all(0 < len(batch) <= 4 for rank in batches for batch in rank)
    served = torch.cat([batch for rank in batches for batch in rank])
    assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, module.val_windows.tolist()))


@pytest.mark.slow
def test_the_command_starts_its_processes_and_stops_and_resumes_with_them(tiny: Tiny, tmp_path: Path) -> None:
    long = tiny({"train.steps": 300, "train.checkpoint_every": 20, "multipliers": "scalar", **SHARDED})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(long.to_dict()))
    command = [sys.executable, "-m", "lit_mult", "fit", "--config", str(tmp_path / "run.yaml"), "--out"]
    started = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    while RunFolder(tmp_path / "out").newest_checkpoint() is None:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=120)
    stopped = re.search(
        r"stopped at step (\d+) of 300; to resume from there, give the same command again: lit-mult", said
    )
    assert started.returncode == 130
    assert stopped
    assert RunFolder(tmp_path / "out").newest_checkpoint() == RunFolder(tmp_path / "out").checkpoint(int(stopped[1]))

    for out in ("out", "whole"):
        subprocess.run([*command, str(tmp_path / out)], check=True, timeout=300)
    assert_alike(*(RunRecord.read(tmp_path / out / "record.json") for out in ("out", "whole")), 0)

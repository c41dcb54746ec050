"""Diagnostics in a run, which does not notice that it is watched."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from diagnostics_data import GROUPS, Values, rms, state, updates, values
from lightning import Callback
from tiny_runs import Tiny, die_at, stop_at
from torch import Tensor

import lit_mult
from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.diagnostics.groups.symmetry import coordinates
from lit_mult.diagnostics.recorder import Diagnostics
from lit_mult.errors import ConfigError, Interrupted, UserError
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import LitLlama
from lit_mult.training.run import run


class Spy(Callback):
    """Takes what diagnostics should see, in its own way: parameters at the start of every step, gradients, windows."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.windows: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self.windows.setdefault(trainer.global_step, []).append(batch.clone())
        self._keep(trainer.global_step, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.model.named_parameters()
        self.gradients[trainer.global_step] = {name: parameter.grad.clone() for name, parameter in named}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._keep(trainer.global_step, pl_module)

    def _keep(self, step: int, module: LitLlama) -> None:
        self.weights[step] = {name: weight.clone() for name, weight in module.model.state_dict().items()}


def taken(folder: Path, group: str, step: int) -> Values:
    frame = lit_mult.load_diagnostics(folder)
    rows = frame[(frame["group"] == group) & (frame["step"] == step)]
    assert not rows.duplicated(["name", "quantity"]).any()
    return {(row.name_, row.quantity): row.value for row in rows.rename(columns={"name": "name_"}).itertuples()}


WATCHED = {
    "multipliers": "vector",
    "optimizer": "muon",
    "train.diagnostics": GROUPS,
    "train.diagnostics_every": 5,
    "trainer.accumulate_grad_batches": 2,
    "model.z_loss": 1e-2,
    "optim.clip": 0.01,
}


def test_a_run_records_states_gradients_and_updates_of_the_right_steps(tiny: Tiny, tmp_path: Path) -> None:
    config, spy = tiny(WATCHED), Spy()
    run(config, tmp_path, callbacks=[spy])

    frame = lit_mult.load_diagnostics(tmp_path)
    assert list(frame.columns) == ["cell", "step", "group", "quantity", "name", "layer", "role", "value"]
    assert str(frame["layer"].dtype) == "Int64"
    assert set(frame["cell"]) == {"."}
    assert np.isfinite(frame["value"]).all()
    steps = {group: sorted(rows["step"].unique()) for group, rows in frame.groupby("group")}
    of_states = {group: [0, 5, 10, 12] for group in ("norms", "rows", "outputs", "symmetry", "brownian")}
    assert steps == of_states | {group: [0, 5, 10] for group in ("gradients", "updates", "noise")}

    module = LitLlama(config.to_dict(), 256)
    parts = {name.rpartition(".")[::2]: name for name, _ in module.model.named_parameters()}
    kinds = {pair: "norm" if "norm" in pair[0] else pair[1] for pair in parts}
    for step in (0, 5, 10, 12):
        module.model.load_state_dict(spy.weights[step])
        assert taken(tmp_path, "norms", step) == pytest.approx(state("norms", module.model))
        assert taken(tmp_path, "rows", step) == pytest.approx(state("rows", module.model))
        symmetry, probed = taken(tmp_path, "symmetry", step), taken(tmp_path, "outputs", step)
        residual = {key: value for key, value in probed.items() if key[1] == "residual_rms"}
        assert len(residual) == 2
        assert symmetry == pytest.approx(values(coordinates(module.model)) | residual)
    for step in (0, 5, 10):
        gradients = spy.gradients[step]
        wanted = {(pair[0], f"{kinds[pair]}_gradient_rms"): rms(gradients[name]) for pair, name in parts.items()}
        for what, names in (
            ("with", list(gradients)),
            ("without", [name for name in gradients if not name.endswith((".row", ".column"))]),
        ):
            total = sum(float(gradients[name].double().square().sum()) for name in names)
            wanted["model", f"gradient_norm_{what}_multipliers"] = math.sqrt(total)
        assert taken(tmp_path, "gradients", step) == pytest.approx(wanted, rel=1e-4)

        module.model.load_state_dict(spy.weights[step])
        moved = updates(module.model, partial(module.model.load_state_dict, spy.weights[step + 1]))
        assert taken(tmp_path, "updates", step) == pytest.approx(moved)
    assert taken(tmp_path, "updates", 5)["embed_tokens", "weight_update"] > 0


def test_outputs_are_read_on_fixed_validation_windows(tiny: Tiny, tmp_path: Path) -> None:
    from lit_mult.data.batches import validation_windows
    from lit_mult.data.cache import prepare

    config, spy = tiny({"train.diagnostics": ["outputs"], "train.diagnostics_every": 6}), Spy()
    run(config, tmp_path, callbacks=[spy])
    module = LitLlama(config.to_dict(), 256)
    windows = torch.from_numpy(validation_windows(prepare(config.data).val, 16, 4))  # a batch has four
    for step in (0, 6, 12):
        module.model.load_state_dict(spy.weights[step])
        assert taken(tmp_path, "outputs", step) == pytest.approx(state("outputs", module.model, windows[:, :-1]))


def test_noise_is_mccandlishs_estimate_from_the_batch_and_its_halves(tiny: Tiny, tmp_path: Path) -> None:
    config, spy = tiny(WATCHED | {"train.batch_size": 8, "train.diagnostics": ["noise"]}), Spy()
    run(config, tmp_path, callbacks=[spy])
    module = LitLlama(config.to_dict(), 256)

    def gradients(windows: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        logits = module.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        (loss + 1e-2 * logits.logsumexp(-1).square().mean()).backward()
        return {name: parameter.grad.double() for name, parameter in module.model.named_parameters()}

    for step in (0, 5, 10):
        module.model.load_state_dict(spy.weights[step])
        windows = torch.cat(spy.windows[step])
        assert len(windows) == 8
        whole, first, second = gradients(windows), gradients(windows[:4]), gradients(windows[4:])
        for name, gradient in whole.items():
            torch.testing.assert_close(spy.gradients[step][name].double(), gradient, rtol=1e-3, atol=1e-5)
        found = taken(tmp_path, "noise", step)
        assert len(found) == 3 * len(whole)
        for name in whole:
            big = float((whole[name] ** 2).sum())
            small = float((first[name] ** 2).sum() + (second[name] ** 2).sum()) / 2
            # arXiv:1812.06162 appendix A.1, B_big = 8 and B_small = 4
            signal = (8 * big - 4 * small) / (8 - 4)
            noise = (small - big) / (1 / 4 - 1 / 8)
            module_name, _, kind = name.rpartition(".")
            kind = "norm" if "norm" in module_name else kind
            tolerance = 1e-3 * small  # signal may nearly vanish
            assert found[module_name, f"{kind}_signal"] == pytest.approx(signal, abs=tolerance)
            assert found[module_name, f"{kind}_noise"] == pytest.approx(noise, abs=8 * tolerance)
            ratio = found[module_name, f"{kind}_signal"] / (found[module_name, f"{kind}_noise"] / 8)
            assert found[module_name, f"{kind}_snr"] == pytest.approx(ratio, rel=1e-4)


BUSY = {
    "multipliers": "vector",
    "optimizer": "muon",
    "model.dropout": 0.2,
    "train.eval_every": 3,
    "train.log_every": 1,
    "trainer.accumulate_grad_batches": 2,
}


def outcome(config: RunConfig, out: Path, **options: Any) -> tuple[Any, ...]:
    record = run(config, out, **options)
    state = torch.load(RunFolder(out).final_checkpoint, weights_only=True)
    optimizer = state["optimizer_states"][0]["state"]
    states = [value.tolist() for part in optimizer.values() for value in part.values()]
    weights = [weight.tolist() for weight in state["state_dict"].values()]
    return record.train_curve, record.val_curve, weights, states, state["callbacks"]["RngState"]["cpu"].tolist()


@pytest.fixture
def unwatched(tiny: Tiny, tmp_path: Path) -> tuple[Any, ...]:
    return outcome(tiny(BUSY), tmp_path / "unwatched")


def test_recording_changes_not_a_bit(tiny: Tiny, tmp_path: Path, unwatched: tuple[Any, ...]) -> None:
    for groups in ([group] for group in GROUPS):
        config = tiny(BUSY | {"train.diagnostics": groups, "train.diagnostics_every": 2})
        assert outcome(config, tmp_path / groups[0]) == unwatched, groups
        assert set(lit_mult.load_diagnostics(tmp_path / groups[0])["group"]) == set(groups)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_a_resumed_run_has_the_rows_of_an_unbroken_one(
    every: int, tiny: Tiny, tmp_path: Path, unwatched: tuple[Any, ...]
) -> None:
    config = tiny(BUSY | {"train.diagnostics": GROUPS, "train.diagnostics_every": every})
    assert outcome(config, tmp_path / "whole") == unwatched
    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(config, tmp_path / "parts", on_progress=stop_at(6))
    assert not RunFolder(tmp_path / "parts").diagnostics.exists()
    assert outcome(config, tmp_path / "parts") == unwatched
    whole, parts = (lit_mult.load_diagnostics(tmp_path / name) for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(parts, whole, check_exact=True)
    assert not whole.duplicated(["step", "group", "quantity", "name"]).any()


def test_a_killed_run_records_what_it_does_again_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(BUSY | {"train.diagnostics": ["norms", "updates"], "train.diagnostics_every": 2})
    config = config.with_overrides({"train.checkpoint_every": 4})
    run(config, tmp_path / "whole")
    with pytest.raises(KeyError):
        run(config, tmp_path / "parts", on_progress=die_at(7))
    run(config, tmp_path / "parts")
    whole, parts = (lit_mult.load_diagnostics(tmp_path / name) for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(parts, whole, check_exact=True)


def test_a_diverging_run_has_its_last_state(tiny: Tiny, tmp_path: Path) -> None:
    overrides = {"optim.lr": 1e4, "schedule.warmup_fraction": 0.0, "train.steps": 400, "optim.weight_decay": 0.0}
    record = run(tiny(overrides | {"train.diagnostics": ["norms"], "train.diagnostics_every": 300}), tmp_path)
    assert record.status == "diverged"
    assert sorted(lit_mult.load_diagnostics(tmp_path)["step"].unique()) == [0, record.steps]


def test_mixed_precision_is_watched_in_its_own_precision(tiny: Tiny, tmp_path: Path) -> None:
    mixed = {"trainer.precision": "bf16-mixed", "trainer.tensorboard": False}
    plain = run(tiny(mixed), tmp_path / "plain")
    watched = run(tiny(mixed | {"train.diagnostics": GROUPS, "train.diagnostics_every": 4}), tmp_path / "watched")
    assert watched.train_curve == plain.train_curve
    run(tiny({"train.diagnostics": ["outputs"], "train.diagnostics_every": 4}), tmp_path / "exact")
    there, exact = (taken(tmp_path / name, "outputs", 0) for name in ("watched", "exact"))
    assert there != exact
    assert there == pytest.approx(exact, rel=0.05)


# Folders, command line, bad input


def test_a_study_keeps_a_file_for_every_cell(study_dict: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    plain = study_dict(arms={"vectors": {"multipliers": "vector"}}, factors={"model.d_model": [8]})
    study = {**plain, "base": {**plain["base"], "train": {**plain["base"]["train"], "diagnostics": ["norms"]}}}
    sweep(StudySpec.from_dict(study), tmp_path / "a", workers=0)

    runs, readings = lit_mult.load_records(tmp_path / "a"), lit_mult.load_diagnostics(tmp_path / "a")
    assert sorted(readings["cell"].unique()) == sorted(runs["cell"])
    assert {path.stem for path in (tmp_path / "a" / "diagnostics").iterdir()} == set(runs["cell"])
    assert not list((tmp_path / "a" / "cells").iterdir())
    merged = readings.merge(runs[["cell", "lr"]], on="cell")
    assert len(merged) == len(readings)
    sweep(StudySpec.from_dict(plain), tmp_path / "a", workers=0)  # it is the same study


def test_the_command_line_has_short_names(tiny: Tiny, tmp_path: Path, refused: Callable[..., str]) -> None:
    part = tmp_path / "part.yaml"
    part.write_text(yaml.safe_dump(tiny({"train.steps": 4}).to_dict()))
    common = ["fit", "--config", str(part), "--out"]
    assert main([*common, str(tmp_path / "a"), "--diagnostics", "norms,outputs", "--every", "2"]) == 0
    long = ["--train.diagnostics", "[norms,outputs]", "--train.diagnostics_every", "2"]
    assert main([*common, str(tmp_path / "b"), *long]) == 0
    a, b = (lit_mult.load_diagnostics(tmp_path / name) for name in "ab")
    assert sorted(a["step"].unique()) == [0, 2, 4]
    pd.testing.assert_frame_equal(a, b)

    for flags, said in (
        (["--diagnostics", "norms,nrms"], "train.diagnostics.1 = 'nrms': input should be 'brownian', 'gradients', "),
        (["--every", "0"], "train.diagnostics_every = 0: input should be greater than 0"),
    ):
        assert said in refused(*common, str(tmp_path / "c"), *flags)
    assert not (tmp_path / "c").exists()


def test_noise_needs_a_batch_with_two_halves_in_one_process(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size = 3: must be even: the diagnostic noise halves it"):
        tiny({"train.batch_size": 3, "train.diagnostics": ["noise"]})
    tiny({"train.batch_size": 3, "train.diagnostics": ["norms"]})
    config = tiny({"train.diagnostics": ["noise"]})
    with pytest.raises(ConfigError, match=r"train.diagnostics = .*: noise halves the batch of one process"):
        Diagnostics(config, torch.zeros(1, 1)).check(processes=2)


def test_pyarrow_is_missed_before_training(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'lit-mult\[data\]'"):
        run(tiny({"train.diagnostics": ["norms"]}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    run(tiny({"train.steps": 1}), tmp_path / "a")


def test_what_is_recorded_cannot_change_on_the_way(tiny: Tiny, tmp_path: Path) -> None:
    watched = {"train.checkpoint_every": 4, "train.diagnostics": ["norms"], "train.diagnostics_every": 3}
    for name, first, then, said in (
        ("a", {}, {"train.diagnostics_every": 2}, "has recorded norms every 3 steps, not norms every 2 steps"),
        ("b", {"train.diagnostics": []}, {}, "has recorded nothing, not norms every 3 steps"),
    ):
        with pytest.raises(KeyError):
            run(tiny(watched | first), tmp_path / name, on_progress=die_at(6))
        with pytest.raises(UserError, match=said):
            run(tiny(watched | then), tmp_path / name)
    run(tiny({"train.steps": 1}), tmp_path / "c")
    with pytest.raises(UserError, match=r"has finished without train.diagnostics; name a new folder"):
        run(tiny({"train.steps": 1, "train.diagnostics": ["norms"]}), tmp_path / "c")


def test_folders_without_diagnostics_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no diagnostics here; ask for them with"):
        lit_mult.load_diagnostics(tmp_path)
    (tmp_path / "diagnostics.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(UserError, match=r"diagnostics\.parquet: cannot be read"):
        lit_mult.load_diagnostics(tmp_path)
    pd.DataFrame({"step": [1]}).to_parquet(tmp_path / "diagnostics.parquet")
    with pytest.raises(UserError, match=r"diagnostics\.parquet: damaged, its columns are step"):
        lit_mult.load_diagnostics(tmp_path)

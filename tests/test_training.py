"""One run, end to end on a tiny text: records, exact resume, divergence, Trainer flags, what lies in the folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import Tiny, die_at, stop_at, weights

from lit_mult.config import RunConfig
from lit_mult.data.batches import validation_windows
from lit_mult.errors import Interrupted, UserError
from lit_mult.schema import RunRecord
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import predict
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained


def test_a_run_learns_and_leaves_a_full_record(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"train.steps": 40, "train.eval_every": 20, "multipliers": "vector"})

    record = run(config, tmp_path / "a")

    assert record == RunRecord.read(tmp_path / "a" / "record.json")
    assert record.status == "completed"
    assert RunConfig.from_dict(record.config) == config
    assert record.config_hash == config.hash
    # Uniform over 256 bytes is log 256 = 5.5 nats; sums use a dozen characters.
    assert record.initial_loss > 5 > 3.5 > record.final_loss == record.best_loss
    assert [step for step, _ in record.val_curve] == [0, 20, 40]
    assert [step for step, _ in record.train_curve] == list(range(2, 41, 2))
    assert record.steps == 40
    assert record.tokens == 40 * 4 * 16
    # d = 16, F = 44: row + column of embedding, q k v rows, o row + column, gate and up rows, down row + column.
    assert record.parameters["multipliers"] == (256 + 16) + 3 * 16 + 2 * 16 + 2 * 44 + (16 + 44)
    # matrices 4 d^2 + 3 d F, three norms, multipliers, embedding and head
    assert record.parameters["total"] == 4 * 16**2 + 3 * 16 * 44 + 3 * 16 + record.parameters["multipliers"] + 2 * 4096
    assert len(record.corpus_hash) == 16
    # A byte is a token; the one separator, a token of no bytes, adds half a percent on so short a text.
    assert record.final_bits_per_byte == pytest.approx(record.final_loss / 0.693147, rel=6e-3)


def test_the_last_step_is_validated_even_between_two_evaluations(tiny: Tiny, tmp_path: Path) -> None:
    record = run(tiny({"train.eval_every": 5}), tmp_path)

    assert [step for step, _ in record.val_curve] == [0, 5, 10, 12]
    assert record.final_loss == record.val_curve[-1][1]


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer": "adamw", "multipliers": "none", "model.qk_norm": True},
        {"optimizer": "muon", "multipliers": "vector", "model.dropout": 0.2},
        {"optimizer": "adamw", "multipliers": "vector", "train.eval_every": 3},
        {"optimizer": "adamw", "multipliers": "vector", "parametrization.depth_rule": "completep", "optim.eps": 1e-3},
        {"optimizer": "muon", "multipliers": "scalar", "trainer.accumulate_grad_batches": 2, "train.eval_every": 4},
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_very_same_bits(
    tiny: Tiny, tmp_path: Path, overrides: dict[str, Any], number: signal.Signals
) -> None:
    config = tiny(overrides)
    whole = run(config, tmp_path / "whole")

    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(config, tmp_path / "parts", on_progress=stop_at(6, number))
    assert not (tmp_path / "parts" / "record.json").exists()
    parts = run(config, tmp_path / "parts")

    assert parts.train_curve == whole.train_curve
    assert parts.val_curve == whole.val_curve
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())


@pytest.mark.parametrize("overrides", [{}, {"optimizer": "muon", "multipliers": "vector", "optim.eps": 1e-3}])
def test_at_base_depth_a_depth_rule_trains_to_the_very_same_bits(
    tiny: Tiny, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    rules = [{}, *({"parametrization.depth_rule": rule} for rule in ("completep", "depth_mup"))]
    for index, rule in enumerate(rules):
        run(tiny({"train.steps": 5, "parametrization.base_n_layers": 1, **overrides, **rule}), tmp_path / str(index))
    first, *others = (weights(tmp_path / str(index)) for index in range(3))
    assert all(torch.equal(tensor, first[name]) for other in others for name, tensor in other.items())


@pytest.mark.parametrize("eval_every", [None, 2, 3, 4, 5])
def test_a_killed_run_goes_on_from_its_periodic_checkpoint(tiny: Tiny, tmp_path: Path, eval_every: int | None) -> None:
    config = tiny({"train.checkpoint_every": 4, "train.eval_every": eval_every, "multipliers": "vector"})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyError):
        run(config, tmp_path / "parts", on_progress=die_at(10))
    assert RunFolder(tmp_path / "parts").newest_checkpoint() == tmp_path / "parts" / "checkpoints" / "step=8.ckpt"
    seen: list[int] = []
    parts = run(config, tmp_path / "parts", on_progress=lambda step, loss: seen.append(step))

    assert seen == [10, 12]
    assert parts.train_curve == whole.train_curve
    assert parts.val_curve == whole.val_curve
    assert [path.name for path in RunFolder(tmp_path / "parts").checkpoints.iterdir()] == ["final.ckpt"]


def test_weights_are_kept_on_the_way(tiny: Tiny, tmp_path: Path) -> None:
    keeping = tiny({"train.keep_every": 4, "train.eval_every": 8})
    assert keeping.hash == tiny({"train.eval_every": 8}).hash
    run(keeping, tmp_path / "a")
    run(tiny({"train.eval_every": 8}), tmp_path / "b")
    folder = RunFolder(tmp_path / "a")
    names = {path.name for path in folder.kept_checkpoint(4).parent.iterdir()}
    assert names == {"step=4.ckpt", "step=8.ckpt"}  # 12 is the end
    kept = torch.load(folder.kept_checkpoint(4), weights_only=True)
    assert kept["global_step"] == 4
    assert "optimizer_states" not in kept
    assert RunFolder(tmp_path / "b").checkpoints.joinpath("kept").exists() is False
    states = [
        torch.load(path, weights_only=True)["state_dict"]
        for path in (folder.kept_checkpoint(4), folder.final_checkpoint)
    ]
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_run_is_not_run_again(tiny: Tiny, tmp_path: Path) -> None:
    first = run(tiny(), tmp_path)

    def fail(step: int, loss: float) -> None:
        raise AssertionError("trained again")

    assert run(tiny(), tmp_path, on_progress=fail) == first


def test_a_diverging_run_stops_early_with_a_record(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optim.lr": 1e4, "schedule.warmup_fraction": 0.0, "train.steps": 400, "optim.weight_decay": 0.0})

    record = run(config, tmp_path)

    assert record.status == "diverged"
    assert record.final_loss is None
    assert record.final_bits_per_byte is None
    assert record.steps < 400
    assert record.best_loss <= record.initial_loss


def test_a_loss_that_is_not_a_number_is_a_divergence(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    from lit_mult.training.module import LitLlama

    real = LitLlama.training_step

    def poisoned(self: LitLlama, window: torch.Tensor, index: int) -> torch.Tensor:
        if self.global_step == 5:
            with torch.no_grad():
                self.model.norm.weight.fill_(float("nan"))
        return real(self, window, index)

    monkeypatch.setattr(LitLlama, "training_step", poisoned)

    record = run(tiny(), tmp_path)

    assert (record.status, record.steps) == ("diverged", 6)
    assert [step for step, _ in record.train_curve] == [2, 4]  # NaN has no place in JSON


def test_arms_share_data_and_initialization(tiny: Tiny, tmp_path: Path) -> None:
    # Until the first update of a multiplier the arms are the same model on the same batches.
    overrides = {"train.log_every": 1, "train.steps": 3, "schedule.warmup_fraction": 0.0}
    curves = [run(tiny(overrides | {"multipliers": kind}), tmp_path / kind) for kind in ("none", "fixed", "vector")]

    assert len({record.train_curve[0][1] for record in curves}) == 1
    assert len({record.initial_loss for record in curves}) == 1
    assert curves[0].train_curve == curves[1].train_curve  # the neutral preset's fixed multipliers are 1
    assert curves[0].train_curve[2] != curves[2].train_curve[2]


def test_accumulation_changes_rounding_only(tiny: Tiny, tmp_path: Path) -> None:
    whole = run(tiny(), tmp_path / "whole")
    halves = run(tiny({"trainer.accumulate_grad_batches": 2}), tmp_path / "halves")

    assert halves.steps == whole.steps
    losses = [loss for _, loss in whole.train_curve]
    assert [loss for _, loss in halves.train_curve] == pytest.approx(losses, rel=1e-4)


def test_trainer_flags_reach_lightning(tiny: Tiny, tmp_path: Path) -> None:
    exact = run(tiny(), tmp_path / "fp32")
    mixed = run(tiny({"trainer.precision": "bf16-mixed", "trainer.extra.detect_anomaly": True}), tmp_path / "bf16")

    assert mixed.final_loss != exact.final_loss
    assert mixed.final_loss == pytest.approx(exact.final_loss, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"trainer.extra.foo": 1}, "trainer.extra.foo = 1: not an argument of lightning.Trainer"),
        ({"trainer.extra.max_steps": 1}, "is set by train.steps"),
        ({"trainer.extra.precision": 16}, "is set by trainer.precision"),
        ({"trainer.accelerator": "abacus"}, "trainer: "),
        ({"trainer.precision": "3-bit"}, "trainer: "),
        ({"trainer.devices": 0}, "trainer: "),
        ({"trainer.extra.profiler": "nope"}, "trainer: "),
        ({"trainer.devices": 3}, "train.batch_size = 4: must be a multiple of devices"),
        ({"trainer.strategy": "ddp_spawn"}, "trainer.strategy = 'ddp_spawn'"),
        ({"data.seq_len": 100_000}, "data.seq_len"),
        ({"data.corpus": "/no/such/file"}, "no such file"),
        ({"parametrization.preset": "nope"}, "parametrization.preset"),
        ({"multipliers": "vector", "placement.overrides": {"lm_haed": "row"}}, "matches no matrix"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, overrides: dict[str, Any], said: str
) -> None:
    with refusal(said):
        run(tiny(overrides), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(), tmp_path / "run")
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match=r"holds another run \(seed: 0 -> 1\)"):
        run(tiny({"seed": 1}), tmp_path / "run")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run(tiny(), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(tiny(), tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot be written"):
        run(tiny(), Path("/proc/lit-mult"))


def test_tensorboard_holds_losses_rates_gradient_norms_and_final_metrics(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny({"trainer.tensorboard": True, "multipliers": "vector", "optimizer": "muon"}), tmp_path)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "grad_norm/with_multipliers", "grad_norm/without_multipliers"} <= tags
    assert {"final_loss", "best_loss"} <= tags
    rates = [tag for tag in tags if tag.startswith("lr-")]
    assert any("multiplier" in tag for tag in rates)
    assert any("q_proj" in tag for tag in rates)
    pairs = zip(
        events.Scalars("grad_norm/with_multipliers"), events.Scalars("grad_norm/without_multipliers"), strict=True
    )
    assert all(everything.value > part.value for everything, part in pairs)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tiny: Tiny, tmp_path: Path) -> None:
    one = run(tiny(), tmp_path / "one")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny().to_dict()))
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--out", str(tmp_path / "two")]
    command = [sys.executable, "-m", "lit_mult", "fit", "--config", str(tmp_path / "run.yaml"), *flags]
    subprocess.run(command, check=True, timeout=300)

    two = RunRecord.read(tmp_path / "two" / "record.json")
    assert [loss for _, loss in two.train_curve] == pytest.approx([loss for _, loss in one.train_curve], rel=1e-4)
    assert two.final_loss == pytest.approx(one.final_loss, rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tiny: Tiny, tmp_path: Path) -> None:
    eager = run(tiny({"multipliers": "vector"}), tmp_path / "eager")
    compiled = run(tiny({"multipliers": "vector", "trainer.compile": True}), tmp_path / "compiled")

    assert compiled.final_loss == pytest.approx(eager.final_loss, rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


def test_a_run_on_another_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} is {n * n}\n" for n in range(900)))
    config = tiny({"data.corpus": str(text)})
    with pytest.raises(Interrupted):
        run(config, tmp_path / "out", on_progress=stop_at(6))

    text.write_text("".join(f"{n} is {n + n}\n" for n in range(900)))

    with pytest.raises(UserError, match=r"holds another run \(corpus_hash"):
        run(config, tmp_path / "out")


def test_a_loss_that_is_not_a_number_from_the_start_is_a_record(tiny: Tiny, tmp_path: Path) -> None:
    preset = tmp_path / "huge.yaml"
    preset.write_text("{name: huge, source: a test, forward: {embedding: 1.0e+39}}")  # beyond float32

    record = run(tiny({"multipliers": "fixed", "parametrization.preset": str(preset)}), tmp_path / "out")

    assert (record.status, record.initial_loss, record.final_loss, record.best_loss) == ("diverged", None, None, None)


def test_a_torn_checkpoint_is_passed_over_and_a_damaged_config_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tiny(), tmp_path / "out", on_progress=stop_at(6))
    checkpoint = RunFolder(tmp_path / "out").checkpoint(6)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])

    whole = run(tiny(), tmp_path / "whole")
    assert run(tiny(), tmp_path / "out").train_curve == whole.train_curve

    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        run(tiny(), tmp_path / "out")


def test_a_run_killed_while_it_claimed_its_folder_can_be_started_again(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / ".config.json.0a1b").write_text('{"config": {"mod')

    assert run(tiny(), tmp_path).status == "completed"
    assert not list(tmp_path.glob(".config.json*"))


def test_windows_weigh_alike_in_a_last_batch_that_is_smaller(tiny: Tiny, tmp_path: Path) -> None:
    """By hand, and in a stack."""
    changes = {"data.val_windows": 5, "train.batch_size": 4, "train.steps": 2}
    record = run(tiny(changes), tmp_path / "alone")
    members = [Member(tiny(changes | {"seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    stacked = run_stack(members)[0]
    trained = load_trained(tmp_path / "alone")
    windows = torch.from_numpy(validation_windows(trained.corpus.val, trained.config.data.seq_len, 5))
    with torch.no_grad():
        losses = [float(predict(trained.model, window[None])[1]) for window in windows]
    assert len(losses) == 5
    assert record.final_loss == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert stacked.final_loss == pytest.approx(record.final_loss, abs=1e-5)

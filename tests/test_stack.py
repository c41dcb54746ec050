"""A stack against its members trained one by one: losses, weights, ends, checkpoints; in float64 arithmetic or float32.

Member and run differ by rounding only: products of a batch of matrices are summed in another order. Over the few dozen
steps here that stays below 1e-4 nats.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import initialized
from study_data import job_of
from tiny_runs import MakeStudy, Tiny, die_at, stop_at, weights

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted
from lit_mult.layout import find_records
from lit_mult.nn.llama import Llama
from lit_mult.schema import RunRecord
from lit_mult.stacked.model import member_state, stack
from lit_mult.stacked.optimizer import StackedOptimizer
from lit_mult.stacked.run import Member, run_stack
from lit_mult.study.spec import StudySpec
from lit_mult.study.stack import run_jobs
from lit_mult.study.sweep import sweep
from lit_mult.training import history
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import LitLlama
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

TOLERANCE = 1e-4

DIFFERENT = [
    {"seed": 0, "optim.lr": 0.01},
    {"seed": 1, "optim.lr": 0.02, "optim.clip": 0.1, "optim.clip_multipliers": True},
    {"seed": 0, "optim.lr": 0.005, "optim.clip": None, "optim.weight_decay": 0.5, "schedule.name": "cosine"},
    {
        "seed": 2,
        "optim.multiplier_lr": 0.03,
        "model.z_loss": 0.01,
        "parametrization.forward": {"o_proj": 0.5, "lm_head": 2},
        "parametrization.depth_rule": "completep",
        "parametrization.base_n_layers": 4,
    },
]
"""What may differ between members."""

WILD = {"optim.lr": 1e3, "schedule.warmup_fraction": 0.0, "optim.weight_decay": 0.0}
"""Diverges within a few steps."""

SHARED: dict[str, dict[str, Any]] = {
    "AdamW, vectors, two layers": {"multipliers": "vector", "model.n_layers": 2, "optim.eps": 1e-3},
    "Muon, scalars, grouped queries": {
        "optimizer": "muon",
        "multipliers": "scalar",
        "model.num_key_value_groups": 2,
        "parametrization.base_d_model": 16,
    },
    "Muon, vectors, preset starts": {"optimizer": "muon", "multipliers": "vector", "placement.init": "preset"},
    "Muon, Polar Express": {"optimizer": "muon", "optim.muon_coefficients": "polar_express"},
    "fixed multipliers, tied": {"multipliers": "fixed", "model.tie_embeddings": True},
    "spheres, two layers": {"optimizer": "sphere", "multipliers": "vector", "model.n_layers": 2},
    "spheres by row, Muon": {"optimizer": "muon-sphere", "optim.sphere": "row", "multipliers": "softplus"},
    "Hyperball by row": {"optimizer": "hyperball", "optim.sphere": "row"},
    "Hyperball, Muon, Polar Express": {
        "optimizer": "muon-hyperball",
        "model.n_layers": 2,
        "optim.muon_coefficients": "polar_express",
    },
    "norms of queries and keys": {"multipliers": "vector", "model.qk_norm": True},
    "scalar norm": {"multipliers": "fixed", "model.final_norm": "scalar", "model.block_norms": "frozen"},
}


def configs(tiny: Tiny, shared: dict[str, Any], different: list[dict[str, Any]] = DIFFERENT) -> list[RunConfig]:
    return [tiny({"train.steps": 24, **shared, **own}) for own in different]


def members(configs: list[RunConfig], folder: Path) -> list[Member]:
    return [Member(config, folder / str(index)) for index, config in enumerate(configs)]


def assert_like(record: RunRecord, alone: RunRecord, rel: float = 1e-5) -> None:
    """A member's record is that of the run by itself, losses up to rounding, which a run that diverges blows up."""
    own = {"train_curve", "val_curve", "initial_loss", "final_loss", "best_loss", "final_bits_per_byte"}
    own |= {"started_at", "wall_seconds", "tokens_per_second", "members"}
    assert record.model_dump(exclude=own) == alone.model_dump(exclude=own)
    for name in ("train_curve", "val_curve"):
        mine, theirs = getattr(record, name), getattr(alone, name)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], abs=TOLERANCE, rel=rel)
    assert (record.final_loss is None) == (alone.final_loss is None)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_members_train_as_they_would_alone(tiny: Tiny, tmp_path: Path, shared: dict[str, Any]) -> None:
    of_all = configs(tiny, {"train.eval_every": 8, **shared})
    alone = [run(config, tmp_path / "alone" / str(index)) for index, config in enumerate(of_all)]

    records = run_stack(members(of_all, tmp_path / "stack"))

    assert len({record.final_loss for record in alone}) == len(alone)  # the members are different runs
    for index, (record, single) in enumerate(zip(records, alone, strict=True)):
        assert_like(record, single)
        assert (record.members, single.members) == (4, 1)
        assert RunRecord.read(tmp_path / "stack" / str(index) / "record.json") == record
        mine, theirs = weights(tmp_path / "stack" / str(index)), weights(tmp_path / "alone" / str(index))
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=2e-3, msg=name)
        load_trained(tmp_path / "stack" / str(index))


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in training, at the last step": ({"train.steps": 4, "train.log_every": 4, "train.eval_every": 20}, WILD),
    "in training, where a validation follows": ({"train.log_every": 4, "train.eval_every": 4}, WILD),
    "in the last validation": ({"train.log_every": 20, "train.eval_every": 20}, WILD),
    "in a validation on the way": ({"train.log_every": 5, "train.eval_every": 3}, WILD),
    "before the first step": ({"multipliers": "fixed"}, {"parametrization.forward": {"lm_head": 3e38}}),
    "where weights are kept": ({"train.keep_every": 2}, WILD),
}
"""Where a member may diverge: what is shared, and its own."""


@pytest.mark.parametrize(("shared", "own"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("others", [[{"seed": 0}, {"seed": 1}], []], ids=["among others", "all of them"])
def test_a_member_may_diverge_anywhere(
    tiny: Tiny, tmp_path: Path, shared: dict[str, Any], own: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    of_all = configs(tiny, {"train.steps": 6, **shared}, [own, {**own, "seed": 3}, *others])
    told: list[int] = []

    records = run_stack(members(of_all, tmp_path / "stack"), on_record=lambda index, record: told.append(index))

    assert [record.status for record in records] == ["diverged"] * 2 + ["completed"] * len(others)
    assert sorted(told) == list(range(len(of_all)))
    for index, (record, config) in enumerate(zip(records, of_all, strict=True)):
        mine, theirs = tmp_path / "stack" / str(index), tmp_path / "alone" / str(index)
        assert_like(record, run(config, theirs), rel=0.3 if index < 2 else 1e-5)
        assert RunFolder(mine).kept_steps() == RunFolder(theirs).kept_steps()


def test_the_time_of_a_stack_is_shared_out(tiny: Tiny, tmp_path: Path) -> None:
    records = run_stack(members(configs(tiny, {}), tmp_path))
    assert len({record.wall_seconds for record in records}) == 1
    for record in records:
        assert record.tokens_per_second == pytest.approx(24 * 4 * 16 / record.wall_seconds, rel=0.5)


def test_a_member_has_its_share_of_the_time_until_it_leaves(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # of which every reading is a second later
    monkeypatch.setattr(history, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    of_all = configs(tiny, {"train.steps": 6}, [{"seed": 0}, WILD, {"seed": 1}])

    records = run_stack(members(of_all, tmp_path))

    assert [record.steps for record in records] == [6, 2, 6]
    # A third each of the first validation, of training, of a validation of its own, and of writing its checkpoint.
    assert records[1].wall_seconds == pytest.approx(4 / 3)
    assert records[1].tokens_per_second == pytest.approx(2 * 4 * 16 / (2 / 3))
    # All that passed: these four, and three of the others, training, the last validation and what follows it.
    assert sum(record.wall_seconds for record in records) == pytest.approx(4 + 3)


def test_a_diverging_member_leaves_and_the_others_train_on(tiny: Tiny, tmp_path: Path) -> None:
    of_all = configs(tiny, {"train.steps": 60}, [{"seed": 0}, {**WILD, "optim.lr": 3.0}, {"seed": 1}])
    alone = [run(config, tmp_path / "alone" / str(index)) for index, config in enumerate(of_all)]
    assert [record.status for record in alone] == ["completed", "diverged", "completed"]
    order: list[tuple[int, int]] = []

    records = run_stack(
        members(of_all, tmp_path / "stack"), on_record=lambda index, one: order.append((index, one.steps))
    )

    assert order[0] == (1, alone[1].steps)
    assert sorted(order) == [(0, 60), (1, alone[1].steps), (2, 60)]
    for index, (record, single) in enumerate(zip(records, alone, strict=True)):
        assert_like(record, single, rel=0.05 if index == 1 else 1e-5)
    ended, single = weights(tmp_path / "stack" / "1"), weights(tmp_path / "alone" / "1")
    off = [float((ended[name] - single[name]).norm() / single[name].norm()) for name in ended]
    assert max(off) < 0.3, off  # of its last step, not of the stack's


def test_a_stack_ends_when_all_members_have(tiny: Tiny, tmp_path: Path) -> None:
    wild = {"schedule.warmup_fraction": 0.0, "optim.weight_decay": 0.0, "train.steps": 400}
    of_all = configs(tiny, wild, [{"optim.lr": 1e4}, {"optim.lr": 2e4, "seed": 1}])
    records = run_stack(members(of_all, tmp_path / "stack"))
    for index, (record, config) in enumerate(zip(records, of_all, strict=True)):
        single = run(config, tmp_path / "alone" / str(index))
        assert (record.status, record.steps) == (single.status, single.steps) == ("diverged", single.steps)
        assert [step for step, _ in record.val_curve] == [step for step, _ in single.val_curve]


def test_a_pruned_member_leaves(tiny: Tiny, tmp_path: Path) -> None:
    of_all = configs(tiny, {"train.eval_every": 8})
    asked: list[tuple[int, int]] = []

    def prune(member: int, curve: list[tuple[int, float]]) -> bool:
        asked.append((member, curve[-1][0]))
        return member == 2 and curve[-1][0] == 16

    records = run_stack(members(of_all, tmp_path), prune=prune)

    assert [(record.status, record.steps) for record in records] == [("completed", 24)] * 2 + [
        ("pruned", 16),
        ("completed", 24),
    ]
    assert asked == [(member, step) for step in (8, 16) for member in range(4)]
    assert records[2].final_loss is None


@pytest.mark.parametrize(
    "shared",
    [
        {"multipliers": "vector"},
        {"optimizer": "muon", "multipliers": "vector"},
        {"optimizer": "muon-hyperball", "model.n_layers": 2},
        {"optimizer": "sphere", "optim.sphere": "row"},
    ],
)
def test_a_stopped_stack_goes_on_as_another_stack_or_alone(tiny: Tiny, tmp_path: Path, shared: dict[str, Any]) -> None:
    of_all = configs(tiny, shared)
    whole = run_stack(members(of_all, tmp_path / "whole"))

    def stop(member: int, step: int, loss: float) -> None:
        if (member, step) == (0, 12):
            os.kill(os.getpid(), signal.SIGTERM)

    for place in ("same", "mixed"):
        with pytest.raises(Interrupted, match="step 12 of 24"):
            run_stack(members(of_all, tmp_path / place), on_progress=stop)
    seen: list[tuple[int, int]] = []
    same = run_stack(members(of_all, tmp_path / "same"), on_progress=lambda *point: seen.append(point[:2]))

    assert min(step for _, step in seen) == 14
    for record, expected in zip(same, whole, strict=True):
        assert record.train_curve == expected.train_curve  # the very same bits: the same stack
        assert record.val_curve == expected.val_curve
    assert_like(run(of_all[1], tmp_path / "mixed" / "1"), whole[1])  # alone
    others = members(of_all, tmp_path / "mixed")
    for record, expected in zip(run_stack([others[3], others[0]]), (whole[3], whole[0]), strict=True):
        assert_like(record, expected)
    assert run_stack(others[:2])[0].members == 2  # finished, both: nothing is trained again


@pytest.mark.parametrize("optimizer", ["muon", "muon-sphere"])
def test_a_run_that_was_begun_alone_goes_on_in_a_stack(optimizer: str, tiny: Tiny, tmp_path: Path) -> None:
    of_all = configs(tiny, {"optimizer": optimizer, "multipliers": "vector"})
    alone = [run(config, tmp_path / "whole" / str(index)) for index, config in enumerate(of_all)]

    for index, config in enumerate(of_all[:3]):  # the fourth has not begun: it trains apart from the others
        with pytest.raises(Interrupted):
            run(config, tmp_path / "parts" / str(index), on_progress=stop_at(12))
    records = run_stack(members(of_all, tmp_path / "parts"))

    assert [record.members for record in records] == [3, 3, 3, 1]
    for record, single in zip(records, alone, strict=True):
        assert_like(record, single)


def test_checkpoints_torn_between_members_lead_back_to_a_common_step(tiny: Tiny, tmp_path: Path) -> None:
    of_all = configs(tiny, {"train.checkpoint_every": 8})
    whole = run_stack(members(of_all, tmp_path / "whole"))

    with pytest.raises(KeyError):
        run_stack(members(of_all, tmp_path / "parts"), on_progress=die_at(18))
    for index in (0, 3):  # as if it had died while the checkpoints of step 16 were written, and 8 was still there
        checkpoints = RunFolder(tmp_path / "parts" / str(index)).checkpoints
        assert [path.name for path in checkpoints.iterdir()] == ["step=16.ckpt"]
        (checkpoints / "step=16.ckpt").unlink()
    records = run_stack(members(of_all, tmp_path / "parts"))

    assert [record.members for record in records] == [2, 2, 2, 2]  # no common step: two stacks
    for record, expected in zip(records, whole, strict=True):
        assert_like(record, expected)


def test_a_checkpoint_of_an_attempt_that_had_come_further_is_written_anew(tiny: Tiny, tmp_path: Path) -> None:
    of_all = configs(tiny, {"train.checkpoint_every": 8})
    checkpoints = [RunFolder(tmp_path / str(index)).checkpoints for index in range(4)]
    with pytest.raises(KeyError):
        run_stack(members(of_all, tmp_path), on_progress=die_at(10))
    early = (checkpoints[0] / "step=8.ckpt").read_bytes()
    with pytest.raises(KeyError):
        run_stack(members(of_all, tmp_path)[:1], on_progress=die_at(18))
    (checkpoints[0] / "step=8.ckpt").write_bytes(early)  # as if it had died before it could remove this one
    with pytest.raises(KeyError):
        run_stack(members(of_all, tmp_path), on_progress=die_at(18))

    assert [[path.name for path in folder.iterdir()] for folder in checkpoints] == [["step=16.ckpt"]] * 4


def test_runs_of_other_shapes_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for other in ({"model.d_model": 32}, {"multipliers": "vector"}, {"model.dropout": 0.1}, {"train.steps": 10}):
        with pytest.raises(ValueError, match="can be stacked"):
            run_stack(members([tiny(), tiny(other)], tmp_path))
    assert not any(tmp_path.iterdir())


def models(tiny: Tiny, overrides: dict[str, Any], constants: list[float]) -> list[Llama]:
    configs = [tiny({**overrides, "parametrization.forward": {"up_proj": constant}}) for constant in constants]
    return [initialized(config, 19, seed).double() for seed, config in enumerate(configs)]


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_logits_and_gradients_of_a_stack_are_those_of_its_members(tiny: Tiny, shared: dict[str, Any]) -> None:
    of_all = models(tiny, shared, [1.0, 0.5, 3.0])
    stacked = stack(of_all)
    ids_MBT = torch.randint(19, (3, 2, 8), generator=torch.Generator().manual_seed(0))

    logits = stacked(ids_MBT.flatten(0, 1)).view(3, 2, 8, 19)
    logits.square().sum().backward()

    for index, model in enumerate(of_all):
        alone = model(ids_MBT[index])
        alone.square().sum().backward()
        torch.testing.assert_close(logits[index], alone, rtol=1e-6, atol=1e-6)  # rotations are float32
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = stacked.get_parameter(name).grad
                assert gradient is not None
                torch.testing.assert_close(gradient[index], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
        for name, value in member_state(stacked, index).items():
            assert torch.equal(value, model.state_dict()[name])


def test_rates_are_not_rounded_with_the_weights(tiny: Tiny) -> None:
    """In bfloat16 a decay of 0.007 a step, 1 - 0.007, would be one of 0.008."""
    matrices_alone = {"model.block_norms": "frozen", "model.final_norm": "frozen"}  # the rest stays in float32
    of_all = [tiny({"optim.lr": 0.01, "optim.weight_decay": decay} | matrices_alone) for decay in (0.7, 0.3)]
    alone = [LitLlama(config.to_dict(), 19).bfloat16() for config in of_all]
    stacked = stack([one.model for one in alone])
    parameters = {name: parameter for name, parameter in stacked.named_parameters() if parameter.requires_grad}
    optimizer = StackedOptimizer(parameters, [one.plan_parameters() for one in alone], of_all)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    for index, one in enumerate(alone):
        own, schedule = one.configure_optimizers().values()  # type: ignore[union-attr]
        for parameter in one.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(3):
            own.step()
            schedule["scheduler"].step()
        for row in one.plan_parameters():
            assert torch.equal(parameters[row.name][index], row.parameter), row.name


def test_the_indices_told_are_those_of_the_members_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    """Though the first has finished, and the stack is of the others."""
    of_all = configs(tiny, {"train.steps": 4, "train.eval_every": 2, "train.checkpoint_every": 2})
    asked = [
        Member(config, tmp_path / str(index), record_path=tmp_path / f"{index}.json", keep_checkpoint=index == 3)
        for index, config in enumerate(of_all)
    ]
    run(of_all[0], tmp_path / "0")
    steps: list[tuple[int, int]] = []
    losses: dict[int, float] = {}

    def prune(member: int, curve: list[tuple[int, float]]) -> bool:
        losses[member] = curve[-1][1]
        return False

    records = run_stack(asked, on_progress=lambda *point: steps.append(point[:2]), prune=prune)

    assert steps == [(member, step) for step in (2, 4) for member in (1, 2, 3)]
    assert losses == {member: records[member].val_curve[1][1] for member in (1, 2, 3)}
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["1.json", "2.json", "3.json"]
    assert [path.name for path in sorted(tmp_path.glob("*/checkpoints/*"))] == ["final.ckpt"] * 2  # of 0 and 3
    assert not list(tmp_path.glob("[123]/record.json"))


def test_only_models_of_the_same_tensors_are_stacked(tiny: Tiny) -> None:
    (plain,), (multiplied,) = (models(tiny, {"multipliers": kind}, [1.0]) for kind in ("fixed", "vector"))
    with pytest.raises(ValueError, match="same tensors"):
        stack([plain, multiplied])
    before = copy.deepcopy(plain.state_dict())
    stacked = stack([plain, plain])
    with torch.no_grad():
        next(stacked.parameters()).add_(1)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())  # a copy


def test_nothing_of_a_stack_is_left_in_memory_for_the_next(tiny: Tiny, tmp_path: Path) -> None:
    """Lightning's Trainer and module hold each other, and the optimizer's buffers, which never leave the GPU."""
    jobs = [job_of(config, tmp_path, f"c{i}") for i, config in enumerate(configs(tiny, {"train.steps": 2}))]
    gc.collect()
    gc.disable()
    try:
        run_jobs(jobs, lambda cell, message: False)
        assert not any(isinstance(one, StackedOptimizer) for one in gc.get_objects())
    finally:
        gc.enable()
    assert len(list(tmp_path.glob("*.json"))) == 4


@pytest.mark.slow
def test_a_vectorized_sweep_finds_the_same_optimum(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        {"model.n_layers": 2},
        factors={"optimizer": ["adamw", "muon"]},
        nuisance={"optim.lr": [2**-9, 2**-6, 2**-3, 2**10]},
        seeds=[0, 1],
        budget={"steps": 30, "batch_size": 4},
    )
    spec = StudySpec.from_dict(study)
    losses: dict[str, dict[str, float | None]] = {}
    for vectorize in ("off", "6"):
        folder = tmp_path / vectorize
        assert sweep(spec, folder, workers=0, vectorize=vectorize).ran == spec.n_cells == 32
        records = {path.stem: RunRecord.read(path) for path in find_records(folder)}
        losses[vectorize] = {cell: record.final_loss for cell, record in records.items()}
        assert {record.members for record in records.values()} == ({1} if vectorize == "off" else {6, 2})
        assert not list((folder / "cells").glob("*"))
    assert losses["off"].keys() == losses["6"].keys()
    diverged = [cell for cell, loss in losses["off"].items() if loss is None]
    assert 0 < len(diverged) == sum(losses["6"][cell] is None for cell in diverged) < 32
    rates: list[float] = spec.nuisance["optim.lr"]
    for point, lr, seed in itertools.product(spec.points(), rates, spec.seeds):
        cell = point.cell({"optim.lr": lr}, seed).id
        loss, tolerance = losses["off"][cell], 1e-5 if lr < 0.1 else 1e-2  # rounding grows at the edge of stability
        assert losses["6"][cell] == (None if loss is None else pytest.approx(loss, abs=tolerance)), cell
    best = {
        vectorize: [
            min((found[point.cell({"optim.lr": lr}, seed).id] or 9.0, lr) for lr in rates)[1]
            for point in spec.points()
            for seed in spec.seeds
        ]
        for vectorize, found in losses.items()
    }
    assert best["6"] == best["off"] == [2**-3] * 8  # neither the smallest rate nor the largest

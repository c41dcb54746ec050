"""Muon on sharded, stacked and fused matrices; clipping and checkpoints of sharded parameters."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sharded_training as several
import torch
from refusals import refusal
from torch import Tensor, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lit_mult.config import OptimConfig
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.optim.sharding import chunk_sizes, owners
from lit_mult.registry.contracts import RowParts

# Who owns which matrix


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 14])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_are_those_of_torch_chunk(size: int, ranks: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(size).chunk(ranks)]
    assert chunk_sizes(size, ranks) == chunks + [0] * (ranks - len(chunks))


def test_the_largest_matrix_goes_first_and_to_the_rank_with_least_work() -> None:
    # A B min(A, B): 8, 64, 16, 16, 8. 64 to rank 0; 16, 16, 8 and 8 to rank 1, which then has 48.
    assert owners([(2, 2), (4, 4), (4, 2), (2, 4), (2, 2)], 2) == [1, 0, 1, 1, 1]
    assert sorted(owners([(4, 4)] * 8, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners([(4, 4)], 3) == [0]


# Matrices in other forms


def step_muon(weights: list[Tensor], gradients: list[list[Tensor]], **entries: Any) -> list[Tensor]:
    """The weights after a step with each of the gradients."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": parameters, "name": "w", "optimizer": "muon", "lr": 0.1, "weight_decay": 0.1, **entries}
    optimizer = HybridOptimizer([group], OptimConfig())
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def torch_muon(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    optimizer = torch.optim.Muon([parameter], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    return parameter.detach()


# Rows of every part of a matrix of 9 rows, by hand.
PARTS = {
    "one": (None, [range(9)]),
    "one after the other": (RowParts(1, (4, 2, 3)), [range(4), range(4, 6), range(6, 9)]),
    "interleaved": (RowParts(3, (2, 1)), [[0, 1, 3, 4, 6, 7], [2, 5, 8]]),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_every_part_is_a_matrix_of_its_own(case: str, transposed: bool, stacked: bool) -> None:
    parts, rows_of_parts = PARTS[case]
    torch.manual_seed(0)
    weight, *gradients = torch.randn(4, 2, 9, 5) if stacked else torch.randn(4, 9, 5)
    stored = [tensor.mT.contiguous() if transposed else tensor for tensor in (weight, *gradients)]

    entries = {"parts": parts, "transposed": transposed}
    (ours,) = step_muon(stored[:1], [[gradient] for gradient in stored[1:]], **entries)

    ours = ours.mT if transposed else ours
    for index in [(0,), (1,)] if stacked else [()]:
        for rows in rows_of_parts:
            where = (*index, torch.tensor(list(rows)))
            alone = [gradient[where] for gradient in gradients]
            # torch iterates in bfloat16: a few roundings of 2^-9 a step, of the distance moved
            expected = torch_muon(weight[where], alone)
            assert (ours[where] - expected).norm() / (expected - weight[where]).norm() < 0.03
            (expected,) = step_muon([weight[where]], [[gradient] for gradient in alone])
            torch.testing.assert_close(ours[where], expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_matrix_is_refused() -> None:
    for shape in ((4,), (2, 2, 2, 2)):
        with refusal(f"Muon cannot train a parameter of shape {shape}: it needs matrices"):
            step_muon([torch.ones(shape)], [])
    with refusal("shape (4, 9) with RowParts(groups=1, sizes=(4, 5)): they have 9 rows"):
        step_muon([torch.ones(4, 9)], [], parts=RowParts(1, (4, 5)))
    step_muon([torch.ones(4, 9)], [], parts=RowParts(1, (4, 5)), transposed=True)


@pytest.mark.parametrize("optimizer", ["hyperball", "muon-hyperball", "sphere", "muown"])
def test_optimizers_that_hold_norms_refuse_them(optimizer: str) -> None:
    for shape, entries in (((2, 4, 4), {}), ((4, 4), {"parts": RowParts(1, (2, 2))})):
        with refusal(f"optimizer = '{optimizer}': cannot train w, which is sharded, stacked or fused"):
            step_muon([torch.ones(shape)], [], optimizer=optimizer, **entries)


@pytest.mark.parametrize(
    "options", [{}, {"full_state_dict": True, "cpu_offload": True}, {"flatten_optimizer_state_dict": True}]
)
def test_states_pass_through_torchs_checkpoint_formats(options: dict[str, bool]) -> None:
    format_ = StateDictOptions(**options)
    whole = several.Net()
    optimizer = several.optimizer_of(whole)
    several.advance(whole, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), get_optimizer_state_dict(whole, optimizer, options=format_)], buffer)
    buffer.seek(0)
    weights, states = torch.load(buffer, weights_only=True)
    resumed = several.Net()
    resumed.load_state_dict(weights)
    second = several.optimizer_of(resumed)
    set_optimizer_state_dict(resumed, second, states, options=format_)

    for model, own in ((whole, optimizer), (resumed, second)):
        several.advance(model, own, range(3, 6))

    expected = several.weights(whole)
    assert [name for name, value in several.weights(resumed).items() if not torch.equal(value, expected[name])] == []


# Several processes


@dataclass
class Trained:
    alone: several.Net
    norms: list[float]
    """Of every step of one process."""
    folder: Path
    ranks: dict[int, list[dict[str, Any]]]
    """World size -> what each rank found."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("ranks")
    alone = several.Net()
    norms = several.advance(alone, several.optimizer_of(alone), range(several.STEPS))
    multiprocessing.set_forkserver_preload([several.__name__])  # imports torch once, not in every process
    ranks = {}
    for world in (2, 4):  # four resume from the checkpoint of two
        multiprocessing.start_processes(several.work, (world, folder), nprocs=world, start_method="forkserver")
        ranks[world] = [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)]
    return Trained(alone, norms, folder, ranks)


RUNS = [(2, "fsdp"), (2, "ddp"), (4, "fsdp"), (4, "hsdp"), (4, "resumed")]


@pytest.mark.parametrize(("world", "run"), RUNS)
def test_ranks_train_as_one_process_does(trained: Trained, world: int, run: str) -> None:
    start, end = several.weights(several.Net()), several.weights(trained.alone)
    for found in trained.ranks[world]:
        assert found[run].keys() == end.keys()
        for name, expected in end.items():
            torch.testing.assert_close(found[run][name], expected, rtol=0, atol=1e-5)
            assert (expected - start[name]).abs().max() > 0.1  # 10^4 times that
        norms = trained.norms[several.HALF if run == "resumed" else 0 :]
        assert found[f"{run}_norms"] == pytest.approx(norms, rel=1e-5)
        assert min(norms) > several.LIMIT  # every step clips


@pytest.mark.parametrize(
    ("world", "run", "kind"),
    [(2, "ddp", "vector"), (2, "fsdp", "vector"), (4, "fsdp", "vector"), (2, "scalar", "scalar")],
)
def test_multipliers_on_a_foreign_model_train_as_in_one_process(
    trained: Trained, world: int, run: str, kind: str
) -> None:
    """The head is tied to the embedding, and only the query's rows of a fused matrix have multipliers."""
    alone = several.with_multipliers(kind)
    for found in trained.ranks[world]:
        own = found["foreign"][run]
        assert own["weights"].keys() == alone["weights"].keys()
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(own["weights"][name], expected, rtol=0, atol=1e-5, msg=name)
        assert own["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    moved = {
        name
        for name, one in alone["weights"].items()
        if name.endswith(("row", "column", "scalar")) and (one != 1).all()
    }
    assert len(moved) == (14 if kind == "vector" else 9)


def test_one_process_goes_on_from_the_checkpoint_of_two(trained: Trained) -> None:
    model = several.Net()
    optimizer = several.resume(model, trained.folder / "checkpoint")
    several.advance(model, optimizer, range(several.HALF, several.STEPS))
    expected = several.weights(trained.alone)
    for name, value in several.weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_each_matrix_is_orthogonalized_on_one_rank(trained: Trained) -> None:
    shapes = [Counter[tuple[int, ...]]() for _ in range(4)]
    for rank, found in enumerate(trained.ranks[4]):
        for count, *shape in found["orthogonalized"]:
            shapes[rank][tuple(shape)] += count
    # two blocks: plain, small, the parts of fused and of fused_transposed, three experts; and mix
    block = [(10, 8), (3, 10), (8, 8), (2, 8), (4, 8), (4, 14), (6, 14), *[(8, 10)] * 3]
    assert sum(shapes, Counter()) == Counter({k: n * several.STEPS for k, n in Counter([*block * 2, (8, 8)]).items()})
    # No rank has more than the mean and the largest matrix, fused (14, 10): twice 80 + 30 + 112 + 140 + 240, and 64.
    assert max(sum(a * b * n for (a, b), n in own.items()) for own in shapes) < several.STEPS * (1268 / 4 + 140)


def test_the_first_fsdp_is_refused(trained: Trained) -> None:
    for found in trained.ranks[2]:
        for said in found["fsdp1"]:
            assert "weight: a matrix with multipliers must stay its module's parameter; for FSDP, use version 2" in said


def test_steps_on_every_placement_are_those_on_one_device_or_refused(trained: Trained) -> None:
    for found in trained.ranks[4]:
        ends = {}
        for form, entries in several.FORMS.items():
            (ends[form],) = step_muon([found["weight"]], [[found["gradient"]]], **{"optimizer": form, **entries})
            for step in found["steps"][form]:
                torch.testing.assert_close(step, ends[form], rtol=0, atol=1e-6)
        for form in ("corrected", "cautious"):
            assert (ends[form] - ends["muon"]).abs().max() > 1e-3
        for where, said in found["refusals"].items():
            assert isinstance(said, str)
            assert where in said
            assert "\n" not in said


def test_the_norm_of_plain_and_sharded_gradients_is_joint(trained: Trained) -> None:
    for found in trained.ranks[4]:
        # three times the same gradient, then clipped to 1
        norm = float(found["gradient"].norm()) * 3**0.5
        assert found["mixed_norms"] == pytest.approx([norm, 1.0], rel=1e-5)

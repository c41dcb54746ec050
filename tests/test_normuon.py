"""NorMuon: the formula, what it keeps of Muon and what it makes equal, stacks, resuming, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from tiny_runs import Tiny, weights
from torch import Tensor, nn

from lit_mult.config import OptimConfig
from lit_mult.errors import Interrupted
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.contracts import RowParts
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moves(name: str, gradients: list[Tensor], lr: float = 1.0, **entries: Any) -> list[Tensor]:
    """What each step adds to a matrix, without decay."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    group = {"params": [weight], "name": "w", "optimizer": name, "lr": lr, "weight_decay": 0.0, **entries}
    optimizer, found = HybridOptimizer([group], OptimConfig()), []
    for gradient in gradients:
        before, weight.grad = weight.detach().clone(), gradient.clone()
        optimizer.step()
        found.append(weight.detach() - before)
    return found


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_twenty_steps_are_the_float64_loop(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(normal(99, shape))
    group = {"params": [weight], "name": "w", "optimizer": "normuon", "lr": 0.02, "weight_decay": 0.3}
    optimizer = HybridOptimizer([group], OptimConfig())
    W, m, v = weight.detach().double(), torch.zeros(shape).double(), torch.zeros(shape[0]).double()
    for step in range(20):
        weight.grad = normal(step, shape)
        optimizer.step()
        m = 0.95 * m + 0.05 * normal(step, shape).double()
        U = 0.05 * normal(step, shape).double() + 0.95 * m
        U = U.T if shape[0] > shape[1] else U
        U = U / U.norm()
        for _ in range(5):
            A = U @ U.T
            U = 3.4445 * U + (-4.7750 * A + 2.0315 * A @ A) @ U
        U = U.T if shape[0] > shape[1] else U
        v = 0.95 * v + 0.05 * (U**2).mean(dim=1)
        N = U / (v.sqrt() + 1e-10)[:, None]
        N = N * U.norm() / N.norm()
        W = (1 - 0.02 * 0.3) * W - 0.02 * 0.2 * math.sqrt(8) * N
    torch.testing.assert_close(weight.detach().double(), W, rtol=1e-5, atol=1e-5)


def test_an_update_has_the_norm_of_muons() -> None:
    gradients = [normal(step, (12, 4)) * (1 + step) for step in range(10)]
    for ours, muons in zip(moves("normuon", gradients), moves("muon", gradients), strict=True):
        assert float(ours.norm()) == pytest.approx(float(muons.norm()), rel=1e-5)


def test_rows_are_equal_in_the_steady_state() -> None:
    """Of a gradient that does not change, whose rows have sizes from 1 to 100."""
    gradient = normal(0, (12, 4)) * torch.logspace(0, 2, 12)[:, None]
    rows = {name: moves(name, [gradient] * 200)[-1].norm(dim=1) for name in ("muon", "normuon")}
    assert float(rows["normuon"].max() / rows["normuon"].min()) == pytest.approx(1, abs=1e-4)
    assert rows["muon"].max() / rows["muon"].min() > 2


def test_stacks_of_matrices_and_transposed_ones_are_matrices_of_their_own() -> None:
    gradients = [normal(step, (3, 8, 5)) for step in range(5)]
    alone = [moves("normuon", [gradient[k] for gradient in gradients])[-1] for k in range(3)]
    stacked = moves("normuon", gradients)[-1]
    transposed = moves("normuon", [gradient.mT.contiguous() for gradient in gradients], transposed=True)[-1]
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(transposed.mT, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_fused_matrices_are_refused() -> None:
    with refusal("optimizer = 'normuon': cannot train w, which is sharded or fused: use adamw or muon"):
        moves("normuon", [normal(0, (8, 5))], parts=RowParts(1, (4, 4)))


def test_a_stack_trains_as_its_members_alone_and_goes_on_as_one_of_them(tiny: Tiny, tmp_path: Path) -> None:
    shared = {"optimizer": "normuon", "multipliers": "vector", "model.n_layers": 2, "train.checkpoint_every": 6}
    configs = [tiny({**shared, "seed": seed, "optim.lr": lr}) for seed, lr in ((0, 0.02), (1, 0.05))]
    alone = [run(config, tmp_path / "alone" / str(index)) for index, config in enumerate(configs)]
    members = [Member(config, tmp_path / "stack" / str(index)) for index, config in enumerate(configs)]
    with pytest.raises(Interrupted):
        run_stack(members, should_stop=iter([False] * 7 + [True]).__next__)
    record = run(configs[0], tmp_path / "stack" / "0")  # one member goes on by itself, the other in a stack
    (other,) = run_stack(members[1:])
    for index, (mine, theirs) in enumerate(zip((record, other), alone, strict=True)):
        for point, expected in zip(mine.train_curve, theirs.train_curve, strict=True):
            assert point == pytest.approx(expected, abs=1e-4)
        ends = weights(tmp_path / "alone" / str(index))
        for name, value in weights(tmp_path / "stack" / str(index)).items():
            torch.testing.assert_close(value, ends[name], rtol=0, atol=2e-3, msg=name)


def test_a_stopped_run_goes_on_exactly(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optimizer": "normuon", "train.diagnostics": ["brownian"]})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "part")[name], value), name

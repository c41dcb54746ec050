"""Scion on spectral balls and on those of the largest entry: formulas, roles, own decay, width, stacks, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from tiny_runs import Tiny, weights
from torch import Tensor, nn

from lit_mult.cli import main
from lit_mult.config import OptimConfig
from lit_mult.errors import Interrupted
from lit_mult.hf.export import export
from lit_mult.method.plan import plan_run
from lit_mult.method.regime import matrix_regimes
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.contracts import RowParts
from lit_mult.registry.roles import HIDDEN_ROLES, Role
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

NAMES = ["scion", "scion-sign"]
RADII = {"scion": 3.0, "scion-sign": 40.0}
SETTINGS: dict[str, Any] = {"scion_radius": 3.0, "scion_sign_radius": 40.0, "scion_momentum": 0.8}


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(name: str, weight: Tensor, gradients: list[Tensor], lr: float = 0.01, **entries: Any) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "name": "w", "optimizer": name, "lr": lr, "weight_decay": 1.0, **entries}
    optimizer = HybridOptimizer([group], OptimConfig(**SETTINGS))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def lmo(name: str, m: Tensor) -> Tensor:
    """sqrt(d_out / d_in) NS(m), or sign(m) / d_in."""
    if name == "scion-sign":
        return m.sign() / m.shape[1]
    X = m.T if m.shape[0] > m.shape[1] else m
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return math.sqrt(m.shape[0] / m.shape[1]) * (X.T if m.shape[0] > m.shape[1] else X)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_twenty_steps_are_the_float64_loop(name: str, shape: tuple[int, int]) -> None:
    gradients = [normal(step, shape) for step in range(20)]
    W, m = normal(99, shape).double(), torch.zeros(shape).double()
    for gradient in gradients:
        m = 0.8 * m + 0.2 * gradient.double()
        W = (1 - 0.01) * W - 0.01 * RADII[name] * lmo(name, m)
    torch.testing.assert_close(trained(name, normal(99, shape), gradients).double(), W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_end_on_the_ball_of_the_radius(name: str) -> None:
    """Under a gradient that does not change, whose singular values are equal: NS is then one number, near 1."""
    gradient = torch.linalg.qr(normal(0, (8, 5)))[0]
    end = trained(name, normal(1, (8, 5)), [gradient] * 1000)
    if name == "scion-sign":
        torch.testing.assert_close(end, -40.0 / 5 * gradient.sign(), rtol=1e-3, atol=1e-3)
    else:
        values = torch.linalg.svdvals(end) / (3.0 * math.sqrt(8 / 5))
        assert 0.68 < values.min() < values.max() < 1.14
        torch.testing.assert_close(end / end.norm(), -gradient / gradient.norm(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_transposed_matrices_are_on_balls_of_their_own(name: str) -> None:
    gradients = [normal(step, (9, 5)) for step in range(5)]
    rows = (slice(0, 4), slice(4, 6), slice(6, 9))
    alone = [trained(name, normal(9, (9, 5))[own], [gradient[own] for gradient in gradients]) for own in rows]
    parts = trained(name, normal(9, (9, 5)), gradients, parts=RowParts(1, (4, 2, 3)))
    torch.testing.assert_close(parts, torch.cat(alone), rtol=1e-4, atol=1e-5)
    stored = [gradient.T.contiguous() for gradient in gradients]
    transposed = trained(name, normal(9, (9, 5)).T.contiguous(), stored, transposed=True)
    torch.testing.assert_close(transposed.T, trained(name, normal(9, (9, 5)), gradients), rtol=1e-4, atol=1e-5)


def test_roles_rates_and_the_decay_of_the_method(tiny: Tiny) -> None:
    for mode in ("coupled", "independent", "cautious", "timescale"):
        for rule in ("lr", "lr_wd", "multiplier"):
            settings = {"optimizer": "scion", "optim.weight_decay_mode": mode, "optim.weight_decay": 0.3}
            config = tiny({**settings, "model.d_model": 32, "parametrization.width_rule": rule, "optim.lr": 0.001})
            matrices = plan_run(config, 17).matrices
            for matrix in matrices.values():
                own = {Role.LM_HEAD: "scion-sign", Role.EMBEDDING: "adamw"}.get(matrix.role, "scion")
                assert matrix.optimizer == own
                if own != "adamw":
                    assert (matrix.lr, matrix.weight_decay, matrix.decay_rule) == (0.001, 1.0, "plain")
    config = tiny({"optimizer": "scion", "optim.lr": 0.01, "train.steps": 240})
    found = matrix_regimes(config, plan_run(config, 17))
    # wsd: 240 - 24 - 40 steps at the peak rate
    assert [found[role].decay_times for role in HIDDEN_ROLES] == pytest.approx([0.01 * 176] * 7)
    sign = plan_run(tiny({"optimizer": "scion-sign"}), 17).matrices
    assert {matrix.optimizer for matrix in sign.values() if matrix.role in HIDDEN_ROLES} == {"scion-sign"}


def test_without_a_noise_reference(tiny: Tiny, tmp_path: Path) -> None:
    with refusal("optimizer = 'scion': has no noise reference, which the Brownian reference needs"):
        run(tiny({"optimizer": "scion", "train.diagnostics": ["brownian"]}), tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_exactly_and_exports(name: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optimizer": name, "multipliers": "vector", "optim.lr": 0.001})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve
    trained = load_trained(tmp_path / "whole")
    assert export(trained.model, config, trained.corpus, trained.step, tmp_path / "hf", record=whole).within_rounding


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_trains_as_its_members_alone(name: str, tiny: Tiny, tmp_path: Path) -> None:
    shared = {"optimizer": name, "optim.weight_decay_mode": "cautious", "optim.weight_decay": 1.0}
    configs = [tiny({**shared, "seed": seed, "optim.lr": lr}) for seed, lr in ((0, 0.0005), (1, 0.002))]
    alone = [run(config, tmp_path / "alone" / str(index)) for index, config in enumerate(configs)]
    together = run_stack([Member(config, tmp_path / "stack" / str(index)) for index, config in enumerate(configs)])
    for index, (mine, theirs) in enumerate(zip(together, alone, strict=True)):
        for point, expected in zip(mine.train_curve, theirs.train_curve, strict=True):
            assert point == pytest.approx(expected, abs=1e-4)
        ends = weights(tmp_path / "alone" / str(index))
        for part, value in weights(tmp_path / "stack" / str(index)).items():
            torch.testing.assert_close(value, ends[part], rtol=0, atol=2e-3, msg=part)


@pytest.mark.parametrize("name", NAMES)
def test_the_coordinate_check_passes(name: str, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--model.n_layers 1 --model.head_dim 16 --parametrization.base_d_model 16 --data.seq_len 32"
    lr = {"scion": 3e-4, "scion-sign": 3e-5}[name]
    options = f"--optimizer {name} --widths 64,128,256 --steps 6 --seeds 2 --optim.lr {lr} --train.batch_size 8 {size}"
    constant = "--schedule.name constant --schedule.warmup_fraction 0 --trainer.accelerator cpu"
    code = main(["coord-check", *f"{options} {constant}".split(), "--data.corpus", str(text_file)])
    assert (code, [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]) == (0, [])

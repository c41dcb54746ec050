"""Muown: against the formula in float64, its invariants, and what its entry leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Tiny
from torch import Tensor, nn

import lit_mult
from lit_mult.cli import main
from lit_mult.config import OptimConfig
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.hf.export import export
from lit_mult.method.plan import plan_run
from lit_mult.optim import muown
from lit_mult.stacked.run import Member, run_stack
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

LR, DECAY, STEPS = 0.02, 0.1, 20
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


WEIGHTS = [normal(8, 5, seed=100) / 2, normal(5, 8, seed=101), normal(8, 5, seed=102) * 3]
GRADIENTS = [[normal(*weight.shape, seed=10 * step + k) for k, weight in enumerate(WEIGHTS)] for step in range(STEPS)]


def optimizer_of(weights: list[Tensor], **settings: Any) -> tuple[muown.Muown, list[nn.Parameter]]:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    entries = {key: settings.pop(key) for key in ("transposed", "lr") if key in settings}
    group = {"params": parameters, "lr": LR, "weight_decay": DECAY, "name": "w", "optimizer": "muown", **entries}
    return muown.build([group], OptimConfig(**settings)), parameters


def steps(weights: list[Tensor], gradients: list[list[Tensor]], **settings: Any) -> list[list[Tensor]]:
    """The weights after each step; with what must hold of the state."""
    optimizer, parameters = optimizer_of(weights, **settings)
    rows = 0 if settings.get("transposed") else 1
    after = []
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        after.append([parameter.detach().clone() for parameter in parameters])
        for parameter in parameters:
            norms = parameter.detach().norm(dim=rows, keepdim=True)
            torch.testing.assert_close(norms, optimizer.state[parameter]["row_norm"].abs(), rtol=1e-5, atol=1e-6)
    return after


def by_hand(
    W: Tensor, gradients: list[Tensor], lr_g: float, triples: Sequence[tuple[float, float, float]] = QUINTIC
) -> list[Tensor]:
    """The loop of arXiv:2605.10797 in float64, with (a, b, c) of each iteration."""
    after, scale = [], 0.2 * math.sqrt(max(W.shape))
    W = W.double()
    g = W.norm(dim=1, keepdim=True)
    V, M, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(g), torch.zeros_like(g)
    for count, gradient in enumerate(gradients, start=1):
        G = gradient.double()
        length = V.norm(dim=1, keepdim=True)
        U = V / length
        G_g = (G * U).sum(1, keepdim=True)
        M = 0.95 * M + 0.05 * (g / length) * (G - U * G_g)
        x = M.T if W.shape[0] > W.shape[1] else M
        x = x / x.norm()
        for a, b, c in triples:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        V = V - LR * scale * (x.T if W.shape[0] > W.shape[1] else x)
        m, v = 0.9 * m + 0.1 * G_g, 0.95 * v + 0.05 * G_g**2
        g = (1 - LR * DECAY) * g - lr_g * (m / (1 - 0.9**count)) / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
        after.append(g * V / V.norm(dim=1, keepdim=True))
    return after


@pytest.mark.parametrize("norm_lr", [None, 0.005])
def test_twenty_steps_are_those_of_the_formula(norm_lr: float | None) -> None:
    ours = steps(WEIGHTS, GRADIENTS, muown_norm_lr=norm_lr)
    for k, weight in enumerate(WEIGHTS):
        expected = by_hand(weight, [step[k] for step in GRADIENTS], norm_lr or LR)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one[k].double(), other, rtol=1e-5, atol=2e-6)


def test_it_takes_muons_coefficients() -> None:
    """The first two of Polar Express (arXiv:2505.16932), the first after a division by 1.02."""
    triples = [(8.1566 / 1.02, -22.4833 / 1.02**3, 15.8788 / 1.02**5), (4.0429, -2.8089, 0.50002)]
    ours = steps(WEIGHTS, GRADIENTS, muon_coefficients="polar_express", muon_ns_steps=2)
    for k, weight in enumerate(WEIGHTS):
        expected = by_hand(weight, [step[k] for step in GRADIENTS], LR, triples)
        torch.testing.assert_close(ours[-1][k].double(), expected[-1], rtol=1e-5, atol=5e-6)


def test_corrected_decay_is_one_of_row_norms() -> None:
    """A step decays norms by lr^2 / peak_lr * weight_decay: at half the peak as half the weight decay does."""
    ends = []
    for decay, rule in ((5.0, {"decay_rule": "corrected", "peak_lr": 2 * LR}), (2.5, {})):
        parameter = nn.Parameter(WEIGHTS[0].clone())
        group = {"params": [parameter], "name": "w", "optimizer": "muown", "lr": LR, "weight_decay": decay, **rule}
        optimizer = lit_mult.HybridOptimizer([group])
        for step in GRADIENTS:
            parameter.grad = step[0].clone()
            optimizer.step()
        ends.append(parameter.detach())
        norms = optimizer.state[parameter]["row_norm"].abs()
        torch.testing.assert_close(parameter.detach().norm(dim=1, keepdim=True), norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    assert (ends[0] - steps(WEIGHTS[:1], [step[:1] for step in GRADIENTS])[-1][0]).norm() > 0.1


def test_cautious_decay_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """It changes entries of W after the step, of which row_norm and length would not know."""
    with pytest.raises(
        ConfigError, match=r"'muown': has no decay of entries, which optim.weight_decay_mode = cautious needs"
    ):
        run(tiny({"optimizer": "muown", "optim.weight_decay_mode": "cautious"}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_first_step_turns_rows_as_muon_and_moves_each_norm_by_lr() -> None:
    """V starts at W, and Adam's first update is the sign of the gradient; without decay."""
    optimizer, (parameter,) = optimizer_of(WEIGHTS[:1], muown_norm_lr=0.003)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    parameter.grad = GRADIENTS[0][0].clone()
    optimizer.step()
    W, norm = WEIGHTS[0], WEIGHTS[0].norm(dim=1)
    torch.testing.assert_close(
        (parameter.detach().norm(dim=1) - norm).abs(), torch.full((8,), 0.003), rtol=1e-3, atol=0
    )
    along = (GRADIENTS[0][0] * W).sum(1, keepdim=True) * W / norm[:, None] ** 2
    left, _, right = torch.linalg.svd(GRADIENTS[0][0] - along, full_matrices=False)
    turned = W - LR * 0.2 * math.sqrt(8) * left @ right  # the iteration leaves singular values between 0.7 and 1.2
    expected = turned / turned.norm(dim=1, keepdim=True)
    reached = parameter.detach() / parameter.detach().norm(dim=1, keepdim=True)
    assert (reached - expected).norm() < 0.3 * (W / norm[:, None] - expected).norm()


def test_a_step_along_a_row_leaves_its_direction() -> None:
    """G along W has no part that turns: of W, the norm alone changes."""
    weight = WEIGHTS[0]
    (after,) = steps([weight], [[weight]], weight_decay=0.0)
    cosine = torch.cosine_similarity(after[0], weight)
    assert float(cosine.min()) > 0.999


def test_rates_of_norms_follow_the_schedule() -> None:
    """At half the lr a norm moves by half of muown_norm_lr."""
    moved = []
    for factor in (1.0, 0.5):
        optimizer, (parameter,) = optimizer_of(WEIGHTS[:1], muown_norm_lr=0.003)
        optimizer.param_groups[0] |= {"lr": LR * factor, "weight_decay": 0.0}
        parameter.grad = GRADIENTS[0][0].clone()
        optimizer.step()
        moved.append((optimizer.state[parameter]["row_norm"].flatten() - WEIGHTS[0].norm(dim=1)).abs())
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-3, atol=1e-7)


def test_a_transposed_matrix_has_its_rows_in_columns() -> None:
    weight, gradients = WEIGHTS[0], [step[:1] for step in GRADIENTS]
    stored = [[gradient.T.contiguous() for gradient in step] for step in gradients]
    whole = steps([weight], gradients)
    for (one,), (other,) in zip(steps([weight.T], stored, transposed=True), whole, strict=True):
        torch.testing.assert_close(one.T, other, rtol=1e-5, atol=2e-6)


def test_a_row_of_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer = 'muown': cannot train w, which has a row of zeros"):
        steps([torch.tensor([[1.0, 1.0], [0.0, 0.0]])], [[torch.ones(2, 2)]])


@pytest.mark.parametrize("entries", [{"parts": (1, (4, 4), False)}, {}])
def test_what_is_not_one_matrix_is_refused(entries: dict[str, Any]) -> None:
    shape = (8, 5) if entries else (2, 8, 5)
    group = {"params": [nn.Parameter(torch.ones(shape))], "lr": LR, "name": "w", "optimizer": "muown", **entries}
    with pytest.raises(ConfigError, match="'muown': cannot train w, which is sharded, stacked or fused"):
        muown.build([group], OptimConfig())


def test_it_trains_hidden_matrices_with_the_rates_of_muon(tiny: Tiny) -> None:
    plans = [plan_run(tiny({"optimizer": name, "model.d_model": 32}), 17).matrices for name in ("muown", "muon")]
    for ours, muons in zip(*(plan.values() for plan in plans), strict=True):
        assert (ours.lr, ours.weight_decay) == (muons.lr, muons.weight_decay)
        assert ours.optimizer == ("adamw" if muons.optimizer == "adamw" else "muown")


def test_a_stopped_run_goes_on_exactly_and_exports(tiny: Tiny, tmp_path: Path) -> None:
    groups = ["norms", "updates"]
    settings = {"optimizer": "muown", "optim.muown_norm_lr": 0.005, "train.diagnostics": groups}
    config = tiny({**settings, "multipliers": "vector"})
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve
    assert whole.final_loss is not None
    assert whole.final_loss < whole.initial_loss

    trained = load_trained(tmp_path / "whole")
    agreed = export(trained.model, config, trained.corpus, trained.step, tmp_path / "hf", record=whole)
    assert agreed.within_rounding


def test_stacks_and_the_noise_reference_are_refused_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    members = [Member(tiny({"optimizer": "muown", "seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="'muown': has no stacked form, which training runs together needs"):
        run_stack(members)
    with pytest.raises(ConfigError, match="'muown': has no noise reference, which the Brownian reference needs"):
        run(tiny({"optimizer": "muown", "train.diagnostics": ["brownian"]}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["--parametrization.width_rule lr", "--parametrization.width_rule multiplier"])
def test_the_coordinate_check_passes(options: str, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--model.n_layers 1 --model.head_dim 16 --parametrization.base_d_model 16 --data.seq_len 32"
    run = f"--optimizer muown --widths 64,128,256 --steps 6 --seeds 2 --optim.lr 0.05 --train.batch_size 8 {size}"
    constant = "--schedule.name constant --schedule.warmup_fraction 0 --trainer.accelerator cpu"
    assert main(["coord-check", *f"{run} {constant} {options}".split(), "--data.corpus", str(text_file)]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_it_trains_a_model_of_another_library() -> None:
    from foreign_models import foreign, token_ids

    model = foreign("llama")
    lit_mult.add_multipliers(model, kind="softplus", verbose=False)
    optimizer = lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, 1e-2, optimizer="muown"))
    losses = []
    for _ in range(5):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

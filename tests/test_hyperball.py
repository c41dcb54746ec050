"""Hyperball on AdamW and Muon: against heavyball's, its invariants, and what its registry entry leaves out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import heavyball
import pytest
import torch
from tiny_runs import MakeStudy, Tiny
from torch import Tensor, nn

import lit_mult
from lit_mult.cli import main
from lit_mult.config import OptimConfig
from lit_mult.diagnostics.brownian import particles, simulate
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.hf.export import export
from lit_mult.method.plan import plan_run
from lit_mult.optim import hyperball
from lit_mult.stacked.run import Member, run_stack
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

OPTIMIZERS = ["hyperball", "muon-hyperball"]
BUILD: dict[str, Any] = {"hyperball": hyperball.build_adam, "muon-hyperball": hyperball.build_muon}


def steps(name: str, weight: Tensor, gradients: list[Tensor], **settings: Any) -> list[Tensor]:
    """The weight after each step."""
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "lr": 0.02, "name": "w", "optimizer": name}
    optimizer = BUILD[name]([group], OptimConfig(**settings))
    after = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        after.append(parameter.detach().clone())
    return after


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_twenty_steps_are_those_of_heavyball() -> None:
    """Its matrices have no first moment, whatever betas say: beta1 = 0 here."""
    weight, gradients = normal(6, 4, seed=0) / 2, [normal(6, 4, seed=1 + step) for step in range(20)]
    theirs = nn.Parameter(weight.clone())
    oracle = heavyball.HyperBallAdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, compile_step=False)
    for ours, gradient in zip(steps("hyperball", weight, gradients, betas=(0.0, 0.95)), gradients, strict=True):
        theirs.grad = gradient.clone()
        oracle.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_against_the_formula_in_float64(name: str) -> None:
    """W <- R N(W - lr R N(u)) with u of torch's own AdamW, or of the orthogonalized momentum."""
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(20)]
    W, R, m, v = weight.double(), weight.double().norm(), torch.zeros(8, 5).double(), torch.zeros(8, 5).double()
    for count, (ours, gradient) in enumerate(zip(steps(name, weight, gradients), gradients, strict=True), start=1):
        g = gradient.double()
        if name == "hyperball":
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            u = (m / (1 - 0.9**count)) / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
        else:
            m = 0.95 * m + 0.05 * g
            u = (0.05 * g + 0.95 * m).T  # tall
            u = u / u.norm()
            for _ in range(5):
                gram = u @ u.T
                u = 3.4445 * u + (-4.7750 * gram + 2.0315 * gram @ gram) @ u
            u = u.T
        W = W - 0.02 * R * u / u.norm()
        W = R * W / W.norm()
        torch.testing.assert_close(ours.double(), W, rtol=2e-5, atol=2e-6)


def test_muon_hyperball_takes_muons_coefficients() -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1)]
    (quintic,) = steps("muon-hyperball", weight, gradients)
    (polar,) = steps("muon-hyperball", weight, gradients, muon_coefficients="polar_express", muon_ns_steps=30)
    U, _, Vh = torch.linalg.svd(0.0975 * gradients[0], full_matrices=False)  # 30 steps reach the polar factor
    moved = weight - 0.02 * weight.norm() * (U @ Vh) / 5**0.5
    exact = moved * (weight.norm() / moved.norm())
    torch.testing.assert_close(polar, exact, rtol=0, atol=2e-3)
    assert (polar - exact).norm() < 0.5 * (quintic - exact).norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_stays_and_the_size_of_gradients_does_not_matter(name: str) -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(30)]
    after = steps(name, weight, gradients)
    for before, now in zip([weight, *after], after, strict=False):
        assert float(now.norm() / weight.norm()) == pytest.approx(1, abs=1e-6)
        # The step before it is brought back to the sphere is 0.02; of it, what lies along W is lost.
        assert 0.015 < float((now - before).norm() / weight.norm()) < 0.02 * 1.001
    for seven, one in zip(steps(name, weight, [7 * gradient for gradient in gradients]), after, strict=True):
        torch.testing.assert_close(seven, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_matrix_that_starts_at_0_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer = '{name}': cannot train w, which starts at 0"):
        steps(name, torch.zeros(3, 2), [torch.ones(3, 2)])


def test_width_factors_by_hand(tiny: Tiny) -> None:
    """Base 8, width 32. Hidden: R = sqrt(d_out), |dW| = lr R (aligned) or lr R / sqrt(min) (orthogonal).

    Adam: lr ~ sqrt(d_out / d_in) / sqrt(d_out) = d_in^-1/2 -> 1/2; Muon: sqrt(min / d_in) at a fixed aspect ratio -> 1.
    The head's R falls as 1 / sqrt(d), so that its rate stays.
    """
    lr = 2**-6
    for name, hidden in (("hyperball", lr / 2), ("muon-hyperball", lr)):
        matrices = plan_run(tiny({"optimizer": name, "model.d_model": 32, "optim.lr": lr}), 17).matrices
        assert matrices["layers.0.self_attn.q_proj"].lr == pytest.approx(hidden)
        assert matrices["layers.0.mlp.down_proj"].lr == pytest.approx(hidden)
        assert matrices["lm_head"].lr == pytest.approx(lr)
        assert matrices["lm_head"].optimizer == "hyperball"
        assert {matrix.weight_decay for matrix in matrices.values() if matrix.optimizer != "adamw"} == {0.0}
        assert (matrices["embed_tokens"].optimizer, matrices["embed_tokens"].weight_decay) == ("adamw", 0.1)


@pytest.mark.parametrize("rule", ["lr_wd", "multiplier"])
def test_other_width_rules_are_refused(rule: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=f"has no such width rule, which parametrization.width_rule = {rule} needs"):
        plan_run(tiny({"optimizer": "hyperball", "parametrization.width_rule": rule}), 17)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_goes_on_exactly_and_exports(name: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny({"optimizer": name, "multipliers": "vector", "train.diagnostics": ["norms", "updates", "brownian"]})

    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "part", should_stop=iter([False] * 5 + [True]).__next__)
    assert run(config, tmp_path / "part").train_curve == whole.train_curve

    readings = lit_mult.load_diagnostics(tmp_path / "whole")
    q_proj = readings[(readings["name"] == "layers.0.self_attn.q_proj") & (readings["quantity"] == "weight_rms")]
    assert q_proj["value"].max() == pytest.approx(q_proj["value"].min(), rel=1e-5)

    trained = load_trained(tmp_path / "whole")
    agreed = export(trained.model, config, trained.corpus, trained.step, tmp_path / "hf", record=whole)
    assert agreed.within_rounding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_noise_turns_a_matrix_on_its_sphere(name: str, tiny: Tiny) -> None:
    """Independent directions: after T steps the start has shrunk to (1 + lr^2)^(-T / 2) along itself."""
    config = tiny({"optimizer": name, "optim.lr": 0.1, "parametrization.rule": "standard", "train.steps": 40})
    config = config.with_overrides({"schedule.name": "constant", "schedule.warmup_fraction": 0.0})
    rows = [(row, particle) for row, particle in particles(config, 17) if row.role.value == "gate_proj"]
    (motion,) = simulate(rows, config, 40).values()
    assert motion.norm[-1] == pytest.approx(motion.norm[0], rel=1e-5)
    assert motion.kept == pytest.approx(1.01**-20)
    assert math.isnan(motion.predicted)


def test_stacks_are_refused_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    members = [Member(tiny({"optimizer": "hyperball", "seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="'hyperball': has no stacked form, which training runs together needs"):
        run_stack(members)
    assert not list(tmp_path.iterdir())


def test_a_sweep_reports_it_beside_the_others(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        {"train.eval_every": 6},
        factors={"optimizer": ["adamw", "muon", *OPTIMIZERS]},
        nuisance={"optim.lr": [0.01, 0.02, 0.04]},
        budget={"steps": 12, "batch_size": 4},
    )
    sweep(StudySpec.from_dict(study), tmp_path / "out", workers=0)
    assert main(["report", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    for label in ("AdamW", "Muon", "Hyperball", "Muon-Hyperball"):
        assert f"vectors · {label}" in report


def test_the_coordinate_check_passes(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--model.n_layers 1 --model.head_dim 16 --parametrization.base_d_model 16 --data.seq_len 32"
    options = (
        f"--optimizer hyperball --widths 64,128,256 --steps 6 --seeds 2 --optim.lr 0.05 --train.batch_size 8 {size}"
    )
    constant = "--schedule.name constant --schedule.warmup_fraction 0 --trainer.accelerator cpu"
    assert main(["coord-check", *f"{options} {constant}".split(), "--data.corpus", str(text_file)]) == 0
    assert "FAIL" not in capsys.readouterr().out

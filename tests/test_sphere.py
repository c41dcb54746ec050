"""Optimizers on spheres: against heavyball's and the formulas, their invariants, and what their entries leave out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import heavyball
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import MakeStudy, Tiny
from torch import Tensor, nn

import lit_mult
from lit_mult.cli import main
from lit_mult.config import OptimConfig
from lit_mult.diagnostics.brownian import particles, simulate
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.hf.export import export
from lit_mult.method.plan import plan_run
from lit_mult.optim import sphere
from lit_mult.registry.contracts import Matrix
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.run import run
from lit_mult.training.trained import load_trained

BUILD: dict[str, Any] = {
    "hyperball": sphere.build_hyperball,
    "muon-hyperball": sphere.build_muon_hyperball,
    "sphere": sphere.build_sphere,
    "muon-sphere": sphere.build_muon_sphere,
}
HYPERBALL = ["hyperball", "muon-hyperball"]
KEPT = ["matrix", "row"]


def norm(matrix: Tensor, kept: str) -> Tensor:
    """Of the matrix, or of every row."""
    return matrix.norm() if kept == "matrix" else matrix.norm(dim=1, keepdim=True)


def steps(name: str, weight: Tensor, gradients: list[Tensor], **settings: Any) -> list[Tensor]:
    """The weight after each step."""
    entries = {key: settings.pop(key) for key in ("transposed",) if key in settings}
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "lr": 0.02, "name": "w", "optimizer": name, **entries}
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


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", BUILD)
def test_against_the_formula_in_float64(name: str, kept: str) -> None:
    """W <- R N(W - lr u), or with R N(u) for u, which is torch's own AdamW's or the orthogonalized momentum."""
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(20)]
    W, R = weight.double(), norm(weight.double(), kept)
    m, v = torch.zeros(2, 8, 5).double()
    after = steps(name, weight, gradients, sphere=kept)
    for count, (ours, gradient) in enumerate(zip(after, gradients, strict=True), start=1):
        g = gradient.double()
        if "muon" not in name:
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            u = (m / (1 - 0.9**count)) / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
        else:
            m = 0.95 * m + 0.05 * g
            u = (0.05 * g + 0.95 * m).T  # tall
            u = u / u.norm()
            for _ in range(5):
                gram = u @ u.T
                u = 3.4445 * u + (-4.7750 * gram + 2.0315 * gram @ gram) @ u
            u = 0.2 * math.sqrt(8) * u.T
        W = W - 0.02 * (R * u / norm(u, kept) if name in HYPERBALL else u)
        W = R * W / norm(W, kept)
        torch.testing.assert_close(ours.double(), W, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["muon-hyperball", "muon-sphere"])
def test_forms_of_muon_take_its_coefficients(name: str) -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1)]
    (quintic,) = steps(name, weight, gradients)
    (polar,) = steps(name, weight, gradients, muon_coefficients="polar_express", muon_ns_steps=30)
    U, _, Vh = torch.linalg.svd(0.0975 * gradients[0], full_matrices=False)  # 30 steps reach the polar factor
    size = weight.norm() / 5**0.5 if name in HYPERBALL else 0.2 * 8**0.5
    moved = weight - 0.02 * size * (U @ Vh)
    exact = moved * (weight.norm() / moved.norm())
    torch.testing.assert_close(polar, exact, rtol=0, atol=2e-3)
    assert (polar - exact).norm() < 0.5 * (quintic - exact).norm()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", BUILD)
def test_the_norm_stays_and_the_size_of_gradients_does_not_matter(name: str, kept: str) -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(30)]
    after = steps(name, weight, gradients, sphere=kept)
    for now in after:
        torch.testing.assert_close(norm(now, kept) / norm(weight, kept), torch.ones_like(norm(weight, kept)))
    for seven, one in zip(
        steps(name, weight, [7 * gradient for gradient in gradients], sphere=kept), after, strict=True
    ):
        torch.testing.assert_close(seven, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HYPERBALL)
def test_a_step_of_hyperball_has_relative_size_lr(name: str) -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(30)]
    after = steps(name, weight, gradients)
    for before, now in zip([weight, *after], after, strict=False):
        # The step before it is brought back to the sphere is 0.02; of it, what lies along W is lost.
        assert 0.015 < float((now - before).norm() / weight.norm()) < 0.02 * 1.001


def moved(weight: Tensor, update: Tensor, kept: str, relative: bool) -> Tensor:
    """W after one step of an optimizer whose u is `update`."""
    parameter = nn.Parameter(weight.clone())
    parameter.grad = torch.ones_like(weight)
    groups = [{"params": [parameter], "lr": 0.1, "name": "w", "optimizer": "sphere"}]
    sphere.Sphere(groups, lambda parameters, states, group: [update], relative=relative, sphere=kept).step()
    return parameter.detach()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(rows=st.integers(1, 6), columns=st.integers(2, 6), kept=st.sampled_from(KEPT), seed=st.integers(0, 2**16))
def test_the_size_of_u_counts_on_the_sphere_and_not_under_hyperball(
    rows: int, columns: int, kept: str, seed: int
) -> None:
    W, u = normal(2, rows, columns, seed=seed) + 0.1
    hyperball = moved(W, u, kept, relative=True)
    torch.testing.assert_close(moved(W, 7 * u, kept, relative=True), hyperball, rtol=1e-4, atol=1e-5)
    assert (moved(W, 7 * u, kept, relative=False) - moved(W, u, kept, relative=False)).norm() > 1e-2
    normalized = norm(W, kept) * u / norm(u, kept)
    torch.testing.assert_close(moved(W, normalized, kept, relative=False), hyperball, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILD)
def test_rows_of_a_transposed_matrix_are_its_columns(name: str) -> None:
    weight, gradients = normal(8, 5, seed=0), [normal(8, 5, seed=1 + step) for step in range(5)]
    whole = steps(name, weight, gradients, sphere="row")
    stored = [gradient.T.contiguous() for gradient in gradients]
    for one, other in zip(steps(name, weight.T, stored, sphere="row", transposed=True), whole, strict=True):
        torch.testing.assert_close(one.T, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILD)
def test_a_matrix_that_starts_at_0_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer = '{name}': cannot train w, which starts at 0"):
        steps(name, torch.zeros(3, 2), [torch.ones(3, 2)])
    one_row = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ConfigError, match=f"optimizer = '{name}': cannot train w, which starts at 0"):
        steps(name, one_row, [torch.ones(2, 2)], sphere="row")
    assert steps(name, one_row, [torch.ones(2, 2)])[0].isfinite().all()


def test_width_factors_by_hand(tiny: Tiny) -> None:
    """Base 8, width 32. Hidden: R = sqrt(d_out), |dW| = lr R (aligned) or lr R / sqrt(min) (orthogonal).

    Adam: lr ~ sqrt(d_out / d_in) / sqrt(d_out) = d_in^-1/2 -> 1/2; Muon: sqrt(min / d_in) at a fixed aspect ratio -> 1.
    The head's R falls as 1 / sqrt(d), so that its rate stays. Steps of a plain optimizer's size have its factors.
    """
    lr = 2**-6
    for name, hidden, head in (
        ("hyperball", lr / 2, lr),
        ("muon-hyperball", lr, lr),
        ("sphere", lr / 4, lr / 4),
        ("muon-sphere", lr / 2, lr / 4),
    ):
        matrices = plan_run(tiny({"optimizer": name, "model.d_model": 32, "optim.lr": lr}), 17).matrices
        assert matrices["layers.0.self_attn.q_proj"].lr == pytest.approx(hidden)
        assert matrices["layers.0.mlp.down_proj"].lr == pytest.approx(hidden)
        assert matrices["lm_head"].lr == pytest.approx(head)
        assert matrices["lm_head"].optimizer == name.removeprefix("muon-")
        assert {matrix.weight_decay for matrix in matrices.values() if matrix.optimizer != "adamw"} == {0.0}
        assert (matrices["embed_tokens"].optimizer, matrices["embed_tokens"].weight_decay) == ("adamw", 0.1)


@settings(max_examples=50, derandomize=True)
@given(*[st.integers(1, 4096)] * 4, *[st.floats(1e-3, 1.0)] * 2)
def test_hyperballs_width_factor_is_that_of_the_relative_step(
    d_out: int, d_in: int, base_out: int, base_in: int, std: float, base_std: float
) -> None:
    """A plain step of AdamW has RMS ~ lr, and so has Muon's; on a matrix of RMS std it has relative size lr / std."""
    matrix, base = Matrix(d_out, d_in, std), Matrix(base_out, base_in, base_std)
    factor = {name: OPTIMIZERS[name].width_factor for name in BUILD}
    for plain, relative in (("sphere", "hyperball"), ("muon-sphere", "muon-hyperball")):
        one, other = factor[plain], factor[relative]
        assert one is not None
        assert other is not None
        assert other(matrix, base) == pytest.approx(one(matrix, base) / std * base_std)


def test_a_factor_on_the_matrix_is_refused_where_steps_are_relative(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"has no such width rule, which .*width_rule = multiplier needs"):
        plan_run(tiny({"optimizer": "hyperball", "parametrization.width_rule": "multiplier"}), 17)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("rule", ["lr_wd", "lr_sqrt_wd"])
def test_width_rules_for_decay_are_refused_without_decay(name: str, rule: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=f"has no such width rule, .*width_rule = {rule} needs"):
        plan_run(tiny({"optimizer": name, "parametrization.width_rule": rule}), 17)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("mode", ["independent", "corrected", "cautious", "timescale"])
def test_no_mode_of_decay_reaches_a_sphere(name: str, mode: str, tiny: Tiny) -> None:
    config = tiny({"optimizer": name, "optim.weight_decay_mode": mode, "train.steps": 40})
    matrices = plan_run(config, 17).matrices
    of_spheres = [matrix for matrix in matrices.values() if matrix.optimizer in BUILD]
    assert {(matrix.weight_decay, matrix.decay_rule) for matrix in of_spheres} == {(0.0, "plain")}
    rule = mode if mode in ("corrected", "cautious") else "plain"
    assert (matrices["embed_tokens"].optimizer, matrices["embed_tokens"].decay_rule) == ("adamw", rule)


@pytest.mark.parametrize("name", BUILD)
def test_a_stopped_run_goes_on_exactly_and_exports(name: str, tiny: Tiny, tmp_path: Path) -> None:
    groups = ["norms", "updates", *(["brownian"] if name in HYPERBALL else [])]
    config = tiny({"optimizer": name, "multipliers": "vector", "optim.sphere": "row", "train.diagnostics": groups})

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


@pytest.mark.parametrize("name", HYPERBALL)
def test_noise_turns_a_matrix_on_its_sphere(name: str, tiny: Tiny) -> None:
    """Independent directions: after T steps the start has shrunk to (1 + lr^2)^(-T / 2) along itself."""
    config = tiny({"optimizer": name, "optim.lr": 0.1, "parametrization.rule": "standard", "train.steps": 40})
    config = config.with_overrides({"schedule.name": "constant", "schedule.warmup_fraction": 0.0})
    rows = [(row, particle) for row, particle in particles(config, 17) if row.role.value == "gate_proj"]
    (motion,) = simulate(rows, config, 40).values()
    assert motion.norm[-1] == pytest.approx(motion.norm[0], rel=1e-5)
    assert motion.kept == pytest.approx(1.01**-20)
    assert math.isnan(motion.predicted)


def test_a_row_that_starts_at_0_is_refused_in_a_stack(tiny: Tiny) -> None:
    config = tiny({"optimizer": "sphere", "optim.sphere": "row"}).optim
    with pytest.raises(ConfigError, match=r"optim.sphere = 'row': a matrix, or a row, starts at 0"):
        sphere.StackedSphere(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), [(slice(0, 4), torch.Size([2, 2]))], config)


def test_steps_of_a_plain_size_have_no_noise_reference(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'sphere': has no noise reference, which the Brownian reference needs"):
        run(tiny({"optimizer": "sphere", "train.diagnostics": ["brownian"]}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_gains_that_stay_at_1_leave_the_sphere_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Magnitude-direction decoupling with frozen gains is the optimizer on the plain matrix."""
    frozen = {"multipliers": "softplus", "optim.multiplier_lr": 1e-30, "optim.multiplier_weight_decay": 0.0}
    alone = run(tiny({"optimizer": "muon-sphere"}), tmp_path / "a")
    with_gains = run(tiny({"optimizer": "muon-sphere", **frozen}), tmp_path / "b")
    assert with_gains.final_loss == pytest.approx(alone.final_loss, abs=1e-5)
    assert alone.final_loss < alone.initial_loss


def test_a_sweep_reports_it_beside_the_others(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        {"train.eval_every": 6},
        factors={"optimizer": ["adamw", "muon", *BUILD]},
        nuisance={"optim.lr": [0.01, 0.02, 0.04]},
        budget={"steps": 12, "batch_size": 4},
    )
    sweep(StudySpec.from_dict(study), tmp_path / "out", workers=0)
    assert main(["report", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    for label in ("AdamW", "Muon", "Hyperball", "Muon-Hyperball", "Sphere", "Muon-Sphere"):
        assert f"vectors · {label}" in report


@pytest.mark.parametrize(("name", "rule"), [("hyperball", "lr"), ("sphere", "lr"), ("muon-sphere", "multiplier")])
def test_the_coordinate_check_passes(name: str, rule: str, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--model.n_layers 1 --model.head_dim 16 --parametrization.base_d_model 16 --data.seq_len 32"
    options = f"--optimizer {name} --widths 64,128,256 --steps 6 --seeds 2 --optim.lr 0.05 --train.batch_size 8 {size}"
    constant = f"--parametrization.width_rule {rule} --schedule.name constant --schedule.warmup_fraction 0"
    device = "--trainer.accelerator cpu"
    assert main(["coord-check", *f"{options} {constant} {device}".split(), "--data.corpus", str(text_file)]) == 0
    assert "FAIL" not in capsys.readouterr().out

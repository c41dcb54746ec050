"""Brownian reference: how a run's optimizer moves parameters when gradients are pure noise.

Source: "Adam Brownian motion", arXiv:2601.04890 sec. 3 and fig. 1. Same parameter groups, optimizer code, learning-rate
schedule, decay and start as the run; gradients are independent N(0, 1) and are not clipped.

Parameters with the same start, optimizer, lr, decay and (under Muon) shape share one simulated representative. AdamW
updates entries independently: its representative is a vector of independent entries, so that a scalar multiplier has a
spread too. Muon's is a list of matrices of the real aspect ratio, with sides of at most `max_dim`. Their matched factor
0.2 sqrt(max(d_out, d_in)) is that of the reduced shape: entries of an orthogonal matrix have RMS 1 / sqrt(max), so that
an entry's update has the same size at every shape. The Newton-Schulz iteration still depends on the shape: it starts
from singular values over the Frobenius norm, about 1 / sqrt(min), and its result varies by up to 7 %. The lr of a
reduced matrix corrects this by `optim.noise`, at constant lr * decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_mult.config import RunConfig
from lit_mult.diagnostics.parts import rms
from lit_mult.errors import ConfigError
from lit_mult.method.plan import RunPlan, plan_run
from lit_mult.method.schedule import schedule_factor
from lit_mult.nn.llama import Llama
from lit_mult.optim.groups import ParameterPlan, parameter_groups, plan_parameters
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.optim.noise import Autocorrelation, NoiseReference
from lit_mult.registry import load
from lit_mult.registry.contracts import Axis
from lit_mult.registry.optimizers import OPTIMIZERS, optimizers_of, unsupported
from lit_mult.registry.roles import MATRIX_ROLES, Role, Shape

MAX_DIM = 256
"""Longest side of Muon's simulated matrices."""
ENTRIES = 2**14
"""Least number of entries of a representative: the RMS norm has a sampling error of 0.6 %."""
_POINTS = 100


@dataclass(frozen=True)
class Particle:
    """Everything that determines a parameter's motion under noise; equal ones share a representative."""

    optimizer: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    eps: float | None
    """Adam's epsilon, where it is not the run's."""
    start_std: float
    """Of matrices, which start at random; 0 for the others."""
    start_mean: float
    """Of multipliers and norm weights, which start at one value; 0 for matrices."""
    shape: Shape | None
    """(d_out, d_in) where the optimizer's update depends on the whole matrix."""


@dataclass(frozen=True)
class Motion:
    """Trajectory of a representative."""

    steps: list[int]
    """Optimizer steps done at each point; the first is 0, the last the end."""
    norm: list[float]
    """RMS of the entries at each point."""
    moved: float
    """RMS of the decayed sum of updates at the end: the entries minus the decayed start."""
    kept: float
    """Factor by which decay has shrunk the start: the product of 1 - lr * weight decay."""
    predicted: float
    """`moved` in closed form, over the run's schedule (`optim.noise`)."""
    equilibrium: float
    """RMS norm in closed form at which noise and decay balance at the peak lr: c sqrt(lr / (2 decay))."""


def particles(config: RunConfig, vocab_size: int) -> list[tuple[ParameterPlan, Particle]]:
    """Every trainable parameter (on the meta device) with its particle.

    Raises: as `plan_run` and `check_noise_references`.
    """
    check_noise_references(config)
    plan = plan_run(config, vocab_size)
    with torch.device("meta"):
        rows = plan_parameters(Llama(config.model, plan), plan)
    return [(row, _particle(row, plan)) for row in rows]


def _particle(row: ParameterPlan, plan: RunPlan) -> Particle:
    owner, _, part = row.name.rpartition(".")
    if row.role in MATRIX_ROLES:
        start = (plan.matrices[owner].init_std, 0.0)
    elif row.role is Role.MULTIPLIER:
        start = (0.0, plan.matrices[owner].start[Axis(part)])
    else:
        start = (0.0, 1.0)  # norm weights
    by_shape = _noise(row.optimizer).by_shape
    shape = (row.parameter.shape[0], row.parameter.shape[1]) if by_shape else None
    return Particle(row.optimizer, row.lr, row.weight_decay, row.eps, *start, shape=shape)


def simulate(
    rows: Iterable[tuple[ParameterPlan, Particle]],
    config: RunConfig,
    steps: int,
    max_dim: int = MAX_DIM,
    every: int | None = None,
    seed: int = 0,
) -> dict[Particle, Motion]:
    """Move a representative of every particle by noise for the first `steps` steps of a run.

    Args:
        rows: parameters with their particles.
        config: optimizer settings and schedule; `train.steps` is what the schedule is stretched over.
        steps: steps to take.
        max_dim: longest side of a matrix that stands for one of Muon's.
        every: steps from one point of the trajectories to the next; by default a hundredth of all.
        seed: of starts and gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    firsts = {particle: row for row, particle in reversed(list(rows))}
    members = {particle: _representative(particle, max_dim, generator) for particle in firsts}
    planned = []
    for particle, row in firsts.items():
        unit = _size_correction(particle, config, max_dim)
        lr, decay = row.lr * unit, row.weight_decay / unit
        planned += [replace(row, parameter=member, lr=lr, weight_decay=decay) for member in members[particle]]
    optimizer = HybridOptimizer(parameter_groups(planned), config.optim)  # the run's own grouping
    schedule = LambdaLR(optimizer, lambda step: schedule_factor(step, config.train.steps, config.schedule))

    starts = {particle: _joined(parameters) for particle, parameters in members.items()}
    recorded = {*range(0, steps, every or max(1, steps // _POINTS)), steps}
    at: list[int] = []
    norms: dict[Particle, list[float]] = {particle: [] for particle in members}
    factors: list[float] = []
    for step in range(steps + 1):
        if step in recorded:
            at.append(step)
            for particle, parameters in members.items():
                norms[particle].append(rms(_joined(parameters)))
        if step == steps:
            break
        for parameters in members.values():
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        factors.append(float(schedule.get_last_lr()[0] / schedule.base_lrs[0]))
        optimizer.step()
        schedule.step()

    motions = {}
    for particle, parameters in members.items():
        rates = [particle.lr * factor for factor in factors]
        kept = math.prod(_noise(particle.optimizer).kept(rate, particle.weight_decay) for rate in rates)
        closed_form = _autocorrelation(particle, config)
        motions[particle] = Motion(
            steps=at,
            norm=norms[particle],
            moved=rms(_joined(parameters) - kept * starts[particle]),
            kept=kept,
            predicted=closed_form.spread(rates, particle.weight_decay) if closed_form else math.nan,
            equilibrium=closed_form.equilibrium(particle.lr, particle.weight_decay) if closed_form else math.nan,
        )
    return motions


def reduced(shape: Shape, max_dim: int) -> Shape:
    """The shape with its longer side cut to `max_dim` and its aspect ratio kept, up to rounding."""
    scale = min(1.0, max_dim / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _representative(particle: Particle, max_dim: int, generator: torch.Generator) -> list[nn.Parameter]:
    shape = (ENTRIES,) if particle.shape is None else reduced(particle.shape, max_dim)
    copies = math.ceil(ENTRIES / math.prod(shape))  # enough entries, also from small matrices
    return [
        nn.Parameter(particle.start_mean + particle.start_std * torch.randn(shape, generator=generator))
        for _ in range(copies)
    ]


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([parameter.detach() for parameter in parameters])


def check_noise_references(config: RunConfig) -> None:
    """Raises: ConfigError when an optimizer of the run, or its decay, has no noise reference."""
    if config.optim.weight_decay_mode in ("corrected", "cautious"):
        lacks = "has no noise reference, which the Brownian reference needs: its decay is not lr * weight_decay"
        raise ConfigError("optim.weight_decay_mode", config.optim.weight_decay_mode, lacks)
    for name in optimizers_of(config.optimizer):
        _noise(name)


def _noise(optimizer: str) -> NoiseReference:
    path = OPTIMIZERS[optimizer].noise
    if path is None:
        raise unsupported(optimizer, "noise reference", "the Brownian reference")
    reference: NoiseReference = load(path)
    return reference


def _autocorrelation(particle: Particle, config: RunConfig) -> Autocorrelation | None:
    closed_form = _noise(particle.optimizer).autocorrelation
    return closed_form(config.optim, particle.shape or (1, 1)) if closed_form else None


def _size_correction(particle: Particle, config: RunConfig, max_dim: int) -> float:
    """Factor on the updates of the reduced shape that gives them the diffusion of the original shape."""
    if particle.shape is None or reduced(particle.shape, max_dim) == particle.shape:
        return 1.0
    whole = _autocorrelation(particle, config)
    small = _autocorrelation(replace(particle, shape=reduced(particle.shape, max_dim)), config)
    if whole is None or small is None:
        return 1.0
    return math.sqrt(whole.long_run_variance() / small.long_run_variance())

"""Which parameters of a run move like noise: a comparison with the Brownian reference of its optimizer.

**The statistic.** A step is w <- (1 - lr * decay) w - lr * u. So a run ends at w_T = kept * w_0 + moved: the decayed
start plus the decayed sum of all updates. The statistic compares `moved`, as RMS over entries,

    ratio = RMS(moved of the run) / RMS(moved of its Brownian reference).

At the balance of decay and noise (kept = 0), moved is the parameter itself, and the ratio is that of the norms in
arXiv:2601.04890 fig. 1. Before that, and for multipliers and norm weights, which hardly decay, moved excludes the
start, which is not learned. A ratio of 1 means that updates add up like independent ones; above 1, gradients agree over
steps; below 1, the loss pulls the parameter back.

**The verdict.** *trapped* when the ratio lies in the `noise_band` (10 %, widened for few entries: for a single scalar,
any ratio below 2.4); otherwise *free*. With few entries, *trapped* is weak evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.diagnostics.brownian import MAX_DIM, Motion, Particle, particles, simulate
from lit_mult.diagnostics.noise_band import TOLERANCE, noise_band
from lit_mult.diagnostics.parts import rms
from lit_mult.errors import UserError
from lit_mult.nn.llama import Llama
from lit_mult.optim.groups import ParameterPlan


@dataclass(frozen=True)
class Reference:
    """A trainable parameter of a run, and its Brownian reference."""

    row: ParameterPlan
    particle: Particle
    motion: Motion
    end: Tensor
    """The parameter at the end of the run."""
    moved: float
    """RMS of the decayed sum of its updates."""


def references(
    start: Llama, end: Llama, config: RunConfig, steps: int, max_dim: int = MAX_DIM, every: int | None = None
) -> list[Reference]:
    """Simulate the reference of every trainable parameter of a run, in the model's order.

    `start` (on the CPU) and `end` are the model before and after `steps` optimizer steps; the rest as for
    `brownian.simulate`.
    """
    rows = particles(config, len(end.embed_tokens.weight))
    motions = simulate(rows, config, steps, max_dim, every)
    found = []
    for row, particle in rows:
        motion, parameter = motions[particle], end.get_parameter(row.name).detach().cpu()
        moved = rms(parameter - motion.kept * start.get_parameter(row.name))
        found.append(Reference(row, particle, motion, parameter, moved))
    return found


@dataclass(frozen=True)
class Comparison:
    """A row of brownian.csv: one parameter of a run and its noise reference.

    Norms are the RMS over entries at the end of the run; lr is the peak lr. balance: norm at which noise and decay
    balance at this lr, in closed form; infinite without decay. kept: share of the start that remains. noise_predicted:
    noise_moved in closed form, over the run's schedule. low, high: bounds of ratio = moved / noise_moved for trapped.
    """

    name: str
    role: str
    shape: str
    optimizer: str
    lr: float
    weight_decay: float
    norm: float
    noise_norm: float
    balance: float
    kept: float
    moved: float
    noise_moved: float
    noise_predicted: float
    ratio: float
    low: float
    high: float
    verdict: Literal["trapped", "free"]


def compare(reference: Reference, tolerance: float = TOLERANCE) -> Comparison:
    """Compare a parameter with its reference. Raises: UserError when the run has diverged."""
    row, motion, end = reference.row, reference.motion, reference.end
    if not math.isfinite(reference.moved):
        raise UserError(f"{row.name}: is not finite at the end of the run, which has diverged")
    ratio = reference.moved / motion.moved
    low, high = noise_band(end.numel(), tolerance)
    return Comparison(
        name=row.name,
        role=row.role.value,
        shape="x".join(map(str, end.shape)) or "1",
        optimizer=row.optimizer,
        lr=row.lr,
        weight_decay=row.weight_decay,
        norm=rms(end),
        noise_norm=motion.norm[-1],
        balance=motion.equilibrium,
        kept=motion.kept,
        moved=reference.moved,
        noise_moved=motion.moved,
        noise_predicted=motion.predicted,
        ratio=ratio,
        low=low,
        high=high,
        verdict="trapped" if low <= ratio <= high else "free",
    )


def trajectories(found: list[Reference]) -> list[dict[str, Any]]:
    """Rows of brownian_motion.csv: parameters that share a reference (space-separated), step and norm."""
    names: dict[Particle, list[str]] = {}
    for reference in found:
        names.setdefault(reference.particle, []).append(reference.row.name)
    motions = {reference.particle: reference.motion for reference in reversed(found)}  # in the order of `simulate`
    return [
        {"parameters": " ".join(names[particle]), "step": step, "norm": norm}
        for particle, motion in motions.items()
        for step, norm in zip(motion.steps, motion.norm, strict=True)
    ]

"""Which parameters of a run move like noise: its end beside the Brownian reference of its optimizer.

**The statistic.** A step is w <- (1 - lr * decay) w - lr * u, so that the end of a run is w_T = kept * w_0 + moved:
what decay has left of the start, and the decayed sum of all updates. `moved` is compared, as RMS over entries,

    ratio = RMS(moved of the run) / RMS(moved of its Brownian reference).

Once the balance of decay and noise is reached (kept = 0), moved is the parameter itself and the ratio that of the norms
that arXiv:2601.04890 fig. 1 plots; before that, and for multipliers and norm weights, which hardly decay, it leaves out
the start, which says nothing about learning. 1 means that updates add up as independent ones do; more, that gradients
agree over steps; less, that the loss pulls the parameter back.

**The verdict.** *trapped* when the ratio lies in the `noise_band` of so many entries (the tolerance of 10 %, widened by
what chance does to few entries: a lone scalar's ratio may lie anywhere below 2.4); otherwise *free*. With few entries,
*trapped* is weak evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.diagnostics.brownian import MAX_DIM, Motion, Particle, particles, rms, simulate
from lit_mult.diagnostics.noise_band import TOLERANCE, noise_band
from lit_mult.diagnostics.parts import Reading, trainable_parts
from lit_mult.errors import UserError
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.training.trained import load_trained


@dataclass(frozen=True)
class Comparison:
    """One parameter of a run beside its Brownian reference."""

    name: str
    role: str
    shape: str
    optimizer: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    norm: float
    """RMS of the entries at the end of the run."""
    noise_norm: float
    """RMS of the entries of the reference at the same step."""
    balance: float
    """Closed form of the norm at which noise and decay balance at the peak lr; infinite without decay."""
    kept: float
    """Share of the start that decay has left."""
    moved: float
    """RMS of the decayed sum of updates."""
    noise_moved: float
    """The same of the reference."""
    noise_predicted: float
    """The same in closed form, over the run's schedule."""
    ratio: float
    """moved / noise_moved"""
    low: float
    """Bounds of the ratio for a verdict of trapped."""
    high: float
    verdict: Literal["trapped", "free"]


@dataclass(frozen=True)
class Reference:
    """A run beside noise: its parameters at the end, and the trajectories of the reference."""

    step: int
    comparisons: list[Comparison]
    trajectories: list[tuple[str, Motion]]
    """(names of the parameters that a representative stands for, joined by spaces; its motion)"""


def compare(folder: Path, max_dim: int = MAX_DIM, tolerance: float = TOLERANCE) -> Reference:
    """Compare every parameter of a finished run with the Brownian motion of its optimizer.

    Args:
        folder: folder of the run; of a study's cell, results/STUDY/cells/CELL.
        max_dim: longest side of a matrix that stands for one of Muon's, `optim.brownian`.
        tolerance: of the verdict.

    Raises:
        UserError: there is no finished run or its checkpoint cannot be used (`load_trained`), or it has diverged.
    """
    trained = load_trained(folder)
    config, vocab_size = trained.config, trained.corpus.vocab_size
    start = _start(config, vocab_size)
    rows = particles(config, vocab_size)
    motions = simulate(rows, config, trained.step, max_dim)

    comparisons = []
    for row, particle in rows:
        motion = motions[particle]
        end = trained.model.get_parameter(row.name).detach()
        moved = _moved(end, start.get_parameter(row.name), motion)
        if not math.isfinite(moved):
            raise UserError(f"{trained.checkpoint}: {row.name} holds values that are not numbers; the run has diverged")
        ratio = moved / motion.moved
        low, high = noise_band(end.numel(), tolerance)
        comparisons.append(
            Comparison(
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
                moved=moved,
                noise_moved=motion.moved,
                noise_predicted=motion.predicted,
                ratio=ratio,
                low=low,
                high=high,
                verdict="trapped" if low <= ratio <= high else "free",
            )
        )
    names: dict[Particle, list[str]] = {}
    for row, particle in rows:
        names.setdefault(particle, []).append(row.name)
    return Reference(trained.step, comparisons, [(" ".join(names[key]), motion) for key, motion in motions.items()])


def readings(model: Llama, config: RunConfig, vocab_size: int, steps: int) -> Iterator[tuple[int, Reading]]:
    """(step, reading) of the reference of every trainable parameter after `steps` steps: the group `brownian`.

    weight_noise_rms, row_noise_rms, ... are norms of the reference every `train.diagnostics_every` steps and at the
    end, where weight_moved and weight_noise_moved, ... are what the run and the reference have moved.
    """
    rows = particles(config, vocab_size)
    motions = simulate(rows, config, steps, every=config.train.diagnostics_every)
    by_name = {row.name: motions[particle] for row, particle in rows}
    start = _start(config, vocab_size)
    for part in trainable_parts(model):
        motion = by_name[part.parameter_name]
        for step, norm in zip(motion.steps, motion.norm, strict=True):
            yield step, (part.key("brownian", "noise_rms"), torch.tensor(norm))
        moved = _moved(part.parameter.detach().cpu(), start.get_parameter(part.parameter_name), motion)
        yield steps, (part.key("brownian", "moved"), torch.tensor(moved))
        yield steps, (part.key("brownian", "noise_moved"), torch.tensor(motion.moved))


def _moved(end: Tensor, start: Tensor, motion: Motion) -> float:
    return rms(end - motion.kept * start)


def _start(config: RunConfig, vocab_size: int) -> Llama:
    """The model as the run began with it."""
    plan = plan_run(config, vocab_size)
    model = Llama(config.model, plan)
    initialize(model, plan, config.seed)
    if config.model.pretrained is not None:
        from lit_mult.hf.pretrained import start_from_pretrained

        start_from_pretrained(model, plan, config)
    return model

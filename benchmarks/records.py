"""A made-up study of any size: records as a sweep leaves them, without training anything."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

from lit_mult.config import RunConfig, set_dotted
from lit_mult.schema import CellInfo, RunRecord

ARMS = {"muP": "fixed", "none": "none", "scalars": "scalar", "vectors": "vector"}
OPTIMIZERS = ("adamw", "muon")
WIDTHS = (32, 64, 128, 256, 512)
RATES = tuple(2.0**exponent for exponent in range(-9, -4))
CELLS_OF_A_SEED = len(ARMS) * len(OPTIMIZERS) * len(WIDTHS) * len(RATES)
INITIAL_LOSS, STEPS, LOG_EVERY = 5.5, 300, 10


def write_study(folder: Path, seeds: int, log_every: int = LOG_EVERY) -> int:
    """Write `seeds` times `CELLS_OF_A_SEED` records and the plan into an empty folder; the number of records.

    Losses are a parabola in log lr with noise of fixed draws; one run in fifty diverges. Curves have a point each
    `log_every` steps, of 300.
    """
    draw = random.Random(0)
    (folder / "records").mkdir(parents=True)
    points = list(itertools.product(ARMS, OPTIMIZERS, WIDTHS, RATES, range(seeds)))
    for arm, optimizer, width, lr, seed in points:
        record = _record(arm, optimizer, width, lr, seed, draw, log_every)
        # Not `RunRecord.write`, which waits for the disk: a sweep writes one record in minutes, this all at once.
        path = folder / "records" / f"{record['cell']['cell']}.json"
        path.write_text(json.dumps(record, indent=1))
    RunRecord.read(path)  # what is made up is what a run leaves
    arms = {arm: {"multipliers": kind} for arm, kind in ARMS.items()}
    plan = {"name": "growth", "title": "A made-up study", "cells": len(points), "spec": {"arms": arms}}
    (folder / "study.json").write_text(json.dumps(plan))
    return len(points)


def _record(
    arm: str, optimizer: str, width: int, lr: float, seed: int, draw: random.Random, log_every: int
) -> dict[str, Any]:
    factors, nuisance = {"optimizer": optimizer, "model.d_model": width}, {"optim.lr": lr, "seed": seed}
    config = RunConfig(multipliers=ARMS[arm]).to_dict()  # type: ignore[arg-type]
    for path, value in (factors | nuisance | {"train.steps": STEPS}).items():
        set_dotted(config, path, value)
    best = 3.0 - 0.2 * math.log2(width / 32) - 0.02 * list(ARMS).index(arm)
    loss = best + 0.02 * (math.log2(lr) + 7) ** 2 + draw.gauss(0, 0.01)
    diverged = draw.random() < 0.02
    noise = random.Random(seed)  # its own, so that losses do not depend on the length of curves
    at = range(0, STEPS + 1, log_every)
    curve = [(step, loss + (INITIAL_LOSS - loss) * 0.98**step + noise.gauss(0, 0.03)) for step in at]
    cell = f"{arm}-{optimizer}-{width}-{lr:g}-{seed}"
    return RunRecord.model_construct(
        status="diverged" if diverged else "completed",
        config=config,
        config_hash=f"{hash((arm, optimizer, width, lr, seed)) & (2**64 - 1):016x}",
        seed=seed,
        cell=CellInfo(study="growth", cell=cell, arm=arm, sampler="grid", factors=factors, nuisance=nuisance),
        git_commit="0" * 40,
        versions={"python": "3", "torch": "2"},
        device="none",
        started_at="2026-01-01T00:00:00+00:00",
        corpus_hash="0" * 16,
        train_tokens_available=10**6,
        parameters={"total": 50 * width**2, "non_embedding": 48 * width**2, "multipliers": 10 * width},
        steps=STEPS,
        tokens=2048 * STEPS,
        wall_seconds=2.0,
        tokens_per_second=1024.0 * STEPS,
        initial_loss=INITIAL_LOSS,
        final_loss=None if diverged else loss,
        best_loss=INITIAL_LOSS if diverged else loss,
        final_bits_per_byte=None if diverged else loss / math.log(2),
        train_curve=curve[1:],
        val_curve=curve[::5],
    ).model_dump(mode="json")

"""A study for the page of a report: hostile names, a diverged run, diagnostics, and losses with a known optimum."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas as pd
from record_data import INITIAL_LOSS, make_record

from lit_mult.config import RunConfig
from lit_mult.diagnostics.keys import COLUMNS
from lit_mult.schema import CellInfo

TITLE = '<script>alert(1)</script> & "both" </title>'
ARMS = {"muP": "fixed", "</style><b>v": "vector"}
RATES = tuple(2.0**power for power in (-9, -8, -7, -6, -5))
SEEDS = (0, 1, 2)
WIDTHS = (32, 64)


def write_page_study(folder: Path) -> None:
    """2 arms x 2 optimizers x 2 widths x 5 rates x 3 seeds: 120 runs, of which one diverged; two have diagnostics."""
    draw = random.Random(0)
    (folder / "records").mkdir(parents=True)
    for number, (arm, kind) in enumerate(ARMS.items()):
        for optimizer in ("adamw", "muon"):
            for width in WIDTHS:
                for seed in SEEDS:
                    for rate in RATES:
                        best = 3.4 - 0.1 * math.log2(width) - 0.05 * number - 0.03 * (optimizer == "muon")
                        loss = best + 0.04 * (math.log2(rate) + 7.3) ** 2 + draw.gauss(0, 0.01)
                        diverges = (number, optimizer, width, seed, rate) == (0, "adamw", 32, 0, RATES[-1])
                        _write(folder, arm, kind, optimizer, width, rate, seed, None if diverges else loss)
    for seed in (0, 1):
        _write_diagnostics(folder, f"0-adamw-32-{RATES[2]:g}-{seed}")
    arms = {arm: {"multipliers": kind} for arm, kind in ARMS.items()}
    of, against = reversed(ARMS)
    spec = {"arms": arms, "questions": [{"of": of, "against": against}]}
    (folder / "study.json").write_text(json.dumps({"name": "demo", "title": TITLE, "cells": 120, "spec": spec}))


def _write(
    folder: Path, arm: str, kind: str, optimizer: str, width: int, rate: float, seed: int, loss: float | None
) -> None:
    number = list(ARMS).index(arm)
    factors, nuisance = {"optimizer": optimizer, "model.d_model": width}, {"optim.lr": rate, "seed": seed}
    watched = {"train.diagnostics": ["norms"]} if (number, optimizer, width, rate) == (0, "adamw", 32, RATES[2]) else {}
    config = RunConfig(multipliers=kind).with_overrides(factors | nuisance | watched)  # type: ignore[arg-type]
    cell = f"{number}-{optimizer}-{width}-{rate:g}-{seed}"
    end = loss if loss is not None else INITIAL_LOSS
    curve = [(step, end + (INITIAL_LOSS - end) * 0.97**step) for step in range(0, 201, 10)]
    record = make_record(
        config,
        loss,
        cell=CellInfo(study="demo", cell=cell, arm=arm, sampler="grid", factors=factors, nuisance=nuisance),
        train_curve=curve[1:],
        val_curve=curve[::10],
        device="<b>cpu</b>",
    )
    record.write(folder / "records" / f"{cell}.json")


def _write_diagnostics(folder: Path, cell: str) -> None:
    (folder / "diagnostics").mkdir(exist_ok=True)
    readings = [
        (step, "norms", "weight_rms", f"layers.{layer}.self_attn.{role}", layer, role, 1.0 + layer + step / 100)
        for step in (0, 100, 200)
        for layer in (0, 1)
        for role in ("q_proj", "o_proj")
    ]
    table = pd.DataFrame(readings, columns=list(COLUMNS)).astype({"layer": "Int64"})
    table.to_parquet(folder / "diagnostics" / f"{cell}.parquet")

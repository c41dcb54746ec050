"""Differences that the declared questions of a study ask about."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.schema import Question

_COLUMNS = ["question", "within", "seed", "difference"]


def differences_by_seed(runs: pd.DataFrame, question: Question) -> pd.DataFrame:
    """A row a seed, and a value of the factors that the question leaves open: mean difference over its `over` factors.

    Args:
        runs: from `load_records` or `frame_of`.
        question: what to compare.

    Returns:
        Columns question, within, seed and difference (nats per token). The best rate of a line at a width has the
        lowest mean loss over its seeds, among the rates that all of them have.
    """
    values: list[dict[str, Any]] = []
    for (arm, factors), group in runs.groupby(["arm", "factors"], sort=False):
        value = {"arm": arm, **json.loads(str(factors))}
        for seed, loss in _by_seed(group, question).items():
            values.append({"factors": value, "seed": seed, "value": loss})
    found: dict[tuple[str, int], list[float]] = {}
    levels: dict[str, set[str]] = {}
    for one in values:
        for other in values:
            of, against = one["factors"], other["factors"]
            free = [name for name in of if name not in {**question.of, **question.against}]
            if (
                one["seed"] == other["seed"]
                and question.of.items() <= of.items()
                and question.against.items() <= against.items()
                and all(of[name] == against[name] for name in free)
            ):
                within = ", ".join(f"{name} {of[name]}" for name in free if name not in question.over)
                levels.setdefault(within, set()).add(str([of[name] for name in free if name in question.over]))
                found.setdefault((within, int(one["seed"])), []).append(one["value"] - other["value"])
    text = f"{question.of} - {question.against}"
    rows = [
        (text, within, seed, float(np.mean(differences)))
        for (within, seed), differences in found.items()
        if len(differences) == len(levels[within])
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _by_seed(runs: pd.DataFrame, question: Question) -> dict[int, float]:
    capped = runs.assign(loss=runs[["final_loss", "initial_loss"]].min(axis=1))
    if question.measure != "best_loss":
        planned = capped[~capped["added"] & ~capped["refines"]]["lr"].unique()
        losses = capped[capped["lr"].isin(planned)].pivot_table(
            index="seed", columns="lr", values="loss", aggfunc="min"
        )
        losses = losses.dropna()
        means = losses.mean(axis=1)
        return dict(means - losses.min(axis=1) if question.measure == "sensitivity" else means)
    losses = runs.assign(loss=runs["final_loss"].fillna(math.inf)).pivot_table(
        index="seed", columns=["lr", "nuisance"], values="loss", aggfunc="min"
    )
    losses = losses.dropna(axis=1)
    means = losses.mean()
    return dict(losses[means.idxmin()]) if len(means) and math.isfinite(means.min()) else {}

"""Parameters of runs by kind, with their readings side by side: what experiments that compare with noise share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lit_mult.analysis.evidence import Evidence
from lit_mult.config import ModelConfig
from lit_mult.registry.roles import Role
from lit_mult.schema import RunRecord

KINDS = {
    "query, key": "#0072B2",
    "value, output": "#56B4E9",
    "MLP": "#009E73",
    "embedding": "#E69F00",
    "LM head": "#D55E00",
    "row multipliers": "#CC79A7",
    "column multipliers": "#882255",
    "scalar multipliers": "#7F7F7F",
    "RMSNorm weights": "#999933",
}
"""Kind of a parameter -> colour in figures; from matrices to vectors."""
HIDDEN = ("query, key", "value, output", "MLP")
MATRICES = (*HIDDEN, "embedding", "LM head")
MULTIPLIERS = ("row multipliers", "column multipliers", "scalar multipliers")

_PARTS = {"row": MULTIPLIERS[0], "column": MULTIPLIERS[1], "scalar": MULTIPLIERS[2], "norm": "RMSNorm weights"}
_MATRICES: dict[str, str] = {
    **dict.fromkeys((Role.Q_PROJ, Role.K_PROJ), HIDDEN[0]),
    **dict.fromkeys((Role.V_PROJ, Role.O_PROJ), HIDDEN[1]),
    **dict.fromkeys((Role.GATE_PROJ, Role.UP_PROJ, Role.DOWN_PROJ), HIDDEN[2]),
    Role.EMBEDDING: "embedding",
    Role.LM_HEAD: "LM head",
}


def parameters(evidence: Evidence, *measures: str) -> pd.DataFrame:
    """A row for each parameter of a run and step; a column for each measure, such as noise_rms, NaN where not read.

    Other columns: name of the module, its role, part (weight, row, column, scalar, norm), kind (of `KINDS`), and those
    of `evidence.runs`. The measures of a weight are the quantities weight_rms, weight_noise_rms and so on.
    """
    named = evidence.readings["quantity"].str.partition("_")
    found = evidence.readings[["cell", "step", "name", "role", "value"]].assign(part=named[0], measure=named[2])
    found = found[found["part"].isin(["weight", *_PARTS]) & found["measure"].isin(measures)]
    wide = found.pivot(index=["cell", "step", "name", "role", "part"], columns="measure", values="value")
    wide = wide.reindex(columns=list(measures)).rename_axis(columns=None).reset_index()
    kind = wide["part"].map(_PARTS).fillna(wide["role"].map(_MATRICES))
    wide["kind"] = pd.Categorical(kind, list(KINDS))  # to be sorted in this order
    return evidence.runs.merge(wide, on="cell")


def beside_noise(parameters: pd.DataFrame) -> pd.DataFrame:
    """The parameters at the end of each completed run, with ratio: what they moved over what pure noise did.

    See `training.trapped` for the ratio. A diverged run has no end to compare.
    """
    end = parameters[parameters["final_loss"].notna()].dropna(subset=["moved", "noise_moved"])  # read at the end alone
    return end.assign(ratio=end["moved"] / end["noise_moved"])


def entries(record: RunRecord, name: str, role: str, part: str) -> int:
    """How many numbers a parameter of a run is made of."""
    model = ModelConfig.model_validate(record.config["model"])
    if part == "norm":
        return 1 if name == "norm" and model.final_norm == "scalar" else model.d_model
    embeddings = record.parameters["total"] - record.parameters["non_embedding"]  # of the embedding and the head
    vocab_size = embeddings // model.d_model // (1 if model.tie_embeddings else 2)
    d_out, d_in = model.matrix_shapes(vocab_size)[Role(role)]
    return {"weight": d_out * d_in, "row": d_out, "column": d_in, "scalar": 1}[part]


def geometric_mean(values: pd.Series) -> float:
    """Of values above 0; NaN for none."""
    return math.exp(np.log(values).mean())


def kinds_drawn(kinds: Iterable[str]) -> list[str]:
    """The different kinds, in the order of `KINDS`."""
    present = set(kinds)
    return [kind for kind in KINDS if kind in present]

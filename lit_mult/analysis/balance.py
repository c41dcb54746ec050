"""Columns of `frame.load_records` on the balance of noise and weight decay: from the record, or from its config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from lit_mult.config import RunConfig
from lit_mult.errors import UserError
from lit_mult.method.plan import plan_run
from lit_mult.method.regime import matrix_regimes
from lit_mult.registry.roles import HIDDEN_ROLES, Role

_ANY_VOCABULARY: Final = 256
"""Rates and decays do not depend on it."""
_DECISIVE: Final = ("optimizer", "parametrization", "optim", "schedule")
"""Parts of a config that decide, with the model and the number of steps."""
_MEASURES: Final = {"decay_times": "decay_times", "equilibrium": "equilibrium_time"}
"""Start of the columns' names -> field of `schema.MatrixRegime`."""


def balance_columns(record: Mapping[str, Any]) -> dict[str, float]:
    """Decay times and equilibrium times of a run; NaN where there are none.

    `decay_times_hidden_low` and `_high` are the smallest and the largest over the roles of hidden matrices,
    `decay_times_head` and `decay_times_embedding` those of one role: lr * weight_decay * steps (see
    `schema.MatrixRegime`). `equilibrium_hidden_low`, `equilibrium_head` and so on are equilibrium times in steps.
    """
    if recorded := record.get("regime"):
        return _columns(recorded)
    config = record["config"]
    # Layers are all alike, and multipliers have no say in the rates of their matrix: many runs have equal parts.
    part = {name: config[name] for name in _DECISIVE}
    part |= {"model": {**config["model"], "n_layers": 1}, "train": {"steps": config["train"]["steps"]}}
    key = repr(part)
    if key not in _derived:
        _derived[key] = _columns(_planned(part))
    return _derived[key]


_derived: dict[str, dict[str, float]] = {}
"""Columns of older records, by the part of the config that decides."""


def _planned(config: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    try:
        run = RunConfig.from_dict(config)
        regimes = matrix_regimes(run, plan_run(run, _ANY_VOCABULARY))
    except UserError:  # of an optimizer or a preset file that is not at hand
        return {}
    return {role: regime.model_dump() for role, regime in regimes.items()}


def _columns(regimes: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    columns = dict[str, float]()
    for start, field in _MEASURES.items():
        values = {role: math.nan if (value := regime[field]) is None else value for role, regime in regimes.items()}
        hidden = [value for role, value in values.items() if role in HIDDEN_ROLES and not math.isnan(value)]
        columns |= {
            f"{start}_hidden_low": min(hidden, default=math.nan),
            f"{start}_hidden_high": max(hidden, default=math.nan),
            f"{start}_head": values.get(Role.LM_HEAD, math.nan),
            f"{start}_embedding": values.get(Role.EMBEDDING, math.nan),
        }
    return columns

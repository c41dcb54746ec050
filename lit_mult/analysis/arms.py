"""What arms are, in words: for legends, and for readers who do not know the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lit_mult.analysis.frame import optimizer_name
from lit_mult.config import OPEN_FIELDS, flatten
from lit_mult.registry.kinds import KINDS
from lit_mult.schema import RunRecord

_KIND = "multipliers"
_RULES = {"standard": "standard parametrization", "mup": "muP"}
_DEPTH_RULES = {"none": "", "depth_mup": "depth-muP", "completep": "CompleteP", "hyperp": "HyperP"}
_TOLD: dict[str, Callable[[str], str]] = {
    _KIND: lambda kind: KINDS[kind].label if kind in KINDS else kind,
    "optimizer": optimizer_name,
    "parametrization.rule": lambda rule: _RULES[rule],
    "parametrization.preset": lambda preset: "" if preset == "neutral" else f"preset {preset}",
    "parametrization.tier": lambda tier: f"tier {tier}",
    "parametrization.depth_rule": lambda rule: _DEPTH_RULES[rule],
    "parametrization.width_rule": lambda rule: f"width rule {rule}",
    "placement.table": lambda table: f"{table} placement",
    "optim.weight_decay_mode": lambda mode: "" if mode == "coupled" else f"{mode} decay",
}
"""Field -> words for its value; none for a value that is what one expects."""
_BY_ROLE = ("parametrization.", "placement.")  # sections whose fields have words of their own, above
_OPEN = tuple(f"{field}." for field in OPEN_FIELDS)
_OF_ROLE = re.compile(r"parametrization\.(forward|lr|weight_decay)\.")
_PLACED = "placement.overrides."
_LONGEST = 84
"""Letters of the words for an arm; three dots stand for what does not fit."""


def differing_fields(runs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Dotted field in which the configs of arms differ -> arm -> value; without factors, nuisance factors and the seed.

    `runs` are those of `load_records`.

    Raises:
        UserError: a record has gone or is damaged.
    """
    return _differing(*_configs(runs))


def arm_words(runs: pd.DataFrame) -> dict[str, str]:
    """Arm -> what it is, from the fields in which arms differ, as in "learnable row + column multipliers".

    Words that its name has already are left out; there may be none, as for records in memory (`frame.frame_of`). Of a
    single arm its kind of multipliers is said.

    Raises:
        UserError: a record has gone or is damaged.
    """
    if "path" not in runs:
        return {str(arm): "" for arm in runs["arm"].unique()}
    configs, varied = _configs(runs)
    if len(configs) == 1:
        differing = {_KIND} - varied
    else:  # records of older versions lack some fields, which says nothing
        everywhere = set.intersection(*map(set, configs.values()))
        differing = {name for name in _differing(configs, varied) if name in everywhere or name.startswith(_OPEN)}
    return {arm: _words(arm, config, differing) for arm, config in configs.items()}


def arm_labels(runs: pd.DataFrame) -> dict[str, str]:
    """Arm -> text of a legend: its name and `arm_words`, as in "vectors: learnable row + column multipliers"."""
    return {arm: f"{arm}: {words}" if words else arm for arm, words in arm_words(runs).items()}


def _configs(runs: pd.DataFrame) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Arm -> flat config of its first run, and the fields that vary within arms."""
    records = {str(arm): RunRecord.read(Path(group["path"].iloc[0])) for arm, group in runs.groupby("arm", sort=False)}
    cells = [record.cell for record in records.values() if record.cell]
    varied = {"seed", *(name for cell in cells for name in (cell.factors | cell.nuisance))}
    return {arm: flatten(record.config) for arm, record in records.items()}, varied


def _differing(configs: Mapping[str, Mapping[str, Any]], varied: set[str]) -> dict[str, dict[str, Any]]:
    fields = dict.fromkeys(name for config in configs.values() for name in config if name not in varied)
    values = {name: {arm: config.get(name) for arm, config in configs.items()} for name in fields}
    return {name: by_arm for name, by_arm in values.items() if len(set(map(str, by_arm.values()))) > 1}


def _words(arm: str, config: Mapping[str, Any], differing: set[str]) -> str:
    parts = [part for part in _parts(config, differing) if part.partition(" (")[0].casefold() not in arm.casefold()]
    shown = parts[:1]
    for part in parts[1:]:
        if len(", ".join([*shown, part])) > _LONGEST:
            shown.append("…")
            break
        shown.append(part)
    return ", ".join(shown)


def _parts(config: Mapping[str, Any], differing: set[str]) -> Iterator[str]:
    """Words for the fields of a config that differ, the most telling first."""
    for field, words in _TOLD.items():
        if field in differing and (part := words(config[field])):
            yield part
    by_role = {"forward": "start"} if config.get("placement.init") == "preset" else {}  # or else they say nothing new
    by_role |= {"lr": "rates", "weight_decay": "decays"}
    of_roles = {name.split(".")[1] for name in differing & config.keys() if _OF_ROLE.match(name)}
    if set_by_role := [words for field, words in by_role.items() if field in of_roles]:
        yield f"{' and '.join(filter(None, (', '.join(set_by_role[:-1]), set_by_role[-1])))} by role"
    placed = dict[str, list[str]]()
    for name in sorted(differing & config.keys()):
        if name.startswith(_PLACED):
            placed.setdefault(str(config[name]), []).append(name.removeprefix(_PLACED))
    for axes, matrices in placed.items():
        yield f"{axes} on {', '.join(matrices)}"
    for name in config:
        if name in differing and name not in _TOLD and not name.startswith(_BY_ROLE):
            yield _said(name.rpartition(".")[2].replace("_", " "), config[name])


def _said(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

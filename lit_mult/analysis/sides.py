"""What `lit-mult compare` puts side by side: folders of runs or studies, or parts of them.

    FOLDER[:ARM][@FIELD=VALUE[,FIELD=VALUE...]]

`results/pays:vectors@optimizer=muon` are the runs of one arm under Muon.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lit_mult.analysis.frame import frame_of, kind_rank
from lit_mult.config import OPEN_FIELDS, RunConfig, field_names
from lit_mult.errors import UserError, did_you_mean, one_of
from lit_mult.layout import find_records
from lit_mult.numbers import read_number
from lit_mult.schema import WIDTH, CellInfo, RunRecord

CORPUS = "corpus"
"""The factor of runs on different texts, or on other tokens of one."""
_OF_A_RUN = ("optimizer", WIDTH)
_MISSING = object()


@dataclass
class _Side:
    """The runs of one arm of a folder."""

    folder: Path
    arm: str
    fixed: dict[str, str]
    records: list[tuple[Path, RunRecord]]

    def values(self, field: str) -> list[Any]:
        """The different values that a config field has in these runs."""
        return list({repr(value): value for value in (_value(record, field) for _, record in self.records)}.values())


def load_sides(sides: Sequence[str]) -> pd.DataFrame:
    """The runs of all sides as one table of `frame.load_records`, whose `arm` names the side; in the order given.

    The scientific factors are those of any of the studies but the fields that a side fixes, and those that have one
    value in each side; of them and of the learning rate, a run outside a study has its config's. A folder of several
    arms is a side for each of them. Where texts or tokenizers of equal runs differ, these are a factor, `corpus`:
    losses on them do not compare.

    Raises:
        UserError: a folder has no records, or none of that arm or value; two sides are the same, or there is only one;
            a field is fixed by one side and varies in another; or runs of a side differ in what is no factor.
    """
    found = [side for text in sides for side in _read(text)]
    names = _names(found)
    if len(found) < 2:
        raise UserError(f"{', '.join(names)}: nothing to compare it with; give two sides or more")
    fixed = {field for side in found for field in side.fixed}
    for name, side in zip(names, found, strict=True):
        for field in fixed:
            if len(values := side.values(field)) > 1:
                choices = ", ".join(f"{name}{',' if side.fixed else '@'}{field}={value}" for value in values)
                raise UserError(f"{name}: has several values of {field}, which another side fixes; give {choices}")
    of_studies = {field for side in found for _, record in side.records for field in _factors(record)}
    same_within = {field for field in of_studies if all(len(side.values(field)) == 1 for side in found)}
    factors = sorted(of_studies - fixed - same_within)
    runs = [(name, path, record) for name, side in zip(names, found, strict=True) for path, record in side.records]
    values = [{field: _value(record, field) for field in factors} for *_, record in runs]
    corpora = _corpora([record for *_, record in runs], values)
    records, paths, places = list[RunRecord](), list[Path](), dict[str, Path]()
    for (name, path, record), own in zip(runs, values, strict=True):
        cell = _cell(record, name, str(len(records)), own | corpora.get(record.corpus_hash, {}))
        records.append(record.model_copy(update={"cell": cell}))
        paths.append(path)
        place = json.dumps([name, cell.factors, cell.nuisance, record.seed], sort_keys=True)
        if places.setdefault(place, path) != path:
            raise UserError(f"{path} and {places[place]}: two runs of {name} at equal lr and seed; name one of them")
    frame = frame_of(records)
    frame["path"] = [str(paths[int(cell)]) for cell in frame["cell"]]
    return frame.sort_values("arm", key=lambda arms: arms.map(names.index), kind="stable").reset_index(drop=True)


def _read(text: str) -> Iterator[_Side]:
    where, _, filters = text.partition("@")
    folder, arm = Path(where), ""
    if not folder.exists():
        before, _, arm = where.rpartition(":")
        folder = Path(before or where)
    fixed = dict(_filter(text, part) for part in filters.split(",") if part)
    read = [(path, RunRecord.read(path)) for path in find_records(folder)]
    if not read:
        raise UserError(f"{folder}: no run records here; give FOLDER, FOLDER:ARM or FOLDER:ARM@FIELD=VALUE")
    for field, value in fixed.items():
        kept = [(path, record) for path, record in read if _is(_value(record, field), value)]
        if not kept:
            there = dict.fromkeys(str(_value(record, field)) for _, record in read)
            raise UserError(f"{text}: no run has {field} = {value}; there are {one_of(value, there)}")
        read = kept
    by_arm: dict[str, list[tuple[Path, RunRecord]]] = {}
    for path, record in read:
        by_arm.setdefault(record.cell.arm if record.cell else record.config["multipliers"], []).append((path, record))
    if arm and arm not in by_arm:
        raise UserError(f"{text}: no arm {arm} in {folder}; there are {one_of(arm, by_arm)}")
    for name in [arm] if arm else sorted(by_arm, key=lambda name: (_rank(by_arm[name]), name)):
        yield _Side(folder, name, fixed, by_arm[name])


def _rank(records: Sequence[tuple[Path, RunRecord]]) -> float:
    """Of an arm, as in reports."""
    return min(kind_rank(record.config["multipliers"]) for _, record in records)


def _filter(text: str, part: str) -> tuple[str, str]:
    field, sign, value = part.partition("=")
    if not sign:
        raise UserError(f"{text}: {part} must be FIELD=VALUE, as in optimizer=muon")
    return field, value


def _names(sides: Sequence[_Side]) -> list[str]:
    """The shortest names that tell all sides apart. Raises: UserError when two are the same."""
    folders = len({side.folder.resolve() for side in sides}) > 1
    lone = Counter(side.folder.resolve() for side in sides)
    names = []
    for side in sides:
        folder, values = side.folder.resolve(), ", ".join(side.fixed.values())
        arm = folder.name if folders and lone[folder] == 1 else f"{folder.name}:{side.arm}" if folders else side.arm
        names.append(f"{arm} {values}".strip())
    if len(set(names)) < len(names):
        names = [f"{side.folder}:{side.arm}{'@' * bool(side.fixed)}{_text(side.fixed)}" for side in sides]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{name}: is given twice")
    return names


def _text(fixed: Mapping[str, str]) -> str:
    return ",".join(f"{field}={value}" for field, value in fixed.items())


def _corpora(records: Sequence[RunRecord], factors: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Corpus hash -> the factor `corpus` of its runs; empty where runs at equal factors are of one corpus."""
    settings = {(json.dumps(own), record.corpus_hash) for record, own in zip(records, factors, strict=True)}
    if len(settings) == len({setting for setting, _ in settings}):
        return {}
    words = {record.corpus_hash: "{corpus} as {tokenizer}".format(**record.config["data"]) for record in records}
    told = Counter(words.values())
    return {name: {CORPUS: text if told[text] == 1 else f"{text} ({name})"} for name, text in words.items()}


def _cell(record: RunRecord, side: str, name: str, values: dict[str, Any]) -> CellInfo:
    if record.cell is not None:
        return record.cell.model_copy(update={"study": "compare", "cell": name, "arm": side, "factors": values})
    nuisance = {"optim.lr": record.config["optim"]["lr"], "seed": record.seed}
    return CellInfo(study="compare", cell=name, arm=side, sampler="grid", factors=values, nuisance=nuisance)


def _factors(record: RunRecord) -> Sequence[str]:
    return list(record.cell.factors) if record.cell else _OF_A_RUN


def _value(record: RunRecord, field: str) -> Any:
    """Value of a config field of a run; of its cell, where that has it."""
    if record.cell is not None and field in (varied := record.cell.factors | record.cell.nuisance):
        return varied[field]
    for value in (record.config, _defaults()):  # of fields that were added later, the default
        for part in field.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is not _MISSING:
            return value
    if field.startswith(tuple(f"{name}." for name in OPEN_FIELDS)):
        return 1.0 if field.startswith("parametrization.") else None
    raise UserError(f"{field}: unknown field{did_you_mean(field, field_names(RunConfig))}")


@cache
def _defaults() -> Any:
    return RunConfig().to_dict()


def _is(value: Any, text: str) -> bool:
    try:
        return str(value) == text or value == yaml.safe_load(text) or value == float(read_number(text))
    except (ValueError, yaml.YAMLError):
        return False

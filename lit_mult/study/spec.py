"""A study as data: which runs it consists of. Read from a YAML file in sweeps/ or of the user's."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from lit_mult.config import OPEN_FIELDS, RunConfig, config_error
from lit_mult.errors import ConfigError, UserError
from lit_mult.record import CellInfo

_NAME = r"[A-Za-z0-9][\w.-]*"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PowersOfTwo(_Part):
    """A grid given by its exponents: `{log2: [-9, -7.5, -6]}`."""

    log2: list[float] = Field(min_length=1)

    @property
    def values(self) -> list[float]:
        return [2.0**exponent for exponent in self.log2]


class Distribution(_Part):
    """A range to sample from: `{low: 1e-3, high: 1e-1, log: true}`."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high <= self.low:
            raise ConfigError("nuisance high", self.high, f"must be above low = {self.low}")
        if self.log and self.low <= 0:
            raise ConfigError("nuisance low", self.low, "must be above 0 with log: true")
        return self


def _kind_of_grid(value: Any) -> str:
    if isinstance(value, list):
        return "list"
    return "log2" if isinstance(value, PowersOfTwo) or (isinstance(value, dict) and "log2" in value) else "range"


Grid = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[PowersOfTwo, Tag("log2")] | Annotated[Distribution, Tag("range")],
    Discriminator(_kind_of_grid),
]
"""Values of a nuisance factor: a list, powers of two, or a range to sample from."""


class Budget(_Part):
    """What every cell may spend; the same for every arm."""

    steps: int = Field(gt=0)
    """Optimizer steps of a cell."""
    batch_size: int = Field(gt=0)
    """Sequences in one step."""
    trials: int | None = Field(None, gt=0)
    """Cells for each point of the scientific factors, over all seeds; with samplers other than grid."""


class StudySpec(_Part):
    """A full design: arms x factors x seeds, and for each of these points a search over the nuisance factors.

    The words are those of the deep-learning tuning playbook: scientific factors are what the study asks about,
    nuisance factors are optimized away within each point so that points compare at their best.
    """

    name: str = Field(pattern=f"^{_NAME}$")
    """Name of the study and of its results folder."""
    title: str = ""
    """One line for figures and reports."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fixed values: part of a run config, shared by all cells."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """Arm -> dotted config fields that make it. A nuisance factor that an arm sets is fixed for that arm."""
    factors: dict[str, list[Any]] = Field(default_factory=dict)
    """Scientific factor (dotted config field) -> its values."""
    nuisance: dict[str, Grid] = Field(default_factory=dict)
    """Nuisance factor (dotted config field) -> a grid (list or log2) or a distribution."""
    seeds: list[int] = Field(min_length=1)
    """Each cell's `seed`; arms share it, hence the initial matrices and the order of the data."""
    budget: Budget
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """How the nuisance factors are searched: grid (complete), or Optuna's random or TPE sampler."""
    keep_checkpoints: bool = False
    """Keep the final checkpoint of every cell under cells/."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", self.seeds, "must not repeat")
        known = _fields(RunConfig)
        named: dict[str, dict[str, Any]] = {"factors": dict(self.factors), "nuisance": dict(self.nuisance)}
        for group, names in (named | {f"arms.{arm}": overrides for arm, overrides in self.arms.items()}).items():
            for name in names:
                if name not in known and not name.startswith(tuple(f"{field}." for field in OPEN_FIELDS)):
                    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                    hint = f"; did you mean {close[0]}?" if close else ""
                    raise ConfigError(f"{group}.{name}", names[name], f"no such field of a run config{hint}")
                if name in _SET_BY_THE_STUDY:
                    raise ConfigError(f"{group}.{name}", names[name], f"is set by {_SET_BY_THE_STUDY[name]}")
        for arm in self.arms:
            if not re.fullmatch(_NAME, arm):
                raise ConfigError(f"arms.{arm}", "...", "an arm's name holds letters, digits, '_', '.' and '-' only")
        for name, values in self.factors.items():
            if not values:
                raise ConfigError(f"factors.{name}", values, "an empty grid; give at least one value")
            if _repeats(values):
                raise ConfigError(f"factors.{name}", values, "must not repeat a value")
        for name, grid in self.nuisance.items():
            if name in self.factors:
                raise ConfigError(f"nuisance.{name}", "...", "is a scientific factor too; name it once")
            if grid == []:
                raise ConfigError(f"nuisance.{name}", grid, "an empty grid; give at least one value")
            if _repeats(grid_values(grid)):
                raise ConfigError(f"nuisance.{name}", grid_values(grid), "must not repeat a value")
            if isinstance(grid, Distribution) and self.sampler == "grid":
                raise ConfigError(f"nuisance.{name}", "a distribution", "needs a list, or sampler: random or tpe")
        if (self.sampler == "grid") != (self.budget.trials is None):
            need = "must be left out with sampler: grid" if self.sampler == "grid" else "must be set with this sampler"
            raise ConfigError("budget.trials", self.budget.trials, need)
        return self

    @classmethod
    def from_dict(cls, data: Any) -> StudySpec:
        """Validate a study, the config of every point included.

        Raises:
            ConfigError: a field, a factor or a value is not allowed.
        """
        if not isinstance(data, dict):
            raise ConfigError("study", data, "must be a mapping with name, arms, seeds and budget")
        try:
            spec = cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error) from None
        for point in spec.points():
            for nuisance in point.grid():
                point.config(nuisance, spec.seeds[0])
        return spec

    @property
    def base_config(self) -> RunConfig:
        return RunConfig.from_dict(self.base)

    def points(self) -> Iterator[Point]:
        """Every combination of an arm and values of the scientific factors, in the order of the file.

        A factor that an arm sets, nuisance or scientific, has that one value in the arm.
        """
        for arm, overrides in self.arms.items():
            values = ([overrides[name]] if name in overrides else values for name, values in self.factors.items())
            nuisance = {name: grid for name, grid in self.nuisance.items() if name not in overrides}
            for combination in itertools.product(*values):
                yield Point(self, arm, dict(zip(self.factors, combination, strict=True)), nuisance)

    @property
    def n_cells(self) -> int:
        return sum(point.n_cells for point in self.points())


def grid_values(grid: Grid) -> list[Any]:
    """Values of a grid; of a distribution, its two ends."""
    if isinstance(grid, PowersOfTwo):
        return grid.values
    return [grid.low, grid.high] if isinstance(grid, Distribution) else grid


@dataclass(frozen=True)
class Point:
    """One arm at one value of every scientific factor: where the nuisance factors are searched."""

    spec: StudySpec
    arm: str
    factors: dict[str, Any]
    nuisance: dict[str, Grid]

    @property
    def name(self) -> str:
        return "-".join([self.arm, *(_slug(value) for value in self.factors.values())])

    @property
    def is_grid(self) -> bool:
        """Whether all cells are known beforehand: a grid, or nothing to search."""
        return self.spec.sampler == "grid" or not self.nuisance

    @property
    def n_cells(self) -> int:
        if not self.is_grid:
            assert self.spec.budget.trials is not None
            return self.spec.budget.trials
        return len(self.spec.seeds) * math.prod(len(grid_values(grid)) for grid in self.nuisance.values())

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the nuisance grids; of a distribution, its two ends."""
        for values in itertools.product(*(grid_values(grid) for grid in self.nuisance.values())):
            yield dict(zip(self.nuisance, values, strict=True))

    def config(self, nuisance: Mapping[str, Any], seed: int) -> RunConfig:
        """The run config at one value of every nuisance factor.

        Raises:
            ConfigError: the combination is not a valid config.
        """
        budget = {"train.steps": self.spec.budget.steps, "train.batch_size": self.spec.budget.batch_size}
        overrides = {**budget, **self.factors, **self.spec.arms[self.arm], **nuisance, "seed": seed}
        try:
            return self.spec.base_config.with_overrides(overrides)
        except ConfigError as error:
            error.args = (f"{error} (arm {self.arm}, {', '.join(f'{k} = {v}' for k, v in self.factors.items())})",)
            raise

    def first_cell(self) -> Cell:
        """A cell that stands for the point: the first value of every nuisance factor, the first seed."""
        return self.cell(next(self.grid()), self.spec.seeds[0])

    def cell(self, nuisance: Mapping[str, Any], seed: int) -> Cell:
        """The cell at one value of every nuisance factor."""
        return Cell(self, dict(nuisance), self.config(nuisance, seed))


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    point: Point
    nuisance: dict[str, Any]
    config: RunConfig

    @property
    def id(self) -> str:
        """Readable and unique: the point, the seed, and a hash of the config (whatever the git commit)."""
        digest = hashlib.sha256(f"{self.point.arm}:{self.config.hash}".encode()).hexdigest()[:8]
        return f"{self.point.name}-s{self.config.seed}-{digest}"

    @property
    def label(self) -> str:
        shown = [f"{name.rpartition('.')[2]} {_number(value)}" for name, value in self.nuisance.items()]
        return " ".join([self.point.name.replace("-", " "), *shown, f"seed {self.config.seed}"])

    @property
    def info(self) -> CellInfo:
        point = self.point
        return CellInfo(
            study=point.spec.name,
            cell=self.id,
            arm=point.arm,
            sampler=point.spec.sampler,
            factors=point.factors,
            nuisance=self.nuisance,
        )


def load_study(name_or_path: str) -> StudySpec:
    """Read a study file by path, or a shipped one by name.

    Raises:
        UserError: there is no such study, or it is not valid.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = _shipped_studies()
        if name_or_path not in shipped:
            raise UserError(f"study {name_or_path}: no such file, nor a shipped study ({', '.join(sorted(shipped))})")
        path = shipped[name_or_path]
    try:
        return StudySpec.from_dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"study {path}: not a YAML file ({' '.join(str(error).split())})") from None
    except ConfigError as error:
        raise UserError(f"study {path}: {error}") from None


def _shipped_studies() -> dict[str, Path]:
    """Study files of the wheel (lit_mult/sweeps) or, in a checkout, of its top-level sweeps/."""
    package = Path(str(resources.files("lit_mult")))
    folder = package / "sweeps"
    if not folder.is_dir():
        folder = package.parent / "sweeps"
    return {path.stem: path for path in folder.glob("*.yaml")}


def canonical(spec: StudySpec) -> dict[str, Any]:
    """What decides the outcome of a study, as plain values: the title and the keeping of checkpoints left out."""
    data = spec.model_dump(mode="json", exclude={"title", "keep_checkpoints", "base"})
    return data | {"base": spec.base_config.decisive()}


_SET_BY_THE_STUDY = {"seed": "seeds", "train.steps": "budget.steps", "train.batch_size": "budget.batch_size"}


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a config, leaves only."""
    names = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += _fields(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _repeats(values: list[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values}) < len(values)


def _slug(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", str(value))


def _number(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)

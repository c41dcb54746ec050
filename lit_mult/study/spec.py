"""A study as data: the runs that a YAML file (shipped in sweeps/, or the user's) describes."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from lit_mult.config import OPEN_FIELDS, Experiment, RunConfig, config_error
from lit_mult.errors import ConfigError
from lit_mult.method.presets import Preset, apply_preset
from lit_mult.method.search_space import neutral, search_space
from lit_mult.registry.kinds import KINDS
from lit_mult.schema import WIDTH, CellInfo, Question
from lit_mult.study.grids import Distribution, Grid, Part, grid_values

_NAME = r"[A-Za-z0-9][\w.-]*"


class Budget(Part):
    """Training budget of a cell, the same for every arm."""

    steps: int = Field(gt=0)
    """Optimizer steps of a cell."""
    batch_size: int = Field(gt=0)
    """Sequences in one step."""
    trials: int | None = Field(None, gt=0)
    """Cells per point of the scientific factors, over all seeds; with samplers other than grid."""


class Pruner(Part):
    """An Optuna pruner, which gets the validation losses by optimizer step."""

    name: Literal["median", "percentile", "successive_halving", "hyperband"]
    """optuna.pruners.MedianPruner, PercentilePruner, SuccessiveHalvingPruner or HyperbandPruner."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments; those in steps (n_warmup_steps, interval_steps, min_resource) count optimizer steps."""


class StudySpec(Part):
    """Arms x scientific factors x seeds, and at each of these points a search over the nuisance factors.

    The terms are those of the deep-learning tuning playbook: a study asks about its scientific factors, and optimizes
    its nuisance factors at each point, so that points compare at their best.
    """

    name: str = Field(pattern=f"^{_NAME}$")
    """Name of the study and of its results folder."""
    title: str = ""
    """For figures and reports, on one line."""
    experiment: Experiment | None = None
    """Experiment whose figure and verdict the report gives; null: learning-rate sensitivity and paired differences."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fixed values: part of a run config, shared by all cells."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """Arm -> values of dotted config fields. A nuisance factor that an arm sets is fixed for that arm."""
    factors: dict[str, list[Any]] = Field(default_factory=dict)
    """Scientific factor (dotted config field) -> its values."""
    nuisance: dict[str, Grid] = Field(default_factory=dict)
    """Nuisance factor (dotted config field) -> a grid (list or log2) or a distribution."""
    questions: list[Question] = Field(default_factory=list)
    """What the study asks: comparisons whose p values are corrected together. All others are exploratory."""
    seeds: list[int] = Field(min_length=1)
    """Each cell's `seed`; arms share it, hence the initial matrices and the order of the data."""
    budget: Budget
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """How the nuisance factors are searched: grid (complete), or Optuna's random or TPE sampler."""
    search_multipliers: bool = False
    """Also search the per-role multipliers of the arm's parametrization.tier, over the ranges in
    method/search_space.py."""
    start: list[dict[str, Any]] = Field(default_factory=list)
    """First trials of a sampled search: values of nuisance factors. Searched multipliers start at 1; other factors
    that are not named are sampled."""
    pruner: Pruner | None = None
    """Stops unpromising trials at the validations of base.train.eval_every; for sampled searches."""
    follow_optimum: int = Field(0, ge=0)
    """Most learning rates to add to a grid at each point, one grid step at a time beyond the edge at which the best
    mean loss lies."""
    presets: dict[str, Preset] = Field(default_factory=dict)
    """Name -> tuned preset, for arms that set parametrization.preset to that name."""
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
                if name in _SET_BY_THE_STUDY and (name, group) != ("train.batch_size", "factors"):
                    raise ConfigError(f"{group}.{name}", names[name], f"is set by {_SET_BY_THE_STUDY[name]}")
        for arm in self.arms:
            if not re.fullmatch(_NAME, arm):
                raise ConfigError(f"arms.{arm}", "...", "an arm's name holds letters, digits, '_', '.' and '-' only")
        for name, values in self.factors.items():
            _check_values(f"factors.{name}", values)
        for name, grid in self.nuisance.items():
            if name in self.factors:
                raise ConfigError(f"nuisance.{name}", "...", "is a scientific factor too; name it once")
            _check_values(f"nuisance.{name}", grid_values(grid))
            if isinstance(grid, Distribution) and self.sampler == "grid":
                raise ConfigError(f"nuisance.{name}", "a distribution", "needs a list, or sampler: random or tpe")
        self._check_search()
        for index, question in enumerate(self.questions):
            self._check_question(f"questions.{index}", question)
        return self

    def _check_question(self, field: str, question: Question) -> None:
        values = {**self.factors, "arm": list(self.arms)}
        for side in ("of", "against"):
            for name, value in getattr(question, side).items():
                if name not in values:
                    raise ConfigError(f"{field}.{side}.{name}", value, f"must be one of {', '.join(values)}")
                if value not in values[name]:
                    raise ConfigError(f"{field}.{side}.{name}", value, f"must be one of {values[name]}")
        if question.of.keys() != question.against.keys() or question.of == question.against:
            need = f"must have other values of the same factors as `of`: {', '.join(question.of)}"
            raise ConfigError(f"{field}.against", question.against, need)
        for name in question.over:
            if name not in values and name != WIDTH:
                raise ConfigError(f"{field}.over", name, f"must be one of {', '.join(values)}")

    def _check_search(self) -> None:
        is_grid = self.sampler == "grid"
        if is_grid != (self.budget.trials is None):
            need = "must be left out with sampler: grid" if is_grid else "must be set with this sampler"
            raise ConfigError("budget.trials", self.budget.trials, need)
        for name in ("search_multipliers", "start", "pruner"):
            if is_grid and getattr(self, name):
                raise ConfigError(name, getattr(self, name), "needs sampler: random or tpe")
        for index, values in enumerate(self.start):
            for name, value in values.items():
                if name not in self.nuisance:
                    raise ConfigError(f"start.{index}.{name}", value, "names no nuisance factor")
                grid = self.nuisance[name]
                if not isinstance(grid, Distribution) and value not in grid_values(grid):
                    raise ConfigError(f"start.{index}.{name}", value, f"is not in the list {grid_values(grid)}")
        if self.pruner and not self.base_config.train.eval_every:
            raise ConfigError("pruner", self.pruner.name, "needs base.train.eval_every, the steps at which it looks")
        if self.follow_optimum and not (is_grid and len(grid_values(self.nuisance.get("optim.lr", []))) > 1):
            raise ConfigError("follow_optimum", self.follow_optimum, "needs sampler: grid over two or more optim.lr")

    @classmethod
    def from_dict(cls, data: Any) -> StudySpec:
        """Validate a study and the config of every point.

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
            trials, possible = spec.budget.trials, point.n_possible
            if not point.is_grid and trials is not None and possible is not None and trials > possible:
                allowed = f"the lists of arm {point.arm} make {possible} cells; sampler: grid runs them all"
                raise ConfigError("budget.trials", trials, allowed)
            for nuisance in point.searched():
                point.config(nuisance, spec.seeds[0])
        return spec

    @property
    def base_config(self) -> RunConfig:
        return RunConfig.from_dict(self.base)

    def points(self) -> Iterator[Point]:
        """Every combination of an arm and values of the scientific factors; a factor that an arm sets has one value."""
        for arm, overrides in self.arms.items():
            values = ([overrides[name]] if name in overrides else values for name, values in self.factors.items())
            for combination in itertools.product(*values):
                yield Point(self, arm, dict(zip(self.factors, combination, strict=True)))

    @property
    def n_cells(self) -> int:
        return sum(point.n_cells for point in self.points())


@dataclass(frozen=True)
class Point:
    """One arm at one value of every scientific factor; the nuisance factors are searched at each point."""

    spec: StudySpec
    arm: str
    factors: dict[str, Any]

    @cached_property
    def nuisance(self) -> dict[str, Grid]:
        """The nuisance factors that the arm does not set, and the searched multipliers."""
        overrides = self.spec.arms[self.arm]
        grids = {name: grid for name, grid in self.spec.nuisance.items() if name not in overrides}
        return grids | {
            name: Distribution(low=low, high=high, log=True)
            for name, (low, high) in self._searched_multipliers().items()
            if name not in overrides
        }

    def _searched_multipliers(self) -> dict[str, tuple[float, float]]:
        if not self.spec.search_multipliers:
            return {}
        config = self.config({}, self.spec.seeds[0])
        space = search_space(config.parametrization.tier, tied_head=config.model.tie_embeddings)
        if KINDS[config.multipliers].uses_forward(config.placement.init):
            return space
        return {name: ends for name, ends in space.items() if not name.startswith("parametrization.forward.")}

    def start(self) -> list[dict[str, Any]]:
        """The first trials of a sampled search."""
        unit = neutral(self._searched_multipliers())
        trials = [unit | values for values in self.spec.start]
        return [{name: value for name, value in trial.items() if name in self.nuisance} for trial in trials]

    @property
    def name(self) -> str:
        return "-".join([self.arm, *(_slug(value) for value in self.factors.values())])

    @property
    def is_grid(self) -> bool:
        """Whether all cells are known in advance: a grid, or nothing to search."""
        return self.spec.sampler == "grid" or not self.nuisance

    @property
    def n_cells(self) -> int:
        planned = self.n_possible if self.is_grid else self.spec.budget.trials
        assert planned is not None
        return planned

    @property
    def n_possible(self) -> int | None:
        """Cells that the lists of the nuisance factors make over all seeds; None where one is a range."""
        grids = self.nuisance.values()
        if any(isinstance(grid, Distribution) for grid in grids):
            return None
        return len(self.spec.seeds) * math.prod(len(grid_values(grid)) for grid in grids)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the nuisance grids; of a distribution, its two ends."""
        for values in itertools.product(*(grid_values(grid) for grid in self.nuisance.values())):
            yield dict(zip(self.nuisance, values, strict=True))

    def searched(self) -> Iterator[dict[str, Any]]:
        """The cells of a grid; of another search, every value of each nuisance factor once."""
        return self.grid() if self.is_grid else self.one_at_a_time()

    def one_at_a_time(self) -> Iterator[dict[str, Any]]:
        """Every value of each nuisance factor (of a distribution, its two ends), the others at their first value."""
        first = {name: grid_values(grid)[0] for name, grid in self.nuisance.items()}
        yield first
        for name, grid in self.nuisance.items():
            yield from ({**first, name: value} for value in grid_values(grid)[1:])

    def config(self, nuisance: Mapping[str, Any], seed: int) -> RunConfig:
        """The run config at one value of every nuisance factor.

        Raises:
            ConfigError: the combination is not a valid config.
        """
        budget = {"train.steps": self.spec.budget.steps, "train.batch_size": self.spec.budget.batch_size}
        overrides = {**budget, **self.factors, **self.spec.arms[self.arm], **nuisance, "seed": seed}
        try:
            config = self.spec.base_config.with_overrides(overrides)
            preset = self.spec.presets.get(config.parametrization.preset)
            return apply_preset(config, preset) if preset else config
        except ConfigError as error:
            error.args = (f"{error} (arm {self.arm}, {', '.join(f'{k} = {v}' for k, v in self.factors.items())})",)
            raise

    def first_cell(self) -> Cell:
        """The cell with the first value of every nuisance factor and the first seed."""
        return self.cell(next(self.grid()), self.spec.seeds[0])

    def cell(self, nuisance: Mapping[str, Any], seed: int, *, added: bool = False) -> Cell:
        """The cell at these values of the nuisance factors; `added` when it is not in the planned grid."""
        return Cell(self, dict(nuisance), self.config(nuisance, seed), added)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    point: Point
    nuisance: dict[str, Any]
    config: RunConfig
    added: bool = False

    @property
    def id(self) -> str:
        """The point, the seed, and a hash of arm and config."""
        digest = hashlib.sha256(f"{self.point.arm}:{self.config.hash}".encode()).hexdigest()[:8]
        return f"{self.point.name}-s{self.config.seed}-{digest}"

    @property
    def label(self) -> str:
        named = {name: value for name, value in self.nuisance.items() if name in self.point.spec.nuisance}
        values = [f"{name.rpartition('.')[2]} {_number(value)}" for name, value in named.items()]
        return " ".join([self.point.name.replace("-", " "), *values, f"seed {self.config.seed}"])

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
            added=self.added,
        )


def canonical(spec: StudySpec) -> dict[str, Any]:
    """The fields that determine a study's results, as plain values."""
    data = spec.model_dump(mode="json", exclude={"title", "experiment", "keep_checkpoints", "base"})
    return data | {"base": spec.base_config.hashed_fields()}


_SET_BY_THE_STUDY = {"seed": "seeds", "train.steps": "budget.steps", "train.batch_size": "budget.batch_size"}


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a config."""
    names = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += _fields(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _check_values(field: str, values: list[Any]) -> None:
    if not values:
        raise ConfigError(field, values, "an empty grid; give at least one value")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise ConfigError(field, values, "must not repeat a value")


def _slug(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", str(value))


def _number(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)

"""A study: the points and cells that a YAML file (shipped in sweeps/, or the user's) describes."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from lit_mult.config import RunConfig, config_error, field_names
from lit_mult.errors import ConfigError
from lit_mult.method.presets import apply_preset, run_multipliers
from lit_mult.method.search_space import neutral, search_space
from lit_mult.numbers import written
from lit_mult.registry.kinds import KINDS
from lit_mult.schema import WIDTH, CellInfo
from lit_mult.study.fields import StudyFields
from lit_mult.study.grids import Distribution, Grid, grid_values


class StudySpec(StudyFields):
    """Arms x scientific factors x seeds, and at each of these points a search over the nuisance factors."""

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
            raise config_error(error, field_names(cls)) from None
        for point in spec.points():
            trials, possible = spec.budget.trials, point.n_possible
            if not point.is_grid and trials is not None and possible is not None and trials > possible:
                what = "trials" if spec.trial_seeds else "cells"
                allowed = f"the lists of arm {point.arm} make {possible} {what}; sampler: grid runs them all"
                raise ConfigError("budget.trials", trials, allowed)
            for nuisance in point.searched():
                point.config(nuisance, spec.seeds[0])
        return spec

    def points(self) -> Iterator[Point]:
        """Every combination of an arm and values of the scientific factors; a factor that an arm sets has one value."""
        for arm, overrides in self.arms.items():
            values = ([overrides[name]] if name in overrides else values for name, values in self.factors.items())
            for combination in itertools.product(*values):
                yield Point(self, arm, dict(zip(self.factors, combination, strict=True)))

    @property
    def n_cells(self) -> int:
        return sum(point.n_cells for point in self.points())

    def same_arms(self) -> Iterator[tuple[str, str]]:
        """Pairs of arms whose cells train the same models: of equal configs, but for `fixed` multipliers that are 1."""
        trained: dict[str, list[Any]] = {arm: [] for arm in self.arms}
        for point in self.points():
            config = point.first_cell().config
            if config.multipliers == "fixed" and set(run_multipliers(config).forward.values()) <= {1.0}:
                config = config.with_overrides({"multipliers": "none"})
            trained[point.arm].append((config, point.nuisance))
        yield from (pair for pair in itertools.combinations(trained, 2) if trained[pair[0]] == trained[pair[1]])


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
        own = self.spec.nuisance | self.spec.search.get(self.arm, {})
        grids = {name: grid for name, grid in own.items() if name not in overrides}
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

    def is_untuned(self, nuisance: Mapping[str, Any]) -> bool:
        """Whether the multipliers, where the study searches them, are all 1."""
        searched = self._searched_multipliers().keys() & nuisance.keys()
        return bool(searched) and all(nuisance[name] == 1 for name in searched)

    @property
    def name(self) -> str:
        return "-".join([self.arm, *(_slug(value) for value in self.factors.values())])

    @property
    def is_grid(self) -> bool:
        """Whether all cells are known in advance: a grid, or nothing to search."""
        return self.spec.sampler == "grid" or not self.nuisance

    @property
    def n_cells(self) -> int:
        """Cells of the plan, with those of the re-ranking."""
        if self.is_grid:
            return len(self.spec.seeds) * math.prod(len(grid_values(grid)) for grid in self.nuisance.values())
        budget, rerank = self.spec.budget, self.spec.rerank
        assert budget.trials is not None
        return budget.trials * budget.seeds_per_trial + (rerank.best * len(rerank.seeds) if rerank else 0)

    @property
    def n_possible(self) -> int | None:
        """Trials that the lists of the nuisance factors make; None where one is a range."""
        grids = self.nuisance.values()
        if any(isinstance(grid, Distribution) for grid in grids):
            return None
        seeds = 1 if self.spec.trial_seeds else len(self.spec.seeds)
        return seeds * math.prod(len(grid_values(grid)) for grid in grids)

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
        budget = self.spec.budget
        overrides = {"train.batch_size": budget.batch_size, **self.factors, **self.spec.arms[self.arm], **nuisance}
        if budget.steps is not None:
            overrides.setdefault("train.steps", budget.steps)
        try:
            config = self.spec.base_config.with_overrides(overrides | {"seed": seed})
            if budget.tokens is not None:
                steps = max(1, round(budget.tokens / (config.train.batch_size * config.data.seq_len)))
                config = config.with_overrides({"train.steps": steps})
            preset = self.spec.presets.get(config.parametrization.preset)
            return apply_preset(config, preset) if preset else config
        except ConfigError as error:
            point = [f"arm {self.arm}", *(f"{name} = {value}" for name, value in self.factors.items())]
            error.args = (f"{error} ({', '.join(point)})",)
            raise

    def first_cell(self) -> Cell:
        """The cell with the first value of every nuisance factor and the first seed."""
        return self.cell(next(self.grid()), self.spec.seeds[0])

    def cell(self, nuisance: Mapping[str, Any], seed: int, **marks: bool) -> Cell:
        """The cell at these values of the nuisance factors; marks are added, refines, judged of `schema.CellInfo`."""
        return Cell(self, dict(nuisance), self.config(nuisance, seed), **marks)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    point: Point
    nuisance: dict[str, Any]
    config: RunConfig
    added: bool = False
    refines: bool = False
    judged: bool = False

    @cached_property
    def id(self) -> str:
        """The point, the seed, and a hash of arm and config."""
        digest = hashlib.sha256(f"{self.point.arm}:{self.config.hash}".encode()).hexdigest()[:8]
        return f"{self.point.name}-s{self.config.seed}-{digest}"

    @property
    def label(self) -> str:
        own = self.point.spec.nuisance.keys() | self.point.spec.search.get(self.point.arm, {}).keys()
        named = {name: value for name, value in self.nuisance.items() if name in own}
        values = [f"{name.rpartition('.')[2]} {written(value)}" for name, value in named.items()]
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
            refines=self.refines,
            judged=self.judged,
        )


def canonical(spec: StudySpec) -> dict[str, Any]:
    """The fields that determine a study's results, as plain values."""
    data = spec.model_dump(mode="json", exclude={"title", "experiment", "keep_checkpoints", "base"})
    return data | {"base": spec.base_config.hashed_fields()}


def line_of(arm: str, factors: Mapping[str, Any]) -> str:
    """What points of one arm and several widths have in common, for displays."""
    return " ".join([arm, *(written(value) for name, value in factors.items() if name != WIDTH)])


def _slug(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", str(value))

"""What a study file holds: its fields, and which values go together."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lit_mult.config import OPEN_FIELDS, Experiment, RunConfig, field_names
from lit_mult.errors import ConfigError, did_you_mean, one_of
from lit_mult.method.presets import Preset
from lit_mult.numbers import read_numbers
from lit_mult.schema import WIDTH, Question
from lit_mult.study.grids import Distribution, Grid, Part, grid_values

_NAME = r"[A-Za-z0-9][\w.-]*"


class Budget(Part):
    """Training budget of a cell, the same for every arm."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps of a cell."""
    tokens: int | None = Field(None, gt=0)
    """Training tokens of a cell, in place of steps; equal at every train.batch_size, where that is a factor."""
    batch_size: int = Field(gt=0)
    """Sequences in one step."""
    trials: int | None = Field(None, gt=0)
    """Trials per point of the scientific factors, with samplers other than grid; each is seeds_per_trial cells."""
    seeds_per_trial: int = Field(1, gt=0)
    """Seeds of a trial: the first so many of the study. The sampler learns from the mean of their losses. With 1, the
    trials take turns with the study's seeds."""
    seeds: int | None = Field(None, gt=0)
    """Most seeds of a line, those that `precision` adds among them."""


class Pruner(Part):
    """An Optuna pruner, which gets the validation losses by optimizer step."""

    name: Literal["median", "percentile", "successive_halving", "hyperband"]
    """optuna.pruners.MedianPruner, PercentilePruner, SuccessiveHalvingPruner or HyperbandPruner."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments; those in steps (n_warmup_steps, interval_steps, min_resource) count optimizer steps."""


class Rerank(Part):
    """A second look at the best trials of a search, on seeds that did not select them."""

    best: int = Field(gt=0)
    """Trials of lowest mean loss to run again, at each point."""
    seeds: list[int] = Field(min_length=1)
    """Fresh seeds, none of which is among the study's."""


class StudyFields(Part):
    """The fields of a study file.

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
    search: dict[str, dict[str, Grid]] = Field(default_factory=dict)
    """Arm -> nuisance factors of its own, beside the study's or in place of those of the same name."""
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
    """Stops unpromising trials at the validations of base.train.eval_every; for sampled searches. Where a trial has
    several seeds, it looks at the first, and the others run only if that one was not pruned."""
    rerank: Rerank | None = None
    """After all trials of a point, run the best ones, and those of untuned multipliers, on fresh seeds."""
    follow_optimum: int = Field(0, ge=0)
    """Most learning rates to add to a grid at each point, one grid step at a time beyond the edge at which the best
    mean loss lies."""
    refine_optimum: int = Field(0, ge=0)
    """How often to halve the grid's spacing around each point's best mean loss: rates midway between the best one and
    its neighbours are added, which count for the best loss alone."""
    precision: float | None = Field(None, gt=0)
    """Half width of the 95 % intervals of all questions, nats per token: seeds are added to a finished grid until they
    are as narrow, or a line has budget.seeds."""
    judge_seeds: list[int] = Field(default_factory=list)
    """Fresh seeds on which each point runs the best values of its grid, of lowest mean loss over `seeds`, which then
    only choose: best losses, and the questions on them, are judged on these alone."""
    presets: dict[str, Preset] = Field(default_factory=dict)
    """Name -> tuned preset, for arms that set parametrization.preset to that name."""
    keep_checkpoints: bool = False
    """Keep the final checkpoint of every cell under cells/."""

    @field_validator("arms", "factors", "nuisance", "search", "questions", "start", mode="before")
    @classmethod
    def _with_numbers(cls, given: Any) -> Any:
        """Values of config fields, whose types are not known here, are numbers wherever they are written as such."""
        return read_numbers(given)

    @field_validator("seeds", "judge_seeds", mode="before")
    @classmethod
    def _not_how_many(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, int):
            raise ConfigError(info.field_name or "seeds", given, "must be a list of seeds, such as [0, 1]")
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", self.seeds, "must not repeat")
        known = field_names(RunConfig)
        named: dict[str, dict[str, Any]] = {"factors": dict(self.factors), "nuisance": dict(self.nuisance)}
        named |= {f"search.{arm}": dict(grids) for arm, grids in self.search.items()}
        for group, names in (named | {f"arms.{arm}": overrides for arm, overrides in self.arms.items()}).items():
            for name in names:
                if name not in known and not name.startswith(tuple(f"{field}." for field in OPEN_FIELDS)):
                    unknown = f"no such field of a run config{did_you_mean(name, known)}"
                    raise ConfigError(f"{group}.{name}", names[name], unknown)
                if name == "seed" or (name in _SET_BY_THE_STUDY and group != "factors"):
                    raise ConfigError(f"{group}.{name}", names[name], f"is set by {_SET_BY_THE_STUDY[name]}")
        for arm in self.arms:
            if not re.fullmatch(_NAME, arm):
                raise ConfigError(f"arms.{arm}", "...", "an arm's name holds letters, digits, '_', '.' and '-' only")
        for name, values in self.factors.items():
            _check_values(f"factors.{name}", values)
        self._check_grids("nuisance", self.nuisance)
        for arm, grids in self.search.items():
            if arm not in self.arms:
                raise ConfigError(f"search.{arm}", "...", f"must be one of the arms {one_of(arm, self.arms)}")
            if both := sorted(grids.keys() & self.arms[arm].keys()):
                raise ConfigError(f"search.{arm}.{both[0]}", "...", f"is set by arms.{arm} too; name it once")
            self._check_grids(f"search.{arm}", grids)
        if (self.budget.steps is None) == (self.budget.tokens is None):
            raise ConfigError("budget.steps", self.budget.steps, "set it or budget.tokens, one of the two")
        if self.budget.tokens and "train.steps" in self.factors:
            raise ConfigError("factors.train.steps", "...", "are set by budget.tokens; set budget.steps instead")
        self._check_search()
        for index, question in enumerate(self.questions):
            self._check_question(f"questions.{index}", question)
        self._check_seeds_of_trials()
        self._check_precision()
        self._check_judges()
        if self.experiment == "arena" and ("AdamW" not in self.arms or set(self.factors) - {WIDTH}):
            raise ConfigError("experiment", "arena", f"needs an arm AdamW, its baseline, and no factor but {WIDTH}")
        return self

    def _check_grids(self, group: str, grids: dict[str, Grid]) -> None:
        for name, grid in grids.items():
            if name in self.factors:
                raise ConfigError(f"{group}.{name}", "...", "is a scientific factor too; name it once")
            _check_values(f"{group}.{name}", grid_values(grid))
            if isinstance(grid, Distribution) and self.sampler == "grid":
                raise ConfigError(f"{group}.{name}", "a distribution", "needs a list, or sampler: random or tpe")

    def _check_question(self, field: str, question: Question) -> None:
        values = {**self.factors, "arm": list(self.arms)}
        for side in ("of", "against"):
            for name, value in getattr(question, side).items():
                if name not in values:
                    raise ConfigError(f"{field}.{side}.{name}", value, f"must be one of {one_of(name, values)}")
                if value not in values[name]:
                    hint = did_you_mean(value, map(str, values[name]))
                    raise ConfigError(f"{field}.{side}.{name}", value, f"must be one of {values[name]}{hint}")
        if question.of.keys() != question.against.keys() or question.of == question.against:
            need = f"must have other values of the same factors as `of`: {', '.join(question.of)}"
            raise ConfigError(f"{field}.against", question.against, need)
        for name in question.over:
            if name not in values and name != WIDTH:
                raise ConfigError(f"{field}.over", name, f"must be one of {one_of(name, values)}")

    def _check_search(self) -> None:
        is_grid = self.sampler == "grid"
        if is_grid != (self.budget.trials is None):
            need = "must be left out with sampler: grid" if is_grid else "must be set with this sampler"
            raise ConfigError("budget.trials", self.budget.trials, need)
        for name in ("search_multipliers", "start", "pruner", "rerank"):
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
        rates = ((self.nuisance | self.search.get(arm, {})).get("optim.lr", []) for arm in self.arms)
        has_rates = is_grid and any(len(grid_values(grid)) > 1 for grid in rates)
        for name in ("follow_optimum", "refine_optimum"):
            if getattr(self, name) and not has_rates:
                raise ConfigError(name, getattr(self, name), "needs sampler: grid over two or more optim.lr")

    def _check_seeds_of_trials(self) -> None:
        per_trial, rerank = self.budget.seeds_per_trial, self.rerank
        if per_trial > 1 and self.sampler == "grid":
            raise ConfigError("budget.seeds_per_trial", per_trial, "needs sampler: random or tpe")
        if per_trial > len(self.seeds):
            raise ConfigError("budget.seeds_per_trial", per_trial, f"must be at most {len(self.seeds)}, all seeds")
        if rerank is None:
            return
        if len(set(rerank.seeds)) < len(rerank.seeds):
            raise ConfigError("rerank.seeds", rerank.seeds, "must not repeat")
        if used := sorted(set(rerank.seeds) & set(self.seeds)):
            raise ConfigError("rerank.seeds", rerank.seeds, f"must be fresh; {used} are among the study's seeds")
        if rerank.best > (trials := self.budget.trials or 0):
            raise ConfigError("rerank.best", rerank.best, f"must be at most {trials}, the number of trials")

    def _check_precision(self) -> None:
        planned, most = len(self.seeds), self.budget.seeds
        if self.precision is None and most is not None:
            raise ConfigError("budget.seeds", most, "needs precision, for which seeds are added")
        if self.precision is None:
            return
        if self.sampler != "grid":
            raise ConfigError("precision", self.precision, "needs sampler: grid")
        if not self.questions:
            raise ConfigError("precision", self.precision, "needs questions, whose intervals it is the half width of")
        if most is None or most <= planned:
            raise ConfigError("budget.seeds", most, f"must be above {planned}, the number of seeds, with precision")

    def _check_judges(self) -> None:
        judges = self.judge_seeds
        if not judges:
            return
        if self.sampler != "grid":
            raise ConfigError(
                "judge_seeds", judges, "needs sampler: grid; rerank runs the best trials of other samplers"
            )
        if self.precision is not None:
            raise ConfigError("judge_seeds", judges, "cannot go with precision, whose seeds are judged on, too")
        if len(set(judges)) < len(judges):
            raise ConfigError("judge_seeds", judges, "must not repeat")
        if used := sorted(set(judges) & set(self.seeds)):
            raise ConfigError("judge_seeds", judges, f"must be fresh; {used} are among the study's seeds")

    @property
    def all_seeds(self) -> list[int]:
        """The planned seeds, those that may be added for precision, and those that judge."""
        most = self.budget.seeds or len(self.seeds)
        further = range(max(self.seeds) + 1, max(self.seeds) + 1 + most - len(self.seeds))
        return [*self.seeds, *further, *self.judge_seeds]

    @property
    def trial_seeds(self) -> list[int]:
        """Seeds of every trial of a sampled search; none where each trial has one of its own."""
        return self.seeds[: self.budget.seeds_per_trial] if self.budget.seeds_per_trial > 1 else []

    @property
    def grows(self) -> bool:
        """Whether records may add cells to the plan, or take some from it."""
        pruned = self.pruner is not None and self.trial_seeds
        added = self.follow_optimum or self.refine_optimum or self.precision or self.judge_seeds
        return bool(added or self.rerank or pruned)

    @property
    def base_config(self) -> RunConfig:
        return RunConfig.from_dict(self.base)


_SET_BY_THE_STUDY = {"seed": "seeds", "train.steps": "budget.steps", "train.batch_size": "budget.batch_size"}


def _check_values(field: str, values: list[Any]) -> None:
    if not values:
        raise ConfigError(field, values, "an empty grid; give at least one value")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise ConfigError(field, values, "must not repeat a value")

"""Values of a nuisance factor: a list, powers of two, or a range to sample from; and how a learning-rate grid grows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from lit_mult.errors import ConfigError
from lit_mult.numbers import Number


class Part(BaseModel):
    """A part of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PowersOfTwo(Part):
    """A grid given by its exponents: `{log2: [-9, -7.5, -6]}`."""

    log2: list[float] = Field(min_length=1)

    @property
    def values(self) -> list[float]:
        return [2.0**exponent for exponent in self.log2]


class Distribution(Part):
    """A range to sample from: `{low: 1e-3, high: 1e-1, log: true}`."""

    low: Number
    high: Number
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high <= self.low:
            raise ConfigError("nuisance high", self.high, f"must be above low = {self.low}")
        if self.log and self.low <= 0:
            raise ConfigError("nuisance low", self.low, "must be above 0 with log: true")
        return self


def _kind_of_grid(value: Any) -> str:
    if isinstance(value, PowersOfTwo) or (isinstance(value, dict) and "log2" in value):
        return "(log2)"
    return "(range)" if isinstance(value, Distribution | dict) else "(list)"


Grid = Annotated[
    Annotated[list[Any], Tag("(list)")]
    | Annotated[PowersOfTwo, Tag("(log2)")]
    | Annotated[Distribution, Tag("(range)")],
    Discriminator(_kind_of_grid),
]
"""Values of a nuisance factor: a list, powers of two, or a range to sample from."""


_RATIO_TOLERANCE = 1.01  # rates are often written with two or three digits


def grid_values(grid: Grid) -> list[Any]:
    """The values; of a distribution, its two ends."""
    if isinstance(grid, PowersOfTwo):
        return grid.values
    return [grid.low, grid.high] if isinstance(grid, Distribution) else grid


def next_rate(rates: Sequence[float], losses: Mapping[float, float]) -> float | None:
    """The learning rate one step beyond the edge of a log-uniform grid at which its optimum lies.

    Args:
        rates: the rates of the grid, two or more, in any order.
        losses: rate -> loss, lower is better; a rate whose runs diverged has an infinite one.

    Returns:
        None when the optimum lies inside the grid, or when no rate has a finite loss.
    """
    ordered = sorted(rates)
    best = min(ordered, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        return None
    if best == ordered[0]:
        return ordered[0] ** 2 / ordered[1]
    return ordered[-1] ** 2 / ordered[-2] if best == ordered[-1] else None


def rates_between(losses: Mapping[float, float], spacing: float) -> list[float]:
    """The learning rates midway, in log, between the best rate and those of its neighbours that are too far from it.

    Args:
        losses: rate -> loss, lower is better; a rate whose runs diverged has an infinite one.
        spacing: ratio of neighbouring rates that is close enough.
    """
    ordered = sorted(losses)
    best = ordered.index(min(ordered, key=lambda rate: losses[rate]))
    if not math.isfinite(losses[ordered[best]]):
        return []
    pairs = itertools.pairwise(ordered[max(0, best - 1) : best + 2])
    return [math.sqrt(low * high) for low, high in pairs if high / low > spacing * _RATIO_TOLERANCE]

"""Estimates over seeds and items at once: two crossed random effects, as in a table of seeds by items.

Seeds and items are both samples: an interval has to include the variance of both.
With a score for every seed and item the two variances are those of an analysis of variance, and the interval is that
of Student's t with the degrees of freedom of Satterthwaite (1946, Biometrics Bulletin 2(6)): wide over three seeds,
as it must be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_mult.analysis.seeds import Floats, t_quantile

_LEVEL, _POWER = 0.975, 0.8


@dataclass(frozen=True)
class Crossed:
    """A weighted sum of the means of tables (seeds, items), and its two variance components."""

    value: float
    seeds: int
    items: int
    """Columns of all tables."""
    seeds_variance: float
    """Variance of the sum between seeds, including the noise of their items; NaN for one seed."""
    items_variance: float
    """Part of the variance of the sum over all seeds that is due to the choice of items."""

    @property
    def stderr(self) -> float:
        """Standard error over seeds and items; over items only for one seed; NaN for single values."""
        return self._stderr(self.seeds)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval; (NaN, NaN) for single values."""
        reach = t_quantile(_LEVEL, self._freedom(self.seeds)) * self.stderr
        return self.value - reach, self.value + reach

    def detectable(self, seeds: int) -> float:
        """The smallest true sum that this number of seeds (two or more) detects with 80 % power at the 5 % level."""
        freedom = self._freedom(seeds)
        return (t_quantile(_LEVEL, freedom) + t_quantile(_POWER, freedom)) * self._stderr(seeds)

    def _stderr(self, seeds: int) -> float:
        if seeds == 1:
            return math.sqrt(self.items_variance) if self.items > 1 else math.nan
        return math.sqrt(self.seeds_variance / seeds + self.items_variance)

    def _freedom(self, seeds: int) -> float:
        of_items = max(1, self.items - 1)
        of_seeds = 0.0 if seeds == 1 else self.seeds_variance / seeds
        total = of_seeds + self.items_variance
        if not total > 0:
            return float(of_items)
        return total**2 / (of_seeds**2 / max(1, seeds - 1) + self.items_variance**2 / of_items)


def crossed(tables: Sequence[Floats], weights: Floats) -> Crossed:
    """The weighted sum of the means of tables with the same seeds as rows, and different items as columns."""
    by_seed = weights @ np.array([table.mean(axis=1) for table in tables])
    return Crossed(
        value=float(by_seed.mean()),
        seeds=len(by_seed),
        items=sum(table.shape[1] for table in tables),
        seeds_variance=float(by_seed.var(ddof=1)) if len(by_seed) > 1 else math.nan,
        items_variance=float(weights**2 @ np.array([items_variance(table) for table in tables])),
    )


def items_variance(table: Floats) -> float:
    """Variance of the mean of a (seeds, items) table due to the items, by two-way analysis of variance."""
    seeds, items = table.shape
    if items < 2:
        return 0.0
    of_items = table.mean(axis=0)
    if seeds == 1:
        return float(of_items.var(ddof=1) / items)
    residual = table - of_items - table.mean(axis=1, keepdims=True) + table.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (items - 1))
    return float(max(0.0, of_items.var(ddof=1) - noise / seeds) / items)

"""95 % percentile bootstraps with fixed draws: the same values always give the same interval."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ENOUGH_SEEDS = 5
"""With fewer values than about this, an interval is too narrow for its nominal level."""
_QUANTILES = (0.025, 0.975)
_NO_INTERVAL = (float("nan"), float("nan"))


def few_seeds(seeds: int) -> str:
    """Caveat for a sentence that depends on an interval."""
    return " (weak evidence: few seeds)" if seeds < ENOUGH_SEEDS else ""


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean, in the unit of the values; (NaN, NaN) for fewer than two values (or clusters).

    With `clusters`, such as the seed of each value, whole clusters are resampled: values of one seed are not
    independent. With fewer than `ENOUGH_SEEDS` values the interval is too narrow for its nominal level.
    """
    values = np.asarray(values, dtype=float)
    each = np.arange(len(values)) if clusters is None else clusters
    counts, totals = _cluster_sums(each, np.ones_like(values), values)
    if len(counts) < 2:
        return _NO_INTERVAL
    return _mean_interval(counts.tobytes(), totals.tobytes(), draws, seed)


def slope_interval(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Least-squares slope of y against x, and its interval from resampled clusters (NaN for one cluster)."""
    u, v = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    u, v = u - u.mean(), v - v.mean()  # the sums below then lose no digits
    sums = _cluster_sums(clusters, np.ones_like(u), u, v, u * v, u * u)
    slope = float(_slope(sums.sum(axis=1)))
    if sums.shape[1] < 2:
        return slope, *_NO_INTERVAL
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold a single x: it has no slope
        slopes = _slope(np.stack([_resampled(each, draws, seed) for each in sums]))
    low, high = np.quantile(slopes[np.isfinite(slopes)], _QUANTILES)
    return slope, float(low), float(high)


@lru_cache(maxsize=10_000)
def _mean_interval(counts: bytes, totals: bytes, draws: int, seed: int) -> tuple[float, float]:
    """Interval of the mean from the clusters' counts and sums, float64; the parts of a report ask for it repeatedly."""
    count, total = np.frombuffer(counts), np.frombuffer(totals)
    # Clusters of one size: every draw holds as many values.
    sizes = count[0] * len(count) if (count == count[0]).all() else _resampled(count, draws, seed)
    low, high = np.quantile(_resampled(total, draws, seed) / sizes, _QUANTILES)
    return float(low), float(high)


def _resampled(sums: Floats, draws: int, seed: int) -> Floats:
    """Total (draws,) over the clusters (n,) in each resample."""
    return np.asarray(sums.take(_indices(len(sums), draws, seed)).sum(axis=0))


def _cluster_sums(clusters: ArrayLike, *weights: Floats) -> Floats:
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    return np.stack([np.bincount(cluster, weights=weight) for weight in weights])


def _slope(sums: Floats) -> Floats:
    n, x, y, xy, xx = sums
    return np.asarray((n * xy - x * y) / (n * xx - x * x))


@lru_cache(maxsize=32)
def _indices(size: int, draws: int, seed: int) -> NDArray[Any]:
    """Indices (size, draws) of the resampled clusters, laid out for summing over the first axis."""
    return np.ascontiguousarray(np.random.default_rng(seed).integers(0, size, (draws, size)).T)

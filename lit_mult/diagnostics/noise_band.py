"""Which ratios to the noise reference count as noise, depending on a parameter's number of entries. Needs no torch."""

from __future__ import annotations

from functools import cache

import numpy as np

TOLERANCE = 0.1
"""Matrices at the balance of noise and decay are expected within 10 % of the noise reference."""


@cache
def noise_band(entries: int, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Lowest and highest ratio of RMS norms that counts as noise.

    A factor 1 + tolerance on both sides of 1, widened by the sampling error of `entries` entries (95 % interval of
    chi-square with `entries` degrees of freedom; negligible for matrices).
    """
    draws = np.random.default_rng(0).chisquare(entries, 20_000) / entries
    low, high = np.sqrt(np.quantile(draws, (0.025, 0.975)))
    return float(low) / (1 + tolerance), float(high) * (1 + tolerance)

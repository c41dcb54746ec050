"""How far from pure noise still counts as noise, given how few entries a parameter has. Needs no torch."""

from __future__ import annotations

from functools import cache

import numpy as np

TOLERANCE = 0.1
"""Of a ratio to noise: the level of 10 % to which matrices at the balance are expected to follow noise."""


@cache
def noise_band(entries: int, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Ratios of an RMS over `entries` entries to that of noise which count as noise.

    `tolerance` as a factor on both sides of 1, widened by what a sample of so few entries would do under noise (95 % of
    chi-square with as many degrees of freedom as entries: for a matrix next to nothing).
    """
    draws = np.random.default_rng(0).chisquare(entries, 20_000) / entries
    low, high = np.sqrt(np.quantile(draws, (0.025, 0.975)))
    return float(low) / (1 + tolerance), float(high) * (1 + tolerance)

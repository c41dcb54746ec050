"""What an optimizer makes of pure noise: the reference by simulation and, where there is one, in closed form.

Source: arXiv:2601.04890 sec. 3, eq. 1 (norm ~ sqrt(lr / weight decay)); the constants are derived here.

A step is w <- (1 - lr * decay) w - lr * u. Under gradients that are independent N(0, 1), u is a stationary series of
mean 0 with autocorrelation R(k) = E[u_t u_(t+k)], and at a constant lr the variance of an entry settles at

    E[w^2] = lr^2 / (1 - a^2) * sum over all k of R(k) a^|k|,     a = 1 - lr * decay,

which for small lr * decay is (lr / (2 decay)) * sum R(k): the update's *long-run* variance counts, not its own. So

    RMS(w) = c sqrt(lr / (2 decay)),     c^2 = (2 lr decay / (1 - a^2)) * sum R(k) a^|k|.

An average with rate beta has sum R(k) = 1 whatever beta is, and c would be 1; what makes it less is that the noise
divides itself (AdamW) and that orthogonalization loses part of the signal's direction (Muon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lit_mult.config import OptimConfig
from lit_mult.registry.roles import Shape


@dataclass(frozen=True)
class Autocorrelation:
    """R(0), and R(k) = sum of amplitude * rate^k for k >= 1."""

    variance: float
    amplitudes: tuple[float, ...]
    rates: tuple[float, ...]

    def equilibrium(self, lr: float, decay: float) -> float:
        """RMS norm at which noise and decay balance at a constant lr; infinite without decay."""
        if decay == 0:
            return math.inf
        a = 1 - lr * decay
        return math.sqrt(lr**2 / (1 - a**2) * self.long_run_variance(a))

    def long_run_variance(self, a: float = 1.0) -> float:
        """Sum over all k of R(k) a^|k|."""
        terms = zip(self.amplitudes, self.rates, strict=True)
        return self.variance + 2 * sum(amplitude * a * rate / (1 - a * rate) for amplitude, rate in terms)

    def spread(self, rates: Iterable[float], decay: float) -> float:
        """RMS of the decayed sum of updates over a schedule, from 0.

        With q the covariance of that sum with the update to come, one exponential of R after the other,

            D^2 <- (1 - lr decay)^2 D^2 + 2 (1 - lr decay) lr q + lr^2 R(0),   q_j <- rate_j ((1 - lr decay) q_j + lr).

        The series counts as stationary from the first step on; bias correction makes the first updates larger.

        Args:
            rates: learning rate of every step.
            decay: weight decay.
        """
        square, covariances = 0.0, [0.0] * len(self.rates)
        for lr in rates:
            a = 1 - lr * decay
            ahead = sum(amplitude * q for amplitude, q in zip(self.amplitudes, covariances, strict=True))
            square = a**2 * square + 2 * a * lr * ahead + lr**2 * self.variance
            covariances = [rate * (a * q + lr) for rate, q in zip(self.rates, covariances, strict=True)]
        return math.sqrt(square)


def decoupled(lr: float, weight_decay: float) -> float:
    """Share of a parameter that a step with decoupled weight decay keeps."""
    return 1 - lr * weight_decay


@dataclass(frozen=True)
class NoiseReference:
    """How `diagnostics.brownian` simulates an optimizer on pure noise, and what it should find."""

    by_shape: bool
    """Whether the update of an entry depends on the whole matrix, and not on the entry's own gradients alone."""
    autocorrelation: Callable[[OptimConfig, Shape], Autocorrelation] | None
    """Of an entry's update, for a matrix of this shape; None: there is no closed form."""
    kept: Callable[[float, float], float] = decoupled
    """(lr, weight_decay) -> share of a parameter that a step keeps of it."""

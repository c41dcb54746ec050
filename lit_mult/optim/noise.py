"""How an optimizer moves a parameter under pure noise, in closed form where one is known.

Source: arXiv:2601.04890 sec. 3, eq. 1 (norm ~ sqrt(lr / weight decay)); the constants are derived here.

A step is w <- (1 - lr * decay) w - lr * u. Under gradients that are independent N(0, 1), u is a stationary series of
mean 0 with autocorrelation R(k) = E[u_t u_(t+k)], and at a constant lr the variance of an entry settles at

    E[w^2] = lr^2 / (1 - a^2) * sum over all k of R(k) a^|k|,     a = 1 - lr * decay,

which for small lr * decay is (lr / (2 decay)) * sum R(k): the update's *long-run* variance counts, not its own. So

    RMS(w) = c sqrt(lr / (2 decay)),     c^2 = (2 lr decay / (1 - a^2)) * sum R(k) a^|k|.

An exponential average has sum R(k) = 1 for any beta, and would give c = 1. c is smaller because noise is divided by its
own size (AdamW), and because orthogonalization loses part of the momentum's direction (Muon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_mult.registry.roles import Shape

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig


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

        With q_j the covariance of that sum with the next update, for each exponential of R,

            D^2 <- (1 - lr decay)^2 D^2 + 2 (1 - lr decay) lr q + lr^2 R(0),   q_j <- rate_j ((1 - lr decay) q_j + lr).

        Updates are taken as stationary from the first step; with bias correction the first ones are larger.

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
    """Factor of decoupled weight decay on a parameter."""
    return 1 - lr * weight_decay


@dataclass(frozen=True)
class NoiseReference:
    """How `diagnostics.brownian` simulates an optimizer on pure noise, and the expected result."""

    by_shape: bool
    """Whether the update of an entry depends on the whole matrix, not only on its own gradients."""
    autocorrelation: Callable[[OptimConfig, Shape], Autocorrelation] | None
    """Of an entry's update, for a matrix of this shape; None if there is no closed form."""
    kept: Callable[[float, float], float] = decoupled
    """(lr, weight_decay) -> factor of a step on the parameter."""

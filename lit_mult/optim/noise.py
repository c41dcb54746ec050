"""What the optimizers make of pure noise, in closed form: the size that updates and decay balance at.

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
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lit_mult.config import OptimConfig
from lit_mult.optim.muon import NS_COEFFICIENTS, RMS_OF_ADAM, orthogonalize
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


def adamw_autocorrelation(config: OptimConfig) -> Autocorrelation:
    """R of u = m / sqrt(v) to first order in 1 - beta2.

    u_t = (1 - beta1) sum_i beta1^(t-i) g_i / sqrt(v_t), and v depends on squares alone: by the symmetry of each g only
    products of a gradient with itself survive,

        R(s - t) = (1 - beta1)^2 sum_i beta1^(s-i) beta1^(t-i) E[g_i^2 / sqrt(v_s v_t)].

    With v = 1 + d and V = Var d = 2 (1 - beta2) / (1 + beta2), 1 / sqrt(v_s v_t) is
    1 - (d_s + d_t) / 2 + 3 (d_s^2 + d_t^2) / 8 + d_s d_t / 4, E[g_i^2 d_s] = 2 (1 - beta2) beta2^(s-i), and so

        R(k) = (1 - beta1)^2 beta1^k [(1 + 3 V / 4 + beta2^k V / 4) / (1 - beta1^2)
                                      - (1 - beta2) (1 + beta2^k) / (1 - beta1^2 beta2)].

    At (0.9, 0.95): R(0) = 0.051 (an update's RMS of 0.226) and sum R = 0.978, c = 0.989.
    """
    beta1, beta2 = config.betas
    variance = 2 * (1 - beta2) / (1 + beta2)
    plain = (1 - beta1) ** 2 / (1 - beta1**2)
    own = (1 - beta1) ** 2 * (1 - beta2) / (1 - beta1**2 * beta2)
    amplitudes = (plain * (1 + 0.75 * variance) - own, plain * 0.25 * variance - own)
    return Autocorrelation(sum(amplitudes), amplitudes, (beta1, beta1 * beta2))


def muon_autocorrelation(config: OptimConfig, shape: Shape) -> Autocorrelation:
    """R of an entry of Muon's matched update 0.2 sqrt(max(shape)) O, O the orthogonalized momentum.

    The Nesterov momentum x has coefficients (1 - mu) (1 + mu, mu^2, mu^3, ...), hence a correlation rho(k) = b mu^k
    with 1 / sum rho = (1 - mu)^2 [(1 + mu)^2 + mu^4 / (1 - mu^2)]. x is Gaussian and O an odd function of it that
    turns with it, so that its covariance is a power series in rho with odd powers and positive coefficients: the linear
    one is the square of the projection L of O on x, and the rest of the power P counts as cubic:

        R(k) = 0.04 max(shape) / size * [L^2 rho + (P - L^2) rho^3].

    L and P are those of one Gaussian matrix of this shape, orthogonalized by Muon's own iteration.
    """
    mu = config.muon_momentum
    momentum = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalize(momentum[None], NS_COEFFICIENTS, config.muon_ns_steps, 1e-7)[0]
    linear = float((update * momentum).sum() / momentum.norm()) ** 2
    power = float(update.square().sum())
    unit = RMS_OF_ADAM**2 * max(shape) / (shape[0] * shape[1])
    own = (1 - mu) ** 2 * ((1 + mu) ** 2 + mu**4 / (1 - mu**2))
    b = (1 - mu) ** 2 * (mu * (1 + mu) + mu**4 / (1 - mu**2)) / own
    return Autocorrelation(unit * power, (unit * linear * b, unit * (power - linear) * b**3), (mu, mu**3))

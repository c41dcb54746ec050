"""How far a run takes its matrices towards the balance of noise and weight decay.

Noise lets a matrix grow and decay shrinks it until they balance at a norm of about sqrt(lr / weight_decay)
(arXiv:2601.04890 eq. 1). Multipliers free a matrix from that norm; what they gain in a run that stops before the
balance has other causes. A step shrinks the start by 1 - lr * weight_decay: the balance takes some 1 / (lr *
weight_decay) steps. Corrected decay (`method.decay`) falls as the square of the lr. Cautious decay takes twice as long:
of a matrix that has no part in its update half of the entries decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lit_mult.config import RunConfig
from lit_mult.method.plan import MatrixPlan, RunPlan
from lit_mult.method.schedule import peak_steps
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.registry.roles import HIDDEN_ROLES, Role
from lit_mult.schema import MatrixRegime

BALANCED: Final = 2.0
"""lr * weight_decay * steps from which a matrix counts as balanced: its start has then shrunk to exp(-2) of itself, 2 %
of the squared norm."""


def matrix_regimes(config: RunConfig, plan: RunPlan) -> dict[Role, MatrixRegime]:
    """The regime of the matrices of each role, in the order of the forward pass.

    A tied head has none: its weight is the embedding's.

    Args:
        config: of the run.
        plan: of the run; the size of the vocabulary does not matter.
    """
    by_role = {matrix.role: matrix for matrix in plan.matrices.values()}  # equal in all layers
    if config.model.tie_embeddings:
        del by_role[Role.LM_HEAD]
    return {role: _regime(matrix, config) for role, matrix in by_role.items()}


def shortfall(config: RunConfig, regimes: Mapping[Role, MatrixRegime]) -> str:
    """A line on the hidden matrices that a run cannot take to the balance; empty if there are none."""
    hidden = {role: one.decay_times for role, one in regimes.items() if role in HIDDEN_ROLES}
    below = {role: times for role, times in hidden.items() if times is not None and times < BALANCED}
    if not below:
        return ""
    who = "hidden matrices" if len(below) == len(hidden) else ", ".join(below)
    times = " to ".join(dict.fromkeys(f"{end:.2g}" for end in (min(below.values()), max(below.values()))))
    steps = f"{peak_steps(config.train.steps, config.schedule):.4g} steps at the peak rate"
    return f"{who} cannot reach the balance: lr * weight_decay * steps = {times}, below {BALANCED:g} ({steps})"


def _regime(matrix: MatrixPlan, config: RunConfig) -> MatrixRegime:
    decay = matrix.lr * matrix.weight_decay * (0.5 if matrix.decay_rule == "cautious" else 1.0)
    steps = peak_steps(config.train.steps, config.schedule, power=2 if matrix.decay_rule == "corrected" else 1)
    return MatrixRegime(
        equilibrium_time=1 / decay if decay else None,
        decay_times=decay * steps if OPTIMIZERS[matrix.optimizer].decays else None,
    )

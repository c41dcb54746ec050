"""How Optuna searches the nuisance factors of a point: parameters, sampler, pruner."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from lit_mult.errors import ConfigError
from lit_mult.study.grids import Distribution, Grid, grid_values
from lit_mult.study.spec import Point, Pruner, StudySpec

_PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}


def make_pruner(pruner: Pruner | None) -> BasePruner:
    """The Optuna pruner of a study.

    Raises:
        ConfigError: it does not take these options.
    """
    if pruner is None:
        return optuna.pruners.NopPruner()
    try:
        made: BasePruner = getattr(optuna.pruners, _PRUNERS[pruner.name])(**pruner.options)
    except (TypeError, ValueError) as error:
        raise ConfigError("pruner.options", pruner.options, " ".join(str(error).split())) from None
    return made


def suggest(trial: optuna.Trial, point: Point) -> dict[str, Any]:
    """Give a trial its parameters, as enqueued or else sampled: the nuisance factors and the seed."""
    for name, distribution in distributions(point).items():
        if isinstance(distribution, FloatDistribution):
            trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        elif isinstance(distribution, CategoricalDistribution):
            trial.suggest_categorical(name, distribution.choices)
    return trial.params


def distributions(point: Point) -> dict[str, BaseDistribution]:
    """Parameters of a point's trials: the nuisance factors and the seed."""
    found = {name: _distribution(grid, point) for name, grid in point.nuisance.items()}
    if point.spec.follow_optimum and isinstance(planned := found.get("optim.lr"), FloatDistribution):
        rates = sorted(grid_values(point.nuisance["optim.lr"]))
        growth = (rates[1] / rates[0]) ** point.spec.follow_optimum
        found["optim.lr"] = FloatDistribution(planned.low / growth, planned.high * growth, log=True)
    return found | {"seed": CategoricalDistribution(point.spec.seeds)}


def make_sampler(spec: StudySpec, trial: int) -> BaseSampler:
    """The sampler for the trial of this number.

    Its seed is the same at every point, so that arms are offered the same values for as long as the sampler does not
    learn, and another one for every trial, or sweeps on two machines, or before and after a restart, would sample the
    same again.
    """
    seed = spec.seeds[0] + 1_000_003 * trial
    # A grid is enqueued whole and leaves nothing to sample.
    return TPESampler(seed=seed) if spec.sampler == "tpe" else RandomSampler(seed=seed)


def _distribution(grid: Grid, point: Point) -> BaseDistribution:
    if isinstance(grid, Distribution):
        return FloatDistribution(grid.low, grid.high, log=grid.log)
    values = grid_values(grid)
    if point.is_grid and all(isinstance(value, float) for value in values):
        # As a range, so that Optuna's plots have a numeric axis; the values of the grid are enqueued. A sampler would
        # draw from all of it.
        return FloatDistribution(min(values), max(values), log=min(values) > 0)
    return CategoricalDistribution(values)

"""Optimizers on spheres: the norm of every matrix, or of every row of it, stays that of the start. No weight decay.

    W <- R N(W - lr u)          `sphere`, `muon-sphere`
    W <- R N(W - lr R N(u))     `hyperball`, `muon-hyperball` (arXiv:2606.16899)

R = |W_0|, N(x) = x / |x|, and u is the step of AdamW, or of Muon matched to Adam's RMS, at a learning rate of 1. The
norm is Frobenius' or, with `optim.sphere: row`, that of each row by itself. The first two make steps of the size that
the plain optimizer has, the others steps of relative size lr, whatever the size of u.

Under pure noise u is orthogonal to W: a step of hyperball keeps 1 / sqrt(1 + lr^2) of W. Sums of steps have no closed
form.

`muon-sphere` with multipliers of kind softplus is magnitude-direction decoupling (arXiv:2606.25971 algorithm 2), and
`sphere` its variant for AdamW, but for two choices. Our step of Muon has the RMS of Adam's, 0.2. Theirs is the
orthogonal O times sqrt(max(d_out / d_in, d_in / d_out)), of RMS 1 / sqrt(min(d_out, d_in)), so that the same step takes
a rate 0.2 sqrt(min(d_out, d_in)) times ours. And they may hold the rows of embedding and head at norm 1: here the
embedding is AdamW's. Nesterov's momentum is `torch.optim.Muon`'s in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_mult.errors import ConfigError
from lit_mult.optim.adamw import StackedAdamW, adam_updates
from lit_mult.optim.closure import evaluated
from lit_mult.optim.muon import COEFFICIENTS, NS_EPS, RMS_OF_ADAM, StackedMuon, by_shape, orthogonal_momenta
from lit_mult.optim.noise import NoiseReference
from lit_mult.optim.sharding import check_whole_matrices
from lit_mult.optim.stacking import StackedUpdate

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

Update = Callable[[list[Tensor], Mapping[Tensor, dict[str, Tensor]], Mapping[str, Any]], list[Tensor]]
"""(matrices of one shape with gradients, their states, parameter group) -> u of each."""

_TINY = 1e-12


class Sphere(Optimizer):
    """Moves matrices on spheres; the state has the radius and the state of the update."""

    def __init__(
        self, groups: list[dict[str, Any]], update: Update, *, relative: bool, sphere: str, **settings: Any
    ) -> None:
        """Take groups of matrices (d_out, d_in), each with an lr.

        Args:
            groups: `transposed` in a group says that its matrices are stored as (d_in, d_out).
            update: u.
            relative: whether a step has relative size lr, whatever the size of u.
            sphere: matrix or row, what keeps its norm.
            settings: further settings of a group, for `update`.

        Raises:
            ConfigError: a parameter is not one whole matrix.
        """
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0, "sphere": sphere, **settings})
        self._update, self._relative = update, relative
        check_whole_matrices(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update": self._update, "_relative": self._relative}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                for parameter in parameters:
                    if "radius" not in self.state[parameter]:
                        self.state[parameter]["radius"] = _radius(parameter, group)
                updates = self._update(parameters, self.state, group)
                for parameter, update in zip(parameters, updates, strict=True):
                    radius, weight = self.state[parameter]["radius"], parameter.float()
                    size = group["lr"]
                    if self._relative:
                        size = size * radius / _norm(update, group).clamp(min=_TINY)
                    weight = weight - update * size
                    parameter.copy_(weight * (radius / _norm(weight, group)))
        return loss


def _norm(matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Of the matrix (), or of its rows (d_out, 1), in the orientation of the matrix."""
    by_row = group.get("sphere") == "row"  # checkpoints of earlier versions do not say: of the matrix
    rows = -2 if group.get("transposed") else -1
    norm: Tensor = matrix.norm(dim=rows, keepdim=True) if by_row else matrix.norm()
    return norm


def _radius(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    radius = _norm(parameter.float(), group)
    if (radius < _TINY).any():
        where = f"cannot train {group.get('name', 'a matrix')}, which starts at 0: its norm would stay 0"
        raise ConfigError("optimizer", group.get("optimizer", "sphere"), where)
    return radius


def adam_steps(
    parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """AdamW's step, without decay; group and states as of `adam_updates`."""
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    return adam_updates(gradients, [states[parameter] for parameter in parameters], group)


def matched_momenta(
    parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """Muon's step, matched to Adam's RMS (arXiv:2502.16982 eq. 4); group and states as of `orthogonal_momenta`."""
    scale = RMS_OF_ADAM * math.sqrt(max(parameters[0].shape))
    return [update * scale for update in orthogonal_momenta(parameters, states, group)]


def build_sphere(groups: list[dict[str, Any]], config: OptimConfig) -> Sphere:
    """`sphere`; each group has an lr."""
    return Sphere(groups, adam_steps, relative=False, **_of_adam(config))


def build_muon_sphere(groups: list[dict[str, Any]], config: OptimConfig) -> Sphere:
    """`muon-sphere`; each group has an lr."""
    return Sphere(groups, matched_momenta, relative=False, **_of_muon(config))


def build_hyperball(groups: list[dict[str, Any]], config: OptimConfig) -> Sphere:
    """`hyperball`; each group has an lr."""
    return Sphere(groups, adam_steps, relative=True, **_of_adam(config))


def build_muon_hyperball(groups: list[dict[str, Any]], config: OptimConfig) -> Sphere:
    """`muon-hyperball`; each group has an lr."""
    return Sphere(groups, orthogonal_momenta, relative=True, **_of_muon(config))


def _of_adam(config: OptimConfig) -> dict[str, Any]:
    return {"sphere": config.sphere, "betas": config.betas, "eps": config.eps}


def _of_muon(config: OptimConfig) -> dict[str, Any]:
    momentum = {"momentum": config.muon_momentum, "nesterov": True}
    iteration = {"ns_coefficients": COEFFICIENTS[config.muon_coefficients], "ns_steps": config.muon_ns_steps}
    return {"sphere": config.sphere, **momentum, **iteration, "eps": NS_EPS}


HYPERBALL_NOISE = NoiseReference(
    by_shape=True, autocorrelation=None, kept=lambda lr, weight_decay: 1 / math.sqrt(1 + lr**2)
)


class _StackedOnSphere(StackedUpdate):
    """Before the update of AdamW or Muon among the bases. N matrices of one shape are adjacent."""

    by_shape = True
    relative: ClassVar[bool]

    def __init__(self, like_MP: Tensor, matrices: Sequence[tuple[slice, torch.Size]], config: OptimConfig) -> None:
        super().__init__(like_MP, matrices, config)
        self._radii_MxNxAx1 = [self._norms(weights_MxNxAxB) for weights_MxNxAxB in self._by_shape(like_MP)]
        if any((radii < _TINY).any() for radii in self._radii_MxNxAx1):
            raise ConfigError("optim.sphere", config.sphere, "a matrix, or a row, starts at 0: its norm would stay 0")

    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        update_MP: Tensor = super().update(gradients_MP, step)  # type: ignore[safe-super]
        if self.relative:
            for update_MxNxAxB, radii in zip(self._by_shape(update_MP), self._radii_MxNxAx1, strict=True):
                update_MxNxAxB.mul_(radii / self._norms(update_MxNxAxB).clamp(min=_TINY))
        return update_MP

    def settle(self, weights_MP: Tensor) -> None:
        for weights_MxNxAxB, radii in zip(self._by_shape(weights_MP), self._radii_MxNxAx1, strict=True):
            weights_MxNxAxB.mul_(radii / self._norms(weights_MxNxAxB))

    def state_of(self, columns: slice, shape: torch.Size) -> dict[str, Tensor]:
        blocks = zip(self.matrices, self._radii_MxNxAx1, strict=True)
        start, radii = next((block.start, radii) for (block, _), radii in blocks if columns.stop <= block.stop)
        radius = radii[:, (columns.start - start) // (columns.stop - columns.start)]
        return super().state_of(columns, shape) | {"radius": radius if self.config.sphere == "row" else radius.view(-1)}

    def _by_shape(self, buffer_MP: Tensor) -> list[Tensor]:
        return [buffer_MP[:, columns].unflatten(1, (-1, *shape)) for columns, shape in self.matrices]

    def _norms(self, matrices_MxNxAxB: Tensor) -> Tensor:
        """Of each matrix (M, N, 1, 1), or of each row (M, N, A, 1)."""
        dims = -1 if self.config.sphere == "row" else (-2, -1)
        norms: Tensor = torch.linalg.vector_norm(matrices_MxNxAxB, dim=dims, keepdim=True)
        return norms


class StackedSphere(_StackedOnSphere, StackedAdamW):
    """`sphere` in a stack."""

    relative = False


class StackedMuonSphere(_StackedOnSphere, StackedMuon):
    """`muon-sphere` in a stack."""

    relative = False


class StackedHyperball(_StackedOnSphere, StackedAdamW):
    """`hyperball` in a stack."""

    relative = True


class StackedMuonHyperball(_StackedOnSphere, StackedMuon):
    """`muon-hyperball` in a stack."""

    relative = True

"""Muon: Newton-Schulz batched over matrices of equal shape, its noise reference, and its update of stacks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from lit_mult.errors import UserError
from lit_mult.optim.closure import evaluated
from lit_mult.optim.noise import Autocorrelation, NoiseReference
from lit_mult.optim.sharding import Shards, local, local_gradients, on_owners, placement_of, sharding_of
from lit_mult.optim.stacking import StackedUpdate
from lit_mult.registry.contracts import RowParts
from lit_mult.registry.roles import Shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lit_mult.config import OptimConfig

RMS_OF_ADAM = 0.2
"""Approximate RMS of Adam's updates, which Muon's match (arXiv:2502.16982 eq. 4)."""
Coefficients = tuple[float, float, float] | tuple[tuple[float, float, float], ...]
"""(a, b, c) of every iteration, or of one after the other, the last repeated: x <- a x + b (x x') x + c (x x')^2 x."""
_MARGIN = 1.02
"""Over the Frobenius norm by which Polar Express divides first, as rounding may lift a singular value above 1."""
COEFFICIENTS: Final[Mapping[str, Coefficients]] = {
    "quintic": (3.4445, -4.7750, 2.0315),  # as torch.optim.Muon has them
    "polar_express": (  # arXiv:2505.16932; the first takes the margin in
        (8.1566 / _MARGIN, -22.4833 / _MARGIN**3, 15.8788 / _MARGIN**5),
        (4.0429, -2.8089, 0.50002),
        (3.8917, -2.7725, 0.50606),
        (3.2858, -2.3681, 0.46449),
        (2.3465, -1.7098, 0.42324),
    ),
}
"""Values of `optim.muon_coefficients`."""
NS_EPS = 1e-7  # of torch.optim.Muon


def orthogonalize(updates_NxAxB: Tensor, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """Replace the singular values of N matrices by values near 1, in the matrices' dtype.

    The quintic Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982 eq. 2).
    """
    tall = updates_NxAxB.shape[-2] > updates_NxAxB.shape[-1]
    x = updates_NxAxB.mT if tall else updates_NxAxB
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in _of_steps(coefficients, steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _of_steps(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    own: Any = coefficients if isinstance(coefficients[0], tuple | list) else (coefficients,)
    return [own[min(step, len(own) - 1)] for step in range(steps)]


def orthogonalize_parts(updates_NxAxB: Tensor, group: Mapping[str, Any]) -> Tensor:
    """`orthogonalize` with the settings of a parameter group, which may have `parts` and `transposed` (see `Muon`).

    A part of shape (a, b) of a matrix (A, B) is multiplied by sqrt(size(a, b) / size(A, B)), see `_size`: with the
    factor sqrt(size(A, B)) of the whole matrix it has its own.
    """
    settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
    if group.get("parts") is None:
        return orthogonalize(updates_NxAxB, *settings)
    parts = RowParts(*group["parts"])
    rows_NxAxB = updates_NxAxB.mT if group.get("transposed") else updates_NxAxB
    done = []
    for block_NxGxaxB in rows_NxAxB.unflatten(-2, (parts.groups, -1)).split(parts.sizes, dim=-2):
        part_NxaxB = block_NxGxaxB.flatten(-3, -2)
        own = math.sqrt(_size(part_NxaxB.shape[-2:], group) / _size(rows_NxAxB.shape[-2:], group))
        done.append(orthogonalize(part_NxaxB, *settings).mul_(own).view_as(block_NxGxaxB))
    rows_NxAxB = torch.cat(done, dim=-2).flatten(-3, -2)
    return rows_NxAxB.mT if group.get("transposed") else rows_NxAxB


def _size(shape: Sequence[int], group: Mapping[str, Any]) -> float:
    """Of an orthogonal update (d_out, d_in), squared, up to a unit: max(shape) for equal entries at every shape
    (arXiv:2502.16982 eq. 4), d_out / d_in on a spectral ball, whose group has a `radius` (`optim.scion`)."""
    return max(shape) if group.get("radius") is None else shape[0] / shape[1]


def by_shape(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters that have a gradient, in lists of equal shape, placement, device and dtype."""
    found = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            kind = parameter.shape, parameter.device, parameter.dtype, placement_of(parameter)
            found[kind].append(parameter)
    return found.values()


def _momenta(parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]) -> Tensor:
    """Update the momenta; this rank's shards of what is to be orthogonalized, in the dtype of that."""
    gradients = local_gradients(parameters)
    for parameter in parameters:
        if "momentum_buffer" not in states[parameter]:
            states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    momenta = local([states[parameter]["momentum_buffer"] for parameter in parameters])
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
    dtype = torch.float32 if gradients[0].device.type == "cpu" else torch.bfloat16
    return torch.stack(list(updates)).to(dtype)


def orthogonal_momenta(
    parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """Update the momenta of matrices, or stacks of matrices, of one shape, and orthogonalize them.

    Args:
        parameters: with gradients; not sharded.
        states: their states, with a momentum_buffer from the first call on.
        group: momentum, nesterov, ns_coefficients, ns_steps and eps, as in `torch.optim.Muon`; parts and transposed.
    """
    updates = _momenta(parameters, states, group)
    orthogonal = orthogonalize_parts(updates.flatten(0, -3), group).view_as(updates)
    return [update.to(parameters[0].dtype) for update in orthogonal]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (same groups, state and mathematics, update matched to Adam's RMS), faster for many matrices.

    torch orthogonalizes one matrix at a time, in bfloat16. This batches equal shapes, and uses float32 on CPUs, most of
    which have no fast bfloat16: at width 128 the step takes a fifth of the time.

    Beyond torch's, coefficients may differ between iterations (`COEFFICIENTS`); a parameter may be a stack
    (n, d_out, d_in) of matrices, and a DTensor, whose matrices are orthogonalized on one rank each. A group may have
    `parts`, a `RowParts`, where each matrix is several in one, to be orthogonalized one by one; `transposed`, whether
    they are stored as (d_in, d_out); and `radius`, whose update is scaled to a spectral ball (`optim.scion`).
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """`settings`: of `torch.optim.Muon`.

        Raises:
            UserError: a parameter is no matrix or stack of matrices, does not have the rows of its parts, or is sharded
                along several dimensions.
        """
        # torch's own constructor refuses stacks; its defaults, of one matrix, keep the groups as torch has them.
        defaults = torch.optim.Muon([torch.empty(1, 1)], **settings).defaults
        torch.optim.Optimizer.__init__(self, groups, defaults)
        for group in self.param_groups:
            if isinstance(group.get("parts"), RowParts):
                group["parts"] = astuple(group["parts"])  # checkpoints have the groups, and hold plain values alone
            parts = RowParts(*group["parts"]) if group.get("parts") else None
            for parameter in group["params"]:
                fault = f"Muon cannot train a parameter of shape {tuple(parameter.shape)}"
                if parameter.ndim not in (2, 3):
                    raise UserError(f"{fault}: it needs matrices (d_out, d_in), or stacks (n, d_out, d_in) of them")
                if parts is not None and parameter.shape[-1 if group.get("transposed") else -2] != parts.rows:
                    raise UserError(f"{fault} with {parts}: they have {parts.rows} rows")
                sharding_of(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = evaluated(closure)
        sharded = defaultdict(list)
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                if sharding := sharding_of(parameters[0]):
                    sharded[sharding.group].append((parameters, sharding.dim, group))
                else:
                    _move(parameters, self._updates(parameters, group), group)
        for ranks, lists in sharded.items():
            self._step_sharded(lists, ranks)
        return loss

    def _updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Of whole matrices of one shape, before `_move`."""
        return orthogonal_momenta(parameters, self.state, group)

    def _step_sharded(self, lists: list[tuple[list[Tensor], int, dict[str, Any]]], ranks: ProcessGroup) -> None:
        """Step (parameters of one shape, the dimension that is sharded, their group) of all groups in one exchange.

        So the work of small groups is spread over the ranks as well.
        """
        momenta = [_momenta(parameters, self.state, group) for parameters, _, group in lists]
        batches = [
            Shards(momentum.flatten(0, -3), (parameters[0].shape[-2], parameters[0].shape[-1]), dim)
            for momentum, (parameters, dim, _) in zip(momenta, lists, strict=True)
        ]
        updates = on_owners(batches, lambda k, whole_NxAxB: orthogonalize_parts(whole_NxAxB, lists[k][2]), ranks)
        for momentum, update, (parameters, _, group) in zip(momenta, updates, lists, strict=True):
            _move(parameters, list(update.to(parameters[0].dtype).view_as(momentum)), group)


def _move(parameters: list[Tensor], updates: list[Tensor], group: Mapping[str, Any]) -> None:
    """Decay and step this rank's shards of parameters of one shape."""
    *_, rows, columns = parameters[0].shape
    shape = (columns, rows) if group.get("transposed") else (rows, columns)
    scale = group["lr"] * group.get("radius", RMS_OF_ADAM) * math.sqrt(_size(shape, group))
    shards = local(parameters)
    torch._foreach_mul_(shards, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(shards, updates, alpha=-scale)


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Muon:
    """The optimizer; each group has an lr and weight_decay."""
    return Muon(groups, **settings(config))


def settings(config: OptimConfig) -> dict[str, Any]:
    """What all groups share, for `Muon`."""
    return {
        "momentum": config.muon_momentum,
        "ns_coefficients": COEFFICIENTS[config.muon_coefficients],
        "ns_steps": config.muon_ns_steps,
        "adjust_lr_fn": "match_rms_adamw",
    }


def autocorrelation(config: OptimConfig, shape: Shape) -> Autocorrelation:
    """R of an entry of Muon's matched update 0.2 sqrt(max(shape)) O, O the orthogonalized momentum.

    The Nesterov momentum x has coefficients (1 - mu) (1 + mu, mu^2, mu^3, ...), hence a correlation rho(k) = b mu^k
    with 1 / sum rho = (1 - mu)^2 [(1 + mu)^2 + mu^4 / (1 - mu^2)]. x is Gaussian and O is an odd, rotation-equivariant
    function of it. So its covariance is a power series in rho with odd powers and positive coefficients: the linear
    coefficient is the square of the projection L of O on x, and the rest of the power P is treated as cubic:

        R(k) = 0.04 max(shape) / size * [L^2 rho + (P - L^2) rho^3].

    L and P are measured on one Gaussian matrix of this shape, orthogonalized by Muon's iteration.
    """
    mu = config.muon_momentum
    momentum = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coefficients = COEFFICIENTS[config.muon_coefficients]
    update = orthogonalize(momentum[None], coefficients, config.muon_ns_steps, NS_EPS)[0]
    linear = float((update * momentum).sum() / momentum.norm()) ** 2
    power = float(update.square().sum())
    unit = RMS_OF_ADAM**2 * max(shape) / (shape[0] * shape[1])
    own = (1 - mu) ** 2 * ((1 + mu) ** 2 + mu**4 / (1 - mu**2))
    b = (1 - mu) ** 2 * (mu * (1 + mu) + mu**4 / (1 - mu**2)) / own
    return Autocorrelation(unit * power, (unit * linear * b, unit * (power - linear) * b**3), (mu, mu**3))


NOISE = NoiseReference(by_shape=True, autocorrelation=autocorrelation)


class StackedMuon(StackedUpdate):
    """Matrices of one shape, of all members, are orthogonalized together."""

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    by_shape = True

    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """Orthogonalized momentum, matched to Adam's RMS, for a learning rate of 1."""
        dtype = torch.float32 if gradients_MP.device.type == "cpu" else torch.bfloat16
        coefficients = COEFFICIENTS[self.config.muon_coefficients]
        momentum_MP = self.momentum(gradients_MP)
        update_MP = torch.empty_like(gradients_MP)
        for index, (columns, shape) in enumerate(self.matrices):
            part = momentum_MP[:, columns]
            matrices_NxAxB = part.to(dtype).reshape(-1, *shape)
            matrices_NxAxB = orthogonalize(matrices_NxAxB, coefficients, self.config.muon_ns_steps, NS_EPS)
            update_MP[:, columns] = self.finish(index, matrices_NxAxB.to(part.dtype)).reshape(part.shape)
            update_MP[:, columns] *= self.scale(shape)
        return update_MP

    def momentum(self, gradients_MP: Tensor) -> Tensor:
        """What is orthogonalized: the Nesterov momentum."""
        averages_MP, momentum = self.state["momentum_buffer"], self.config.muon_momentum
        averages_MP.lerp_(gradients_MP, 1 - momentum)
        return gradients_MP.lerp(averages_MP, momentum)

    def finish(self, index: int, updates_NxAxB: Tensor) -> Tensor:
        """What is done to the orthogonal updates of `matrices[index]`, of all members one after the other."""
        return updates_NxAxB

    def scale(self, shape: torch.Size) -> float:
        """Factor on an update."""
        return RMS_OF_ADAM * math.sqrt(max(shape))

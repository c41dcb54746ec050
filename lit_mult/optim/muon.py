"""Muon: Newton-Schulz batched over matrices of equal shape, its noise reference, and its update of stacks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_mult.optim.noise import Autocorrelation, NoiseReference
from lit_mult.optim.stacking import StackedUpdate
from lit_mult.registry.roles import Shape

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

RMS_OF_ADAM = 0.2
"""Approximate RMS of Adam's updates, which Muon's match (arXiv:2502.16982 eq. 4)."""
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as `torch.optim.Muon` has them."""
_EPS = 1e-7  # of torch.optim.Muon


def orthogonalize(updates_NxAxB: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Replace the singular values of N matrices by values near 1, in the matrices' dtype.

    The quintic Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982 eq. 2).
    """
    a, b, c = coefficients
    tall = updates_NxAxB.shape[-2] > updates_NxAxB.shape[-1]
    x = updates_NxAxB.mT if tall else updates_NxAxB
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def by_shape(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters that have a gradient, in lists of equal shape, device and dtype."""
    found = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            found[parameter.shape, parameter.device, parameter.dtype].append(parameter)
    return found.values()


def orthogonal_momenta(
    parameters: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any]
) -> list[Tensor]:
    """Update the momenta of matrices of one shape, and orthogonalize them.

    Args:
        parameters: matrices with gradients.
        states: their states, with a momentum_buffer from the first call on.
        group: momentum, nesterov, ns_coefficients, ns_steps and eps, as in `torch.optim.Muon`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        if "momentum_buffer" not in states[parameter]:
            states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    momenta = [states[parameter]["momentum_buffer"] for parameter in parameters]
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
    dtype = torch.float32 if gradients[0].device.type == "cpu" else torch.bfloat16
    updates_NxAxB = torch.stack(list(updates)).to(dtype)
    updates_NxAxB = orthogonalize(updates_NxAxB, group["ns_coefficients"], group["ns_steps"], group["eps"])
    return [update.to(gradients[0].dtype) for update in updates_NxAxB]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (same groups, state and mathematics, update matched to Adam's RMS), faster for many matrices.

    torch orthogonalizes one matrix at a time, in bfloat16. This batches equal shapes, and uses float32 on CPUs, most of
    which have no fast bfloat16: at width 128 the step takes a fifth of the time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                updates = orthogonal_momenta(parameters, self.state, group)
                # 0.2 sqrt(max(A, B)) matches the RMS of Adam's update (arXiv:2502.16982 eq. 4).
                scale = group["lr"] * RMS_OF_ADAM * math.sqrt(max(parameters[0].shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-scale)
        return loss


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Muon:
    """The optimizer; each group has an lr and weight_decay."""
    return Muon(
        groups,
        momentum=config.muon_momentum,
        ns_coefficients=NS_COEFFICIENTS,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )


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
    update = orthogonalize(momentum[None], NS_COEFFICIENTS, config.muon_ns_steps, _EPS)[0]
    linear = float((update * momentum).sum() / momentum.norm()) ** 2
    power = float(update.square().sum())
    unit = RMS_OF_ADAM**2 * max(shape) / (shape[0] * shape[1])
    own = (1 - mu) ** 2 * ((1 + mu) ** 2 + mu**4 / (1 - mu**2))
    b = (1 - mu) ** 2 * (mu * (1 + mu) + mu**4 / (1 - mu**2)) / own
    return Autocorrelation(unit * power, (unit * linear * b, unit * (power - linear) * b**3), (mu, mu**3))


NOISE = NoiseReference(by_shape=True, autocorrelation=autocorrelation)


class StackedMuon(StackedUpdate):
    """Matrices of one shape, of all members, are orthogonalized together."""

    states = ("momentum_buffer",)
    by_shape = True

    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """Orthogonalized momentum, matched to Adam's RMS, for a learning rate of 1."""
        momentum = self.config.muon_momentum
        averages_MP = self.state["momentum_buffer"]
        averages_MP.lerp_(gradients_MP, 1 - momentum)
        dtype = torch.float32 if gradients_MP.device.type == "cpu" else torch.bfloat16
        nesterov_MP = gradients_MP.lerp(averages_MP, momentum)
        update_MP = torch.empty_like(gradients_MP)
        for columns, shape in self.matrices:
            part = nesterov_MP[:, columns]
            matrices_NxAxB = part.to(dtype).reshape(-1, *shape)
            matrices_NxAxB = orthogonalize(matrices_NxAxB, NS_COEFFICIENTS, self.config.muon_ns_steps, _EPS)
            update_MP[:, columns] = matrices_NxAxB.to(part.dtype).reshape(part.shape)
            update_MP[:, columns] *= RMS_OF_ADAM * math.sqrt(max(shape))
        return update_MP

"""Muon with its Newton-Schulz iteration batched over matrices of equal shape, and in float32 on CPUs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

RMS_OF_ADAM = 0.2
"""Entries of an update, about: those of Adam's (arXiv:2502.16982 eq. 4)."""
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as `torch.optim.Muon` has them."""


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


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (same groups, state and mathematics, update matched to Adam's RMS), faster for many matrices.

    torch iterates over one matrix after the other, in bfloat16. Here equal shapes go together, and CPUs, most of which
    have no fast bfloat16, use float32: at width 128 the step takes a fifth of the time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape, parameter.device, parameter.dtype].append(parameter)
            for (shape, device, _), parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                states = [self.state[parameter] for parameter in parameters]
                for state, gradient in zip(states, gradients, strict=True):
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(gradient)
                momenta = [state["momentum_buffer"] for state in states]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
                dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
                updates_NxAxB = orthogonalize(
                    torch.stack(updates).to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                # 0.2 sqrt(max(A, B)) gives an orthogonal update the RMS that Adam's has (arXiv:2502.16982 eq. 4).
                scale = group["lr"] * RMS_OF_ADAM * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                own_dtype = [update.to(gradients[0].dtype) for update in updates_NxAxB]
                torch._foreach_add_(parameters, own_dtype, alpha=-scale)
        return loss

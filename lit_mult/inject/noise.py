"""Pure noise beside a model in training: which of its parameters have the norm that lr and weight decay give to noise?

The "Adam Brownian motion" of arXiv:2601.04890 fig. 1, for any model and any optimizer that keeps to its groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_mult.inject.layers import multipliers_of, specs_of
from lit_mult.optim.sharding import as_dtensor
from lit_mult.registry.optimizers import OPTIMIZERS

_ENTRIES = 4096  # of a twin: the RMS of independent ones is known to 1 %


class NoiseTwin:
    """Parameters of a model's shapes, moved by the same steps on independent Gaussian gradients.

    Parameters alike in group, shape and start share a twin. Twins live on the CPU; an element-wise optimizer's have
    4096 entries, others the shape of the matrix with its longer side cut to `max_dim`; whole, if a registered optimizer
    has no noise reference.

        noise = lit_mult.NoiseTwin(model, optimizer)
        ...
        optimizer.step()
        noise.step()  # before the scheduler's
        ...
        pandas.DataFrame(noise.norms())
    """

    def __init__(self, model: nn.Module, optimizer: Any, max_dim: int = 256, seed: int = 0) -> None:
        """Before the first step, or at any later one, from where noise then starts.

        Args:
            model: after `add_multipliers`; any model.
            optimizer: of the model's parameters, without a wrapper; its groups' lr and weight_decay may change.
            max_dim: longest side of a matrix that stands for another.
            seed: of starts and gradients.
        """
        self._optimizer, self._generator = optimizer, torch.Generator().manual_seed(seed)
        self._parameters = list(_named(model))
        of_group = {id(one): index for index, group in enumerate(optimizer.param_groups) for one in group["params"]}
        self._twins: dict[tuple[Any, ...], nn.Parameter] = {}
        self._twin_of: dict[str, nn.Parameter] = {}
        groups: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
        for name, _, parameter in self._parameters:
            if (index := of_group.get(id(parameter))) is None:
                continue
            key = (index, self._shape(index, parameter, max_dim), *_start(parameter))
            if key not in self._twins:
                _, shape, mean, std = key
                start = mean + std * torch.randn(shape, generator=self._generator)
                self._twins[key] = nn.Parameter(start)
                groups[index].append(self._twins[key])
            self._twin_of[name] = self._twins[key]
        pairs = [(group, own) for group, own in zip(optimizer.param_groups, groups, strict=True) if own]
        self._moves = type(optimizer)([_settings(group) | {"params": own} for group, own in pairs])
        place = {id(one): group for group in self._moves.param_groups for one in group["params"]}
        self._pairs = [(group, place[id(own[0])]) for group, own in pairs]  # HybridOptimizer has an order of its own

    def step(self) -> None:
        """One step on noise, at the learning rates and decays that the optimizer has now."""
        for group, own in self._pairs:
            own |= {key: group[key] for key in ("lr", "weight_decay")}
        for twin in self._twins.values():
            twin.grad = torch.randn(twin.shape, generator=self._generator)
        self._moves.step()

    def norms(self) -> list[dict[str, Any]]:
        """A row a parameter: name, role, rms (of its entries), noise_rms (of its twin), their ratio (NaN at 0 / 0)."""
        rows = []
        for name, role, parameter in self._parameters:
            if name in self._twin_of:
                own, noise = _rms(parameter), _rms(self._twin_of[name])
                rows.append(
                    {
                        "name": name,
                        "role": role,
                        "rms": own,
                        "noise_rms": noise,
                        "ratio": own / noise if noise else math.nan,
                    }
                )
        return rows

    def _shape(self, index: int, parameter: Tensor, max_dim: int) -> tuple[int, ...]:
        group = self._optimizer.param_groups[index]
        name = group.get("optimizer", type(self._optimizer).__name__.lower())
        if parameter.ndim < 2 or name.startswith("adam"):
            return (_ENTRIES,)
        *_, rows, columns = parameter.shape
        if name in OPTIMIZERS and OPTIMIZERS[name].noise is None:  # an entry's update may depend on d_out and d_in
            return (columns, rows) if group.get("transposed") else (rows, columns)
        scale = min(1.0, max_dim / max(rows, columns))
        return (max(1, round(rows * scale)), max(1, round(columns * scale)))


def _named(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, role, parameter) of every trainable parameter."""
    roles: dict[int, str] = {}
    for module in model.modules():
        for name, spec in specs_of(module).items():
            roles.setdefault(
                id(module._parameters[name]), "+".join(role.value if role else "matrix" for role in spec.roles)
            )
            roles |= {id(one): "multiplier" for one in multipliers_of(module, name).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, roles.get(id(parameter), "vector"), parameter


def _start(parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, to two digits, of which parameters alike have the same."""
    values = _whole(parameter.detach()).float()
    mean, std = float(values.mean()), float(values.std()) if values.numel() > 1 else 0.0
    mean = 0.0 if abs(mean) < 4 * std / math.sqrt(values.numel()) else mean
    return float(f"{mean:.2g}"), float(f"{std:.2g}")


def _rms(parameter: Tensor) -> float:
    return float(_whole(parameter.detach()).double().square().mean().sqrt())


def _whole(tensor: Tensor) -> Tensor:
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Those of a group, but for its layout: a twin is one matrix."""
    return {key: value for key, value in group.items() if key not in ("params", "parts", "transposed", "initial_lr")}

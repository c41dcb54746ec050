"""The table of a model's matrices, multipliers and other parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lit_mult.inject.layers import MatrixSpec, multiplier_name, multipliers_of, specs_of
from lit_mult.registry.contracts import Axis


def parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None) -> str:
    """Name, role, shape (d_out x d_in) and learnable multipliers of every matrix; equal layers share a line.

    Args:
        model: after `add_multipliers`.
        groups: of `build_param_groups`; adds optimizer, lr and weight decay, and lines for all other parameters.
    """
    group_of = {id(parameter): group for group in groups or () for parameter in group["params"]}
    lines: dict[tuple[str, ...], list[str]] = {}
    first: dict[int, str] = {}

    def add(name: str, parameter: nn.Parameter, cells: tuple[str, ...]) -> None:
        if groups is not None:
            group = group_of.get(id(parameter))
            own = ("-", "-", "-") if group is None else tuple(_cell(group[key]) for key in _OF_GROUP)
            cells = (*cells, *own)
        starred = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        lines.setdefault((starred, *cells), []).append(name)

    learnable = 0
    for path, module in model.named_modules():
        specs = specs_of(module)
        multipliers = {multiplier_name(name, axis): axis for name in specs for axis in multipliers_of(module, name)}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}".removeprefix(".")
            if name in specs:
                full = path if name == "weight" else full
                shared = first.setdefault(id(parameter), full)
                add(full, parameter, _of_matrix(specs[name], parameter, "" if shared == full else shared))
            elif name in multipliers:
                learnable += parameter.numel()
                if groups is not None:
                    add(full, parameter, ("multiplier", _shape(parameter), "-"))
            elif groups is not None:
                add(full, parameter, ("vector", _shape(parameter), "-"))
    table = [("matrix", "role", "shape", "multipliers", *(_OF_GROUP if groups is not None else ()))]
    for (name, *cells), names in lines.items():
        table.append((f"{name} ({len(names)})" if len(names) > 1 else names[0], *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*shown, f"{learnable} learnable multipliers"])


_OF_GROUP = ("optimizer", "lr", "weight_decay")


def _of_matrix(spec: MatrixSpec, weight: nn.Parameter, shared: str) -> tuple[str, ...]:
    roles = "+".join(role.value if role else "none given" for role in spec.roles)
    axes = ", ".join(dict.fromkeys("+".join(axis for axis in Axis if axis in axes) or "none" for axes in spec.axes))
    tied = f" (weight of {shared}, which is tied; multipliers are not)" if shared else ""
    return roles, _shape(weight.mT if spec.transposed else weight), axes + tied


def _shape(parameter: Any) -> str:
    return "x".join(map(str, parameter.shape))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Tables of a model's matrices, multipliers and other parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_mult.inject.layers import MatrixSpec, matrix_name, multiplier_name, multipliers_of, specs_of
from lit_mult.registry.contracts import Axis

_OF_GROUP = ("optimizer", "lr", "weight_decay")


def parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None) -> str:
    """Name, role, shape (d_out x d_in) and learnable multipliers of every matrix; equal layers share a line.

    Args:
        model: after `add_multipliers`.
        groups: of `build_param_groups`; adds optimizer, lr and weight decay, and lines for all other parameters.
    """
    header: tuple[str, ...] = ("matrix", "role", "shape", "multipliers")
    shown: list[tuple[str, ...]]
    rows = list(_rows(model))
    learnable = sum(parameter.numel() for _, parameter, cells in rows if cells[0] == "multiplier")
    if groups is None:
        shown = [(name, *cells) for name, _, cells in rows if cells[0] not in ("multiplier", "vector")]
    else:
        header = (*header, *_OF_GROUP)
        of_group = {id(parameter): group for group in groups for parameter in group["params"]}
        shown = [(name, *cells, *_settings(of_group.get(id(parameter)))) for name, parameter, cells in rows]
    return "\n".join([*layers_together(header, shown), f"{learnable} learnable multipliers"])


def layers_together(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table of matrices; rows that differ only in the layer of the name, the first cell, are one."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        merged.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), *rest), []).append(name)
    table = [header]
    for (name, *rest), names in merged.items():
        table.append((f"{name} ({len(names)})" if len(names) > 1 else names[0], *rest))
    yield from aligned(table)


def aligned(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def named(spec: MatrixSpec) -> str:
    """The roles of a matrix's parts."""
    return "+".join(role.value if role else "none given" for role in spec.roles)


def sides(weight: Tensor, spec: MatrixSpec) -> str:
    """Its shape, as 96x32."""
    return "x".join(map(str, (weight.mT if spec.transposed else weight).shape))


def _rows(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[str, str, str]]]:
    """(name, parameter, (role, shape, multipliers)) of every parameter, in the model's order."""
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        specs = specs_of(module)
        multipliers = {multiplier_name(name, axis) for name in specs for axis in multipliers_of(module, name)}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = matrix_name(path, name) if name in specs else f"{path}.{name}".removeprefix(".")
            if name in specs:
                axes = dict.fromkeys(
                    "+".join(axis for axis in Axis if axis in part) or "none" for part in specs[name].axes
                )
                shared = first.setdefault(id(parameter), full)
                tied = "" if shared == full else f" (weight of {shared}, which is tied; multipliers are not)"
                yield full, parameter, (named(specs[name]), sides(parameter, specs[name]), ", ".join(axes) + tied)
            else:
                shape = "x".join(map(str, parameter.shape))
                yield full, parameter, ("multiplier" if name in multipliers else "vector", shape, "-")


def _settings(group: Mapping[str, Any] | None) -> tuple[str, ...]:
    if group is None:
        return ("-",) * len(_OF_GROUP)
    return tuple(f"{group[key]:.4g}" if isinstance(group[key], float) else str(group[key]) for key in _OF_GROUP)

"""Every trainable parameter in exactly one optimizer group, by role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_mult.method.decay import DecayRule
from lit_mult.method.plan import RunPlan
from lit_mult.nn.llama import RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.optim.decay import rule_settings
from lit_mult.registry.roles import Role


@dataclass(frozen=True)
class ParameterPlan:
    """Optimizer settings of one parameter; a row of the table that `lit-mult parameters` prints."""

    name: str
    parameter: nn.Parameter
    role: Role
    multipliers: str
    """Learnable multipliers of a matrix and its constant factor; empty for other parameters."""
    optimizer: str
    lr: float
    weight_decay: float
    init: str
    eps: float | None = None
    """Adam's epsilon, where it is not the one that all groups share."""
    decay_rule: DecayRule = "plain"


def plan_parameters(model: nn.Module, plan: RunPlan) -> list[ParameterPlan]:
    """Role, optimizer, peak lr, weight decay and init of every trainable parameter, in the model's order.

    Raises:
        ValueError: a trainable parameter has no known role.
    """
    rows: dict[int, ParameterPlan] = {}
    for module_name, module in model.named_modules():
        for row in _of_module(module_name, module, plan):
            rows.setdefault(id(row.parameter), row)  # a tied head shares the embedding's row
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unknown = [name for name, parameter in trainable.items() if id(parameter) not in rows]
    if unknown:
        raise ValueError(f"no role, hence no optimizer group, for {', '.join(unknown)}")
    return [rows[id(parameter)] for parameter in trainable.values()]


def _of_module(name: str, module: nn.Module, plan: RunPlan) -> Iterator[ParameterPlan]:
    in_block = name.startswith("layers.")
    if isinstance(module, RMSNorm):
        norm = plan.block_norm if in_block else plan.norm
        rates = (norm.optimizer, norm.lr, norm.weight_decay)
        yield ParameterPlan(f"{name}.weight", module.weight, Role.NORM, "", *rates, "1", norm.eps)
    elif isinstance(module, MultipliedMatrix):
        matrix = plan.matrices[name]
        kinds = "+".join(matrix.start) or "-"
        constant = f" *{matrix.constant:.4g}" if matrix.constant != 1 else ""
        yield ParameterPlan(
            name=f"{name}.weight",
            parameter=module.weight,
            role=matrix.role,
            multipliers=kinds + constant,
            optimizer=matrix.optimizer,
            lr=matrix.lr,
            weight_decay=matrix.weight_decay,
            init=f"N(0, {matrix.init_std:.4g}²)",
            eps=matrix.eps,
            decay_rule=matrix.decay_rule,
        )
        own = plan.block_multiplier if in_block else plan.multiplier
        for axis, start in matrix.start.items():
            parameter = getattr(module, axis.value)
            rates = (own.optimizer, own.lr, own.weight_decay)
            yield ParameterPlan(f"{name}.{axis.value}", parameter, Role.MULTIPLIER, "", *rates, f"{start:.4g}", own.eps)


def parameter_groups(rows: list[ParameterPlan]) -> list[dict[str, Any]]:
    """Parameters that share role kind, optimizer, lr, weight decay, its rule and eps, as groups for `HybridOptimizer`.

    A group has `eps` where it is not that of all groups.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        kind = row.role.value if row.role in (Role.NORM, Role.MULTIPLIER) else "matrix"
        key = (kind, row.optimizer, row.lr, row.weight_decay, row.decay_rule, row.eps)
        rates = {"optimizer": row.optimizer, "lr": row.lr, "weight_decay": row.weight_decay}
        rates |= rule_settings(row.decay_rule, row.lr)
        rates |= {} if row.eps is None else {"eps": row.eps}
        group = groups.setdefault(key, {"params": [], "roles": [], **rates})
        group["params"].append(row.parameter)
        if row.role.value not in group["roles"]:
            group["roles"].append(row.role.value)
    for group in groups.values():
        group["name"] = "+".join(group.pop("roles"))
    return list(groups.values())

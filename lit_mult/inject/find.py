"""The weight matrices of a model, with their roles; and the models that multipliers cannot be added to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lit_mult.errors import ConfigError, UserError, one_of
from lit_mult.inject.families import Fused, has_norm_before, known_role
from lit_mult.inject.layers import is_conv1d, matrix_name
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.optim.sharding import as_dtensor
from lit_mult.registry.contracts import NONE, Axes, Axis, RowParts
from lit_mult.registry.roles import Role

Names = str | Iterable[str]
"""A regular expression for whole names; or a list of names, of their endings after a dot, or of such with * and ?."""

Roles = Mapping[str, "str | Sequence[str] | Sequence[tuple[str, int]]"]
"""Name as in a list of `Names` -> role; of a fused matrix its parts' roles, or (role, rows) of its parts: of equal size
without rows, and repeated down the matrix if it has more rows than all parts together."""

_NO_MATRICES = (nn.modules.conv._ConvNd, nn.LayerNorm, nn.RMSNorm)
_MATRIX_ROLES = [role for role in Role if role not in (Role.NORM, Role.MULTIPLIER)]


@dataclass(frozen=True)
class Found:
    """A weight matrix of a model."""

    name: str
    """Module, or parameter if it is not called weight."""
    module: nn.Module
    parameter: str
    transposed: bool
    roles: tuple[Role | None, ...]
    """Of its parts; (None,) where it is unknown."""
    parts: RowParts | None = None
    spare: Axes = NONE
    """Axes that another parameter stands for: a norm weight right before it."""
    is_tied: bool = False
    """Whether another matrix has the same parameter."""

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def has_weight(self) -> bool:
        """Whether there is a weight; a lazy or parametrized layer has none."""
        weight = self.module._parameters.get(self.parameter)
        return weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter)


def find_matrices(model: nn.Module, roles: Roles | None = None) -> list[Found]:
    """The matrices of a model, in its order.

    They are every `nn.Linear`, `nn.Embedding` and transformers' `Conv1D`; other weights of two or three dimensions but
    for convolutions and norms; and whatever else has a role.

    Args:
        model: of any family.
        roles: roles of matrices that `inject.families` does not know, or knows otherwise.

    Raises:
        UserError: the model is wrapped or compiled already, has PEFT's adapters or multipliers of its own, or a pattern
            matches nothing.
    """
    _check(model)
    given, config = dict(roles or {}), getattr(model, "config", None)
    candidates = list(_candidates(model, given))
    uses = Counter(id(module._parameters.get(parameter)) for _, module, parameter, _ in candidates)
    found = []
    for name, module, parameter, transposed in candidates:
        weight = module._parameters.get(parameter)
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            found.append(Found(name, module, parameter, transposed, (None,)))
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        d_out = weight.shape[-1] if transposed else weight.shape[-2]
        pattern = next((one for one in given if matches(name, [one])), None)
        its_roles, parts = (
            _known(name, block, config, d_out) if pattern is None else _given(pattern, given[pattern], d_out)
        )
        spare = frozenset({Axis.COLUMN}) if its_roles == (Role.SSM_OUT,) and has_norm_before(model, name) else NONE
        found.append(Found(name, module, parameter, transposed, its_roles, parts, spare, uses[id(weight)] > 1))
    for pattern in given:
        if not any(matches(one.name, [pattern]) for one in found):
            raise ConfigError(f"roles.{pattern}", given[pattern], f"matches no matrix; names are {some(found)}")
    return found


def matches(name: str, patterns: Names) -> bool:
    """Whether a name is among `patterns`."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(fnmatchcase(name, one) or fnmatchcase(name, f"*.{one}") for one in patterns)


def selector(
    found: Sequence[Found],
    target_modules: Names | None,
    exclude_modules: Names | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> Callable[[Found], bool]:
    """Whether a matrix is to have multipliers.

    Raises:
        ConfigError: a pattern is no regular expression or matches nothing.
    """
    for field, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        one_by_one: list[Names] = [patterns] if isinstance(patterns, str) else [[one] for one in patterns or ()]
        for pattern in one_by_one:
            shown = pattern if isinstance(pattern, str) else next(iter(pattern))
            try:
                is_used = any(matches(one.name, pattern) for one in found)
            except re.error as error:
                raise ConfigError(field, shown, f"is no regular expression ({error})") from None
            if not is_used:
                raise ConfigError(field, shown, f"matches no matrix; names are {some(found)}")

    def selected(one: Found) -> bool:
        if target_modules is not None and not matches(one.name, target_modules):
            return False
        if exclude_modules is not None and matches(one.name, exclude_modules):
            return False
        return filter_fn is None or filter_fn(one.module, one.name)

    return selected


def some(found: Sequence[Found]) -> str:
    """Names for a message, equal layers once."""
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", one.name) for one in found))
    return ", ".join([*names[:4], "..."] if len(names) > 5 else names) or "none"


def _candidates(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """(name, module, parameter, whether it is transposed) of every matrix."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(type(module)):
            yield path, module, "weight", is_conv1d(type(module))
            continue
        for parameter, weight in module._parameters.items():
            if weight is None or weight.ndim not in (2, 3) or "bias" in parameter:
                continue
            name = matrix_name(path, parameter)
            is_matrix = parameter.endswith("weight") and not isinstance(module, _NO_MATRICES)
            if is_matrix or known_role(name) or any(matches(name, [one]) for one in given):
                yield name, module, parameter, bool(getattr(module, "is_transposed", False))


def _known(name: str, block: nn.Module, config: Any, d_out: int) -> tuple[tuple[Role | None, ...], RowParts | None]:
    role = known_role(name)
    if not isinstance(role, Fused):
        return (role,), None
    parts = role.divide(block, config, d_out)
    if parts is None:
        what = f"is fused of {', '.join(role.roles)}, of unknown numbers of rows"
        raise UserError(f"{name}: {what}; pass roles={{'{name}': [('{role.roles[0]}', rows), ...]}}")
    return role.roles, parts


def _given(pattern: str, value: Any, d_out: int) -> tuple[tuple[Role | None, ...], RowParts | None]:
    """Roles and parts from what the user gives."""
    field = f"roles.{pattern}"
    if isinstance(value, str):
        return (_role(field, value),), None
    names = [one if isinstance(one, str) else one[0] for one in value]
    roles = tuple(_role(field, name) for name in names)
    if all(isinstance(one, str) for one in value):
        rows = [d_out // len(names)] * len(names) if d_out % len(names) == 0 else [d_out + 1]
    else:
        rows = [d_out + 1 if isinstance(one, str) else int(one[1]) for one in value]
    if min(rows) < 1 or d_out % sum(rows):
        raise ConfigError(field, value, f"does not divide {d_out} rows; give (role, rows) of every part")
    return roles, RowParts(d_out // sum(rows), tuple(rows))


def _role(field: str, name: str) -> Role:
    if name not in [role.value for role in _MATRIX_ROLES]:
        raise ConfigError(field, name, f"must be one of {one_of(name, _MATRIX_ROLES)}")
    return Role(name)


def refuse_adapters(model: nn.Module) -> None:
    """Raises: UserError when PEFT has put an adapter on the model: it would write to W what was meant for W_eff."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            what = f"{name or 'model'}: is a PEFT adapter ({type(module).__name__})"
            raise UserError(f"{what}; merge multipliers before adapters are added, or adapters first (PEFT's unload)")


def _check(model: nn.Module) -> None:
    kind = type(model).__name__
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        what = "is compiled" if kind == "OptimizedModule" else "is wrapped"
        raise UserError(f"model {what} ({kind}); add multipliers before that")
    refuse_adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, MultipliedMatrix):
            raise UserError(f"{name}: has multipliers built in; set them in the model's config")


def check_matrices(model: nn.Module, chosen: Sequence[Found]) -> None:
    """Raises: UserError when one of the matrices that are to have multipliers cannot have any."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for one in chosen:
        first, *others = names[id(one.module)]
        if others:
            what = f"{others[0]}: is the module {first} itself, used twice"
            raise UserError(f"{what}; give it a module of its own, share the weight alone, or exclude it")
        if torch.nn.utils.parametrize.is_parametrized(one.module):
            raise UserError(f"{one.name}: has a parametrization of torch.nn.utils.parametrize; remove it or exclude it")
        _check_weight(one.name, one.module._parameters.get(one.parameter), type(one.module).__name__)


def _check_weight(name: str, weight: Tensor | None, kind: str) -> None:
    if weight is not None and as_dtensor(weight) is not None:
        raise UserError(f"{name}: is sharded already; add multipliers before fully_shard")
    if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise UserError(f"{name}: has no shape yet; run the model once")
        raise UserError(
            f"{name}: is quantized or has no weight ({kind}); multipliers need floating-point weights; exclude it"
        )
    if type(weight.data) is not Tensor:
        raise UserError(f"{name}: is quantized ({type(weight.data).__name__}); multipliers need a plain tensor")
    if weight.is_meta:
        raise UserError(f"{name}: is on the meta device; materialize the model first (to_empty, or load its weights)")

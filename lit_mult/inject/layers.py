"""Multipliers beside a parameter of any module, which stays what it is: the same object under the same name.

The module's class is replaced by a subclass of itself. Its parameter `weight` stays in the state_dict, in
`parameters()` and the optimizer, and `row`, `column` and `scalar` appear beside it; but reading `module.weight` gives
the effective matrix. So whatever code reads the weight (the layer's own forward, a fused kernel, a tied head) computes
with W_eff. Layers whose forward is that of `nn.Linear`, `nn.Embedding` or transformers' `Conv1D` take the functions of
`inject.functions`, which need less memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_mult.errors import UserError
from lit_mult.inject import functions
from lit_mult.nn.multipliers import PRODUCT, Formula, effective_weight
from lit_mult.nn.precision import keeping_float32
from lit_mult.registry.contracts import Axes, Axis, RowParts
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.roles import Role

_SPECS = "matrix_specs"
_AXES = tuple(Axis)


@dataclass(frozen=True)
class MatrixSpec:
    """A weight matrix of a model that was not built here; kept on its module."""

    roles: tuple[Role | None, ...]
    """Of its parts; None where unknown, of a matrix without multipliers."""
    kind: str = "none"
    formula: Formula = PRODUCT
    """The kind's."""
    axes: tuple[Axes, ...] = (frozenset(),)
    """Learnable multipliers of each part."""
    parts: RowParts | None = None
    """How a fused matrix divides into parts."""
    transposed: bool = False
    """Stored as (d_in, d_out), as transformers' `Conv1D`."""
    is_split: bool = False
    """Whether the multipliers took over the scale of W."""

    # By `width_rules`, after `add_multipliers`, which compares all the others.
    lr: float = field(default=1.0, compare=False)
    """Factor on the learning rate."""
    weight_decay: float = field(default=1.0, compare=False)
    """Factor on the weight decay."""
    constant: float = field(default=1.0, compare=False)
    """Fixed factor of W_eff; of a tied head."""
    rescaled: float = field(default=1.0, compare=False)
    """Factor by which W was multiplied."""
    width: tuple[str, str] | None = field(default=None, compare=False)
    """Optimizer and width rule that these factors are for."""

    @property
    def is_plain(self) -> bool:
        """Whether W_eff is the product of W itself and its multipliers; a kind may have a formula of its own."""
        return self.formula.effective_weight is effective_weight

    @property
    def is_identity(self) -> bool:
        """Whether W_eff is W."""
        return not self.all_axes and self.constant == 1.0

    @cached_property
    def all_axes(self) -> Axes:
        """Multipliers that any part has."""
        return frozenset().union(*self.axes)


def taken_out(name: str) -> UserError:
    """The error where a parameter is no longer its module's: FSDP1 puts views of its own in its place."""
    cure = "for FSDP, use version 2: fully_shard, ModelParallelStrategy, fsdp_version: 2"
    return UserError(f"{name}: a matrix with multipliers must stay its module's parameter; {cure}")


def specs_of(module: nn.Module) -> dict[str, MatrixSpec]:
    """Name of a parameter -> what was decided on it; empty for a module that `add_multipliers` has not seen."""
    found: dict[str, MatrixSpec] = module.__dict__.get(_SPECS, {})
    return found


def matrix_name(path: str, parameter: str) -> str:
    """Name of a matrix: of the module at `path`, or of the parameter if it is not called weight."""
    return path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")


def multiplier_name(parameter: str, axis: Axis) -> str:
    """Name of a multiplier beside its parameter: `row` beside `weight`, `gate_up_proj_row` beside `gate_up_proj`."""
    return axis.value if parameter == "weight" else f"{parameter}_{axis.value}"


def multipliers_of(module: nn.Module, parameter: str) -> dict[Axis, nn.Parameter]:
    """The learnable multipliers beside a parameter."""
    found = {
        axis: module._parameters.get(multiplier_name(parameter, axis)) for axis in specs_of(module)[parameter].all_axes
    }
    return {axis: found[axis] for axis in Axis if found.get(axis) is not None}  # type: ignore[misc]


def shape_of(weight: Tensor, spec: MatrixSpec) -> tuple[int, int]:
    """(d_out, d_in) of the matrix, or of each matrix of a stack of experts."""
    d_out, d_in = weight.shape[-2:]
    return (d_in, d_out) if spec.transposed else (d_out, d_in)


def attach(module: nn.Module, parameter: str, spec: MatrixSpec) -> None:
    """Give a parameter its spec and, where the spec has axes, its multipliers at 1, in float32 or wider."""
    module.__dict__.setdefault(_SPECS, {})[parameter] = spec
    if not spec.all_axes:
        return
    weight = module._parameters[parameter]
    assert weight is not None
    for axis in Axis:
        if axis in spec.all_axes:
            values = _start(axis, weight, spec)
            multiplier = nn.Parameter(values.contiguous(), requires_grad=weight.requires_grad)
            module.register_parameter(multiplier_name(parameter, axis), multiplier)
    _set_class(module)


def set_width(module: nn.Module, parameter: str, **factors: Any) -> None:
    """Set the factors of `width_rules` in the spec of a parameter."""
    specs = module.__dict__[_SPECS]
    before, specs[parameter] = specs[parameter], replace(specs[parameter], **factors)
    if specs[parameter].is_identity != before.is_identity:
        _set_class(module)


def detach(module: nn.Module) -> None:
    """Remove all multipliers of a module, and what is known of it; its parameters stay."""
    for parameter in specs_of(module):
        for axis in multipliers_of(module, parameter):
            del module._parameters[multiplier_name(parameter, axis)]
    del module.__dict__[_SPECS]
    _set_class(module)


def effective(module: nn.Module, parameter: str, *, exact: bool = False) -> Tensor:
    """W_eff in the layout and dtype of the parameter, differentiable; with `exact` formed in float64, and a copy.

    Raises:
        KeyError: the module has no such parameter, or nothing was decided on it.
    """
    weight, spec = _stored(module, parameter), specs_of(module)[parameter]
    scalar, row, column = _factors(module, parameter, spec)
    if exact:
        parts = (None if part is None else part.double() for part in (scalar, row, column))
        scalar, row, column = parts
    oriented = weight.mT if spec.transposed else weight
    if exact or not spec.is_identity:
        wide = oriented.double() if exact else oriented.to(torch.promote_types(weight.dtype, torch.float32))
        oriented = spec.formula.effective_weight(wide, spec.constant, scalar, row, column).to(weight.dtype, copy=exact)
    return oriented.mT if spec.transposed else oriented


@torch.no_grad()
def multiply(module: nn.Module, parameter: str, factor: float) -> None:
    """Multiply W, and with it W_eff, by a factor, before training: multipliers that start from W start again."""
    weight, spec = _stored(module, parameter), specs_of(module)[parameter]
    weight.mul_(factor)
    if not spec.is_plain:
        for axis, multiplier in multipliers_of(module, parameter).items():
            multiplier.copy_(_start(axis, weight, spec))


@torch.no_grad()
def take_scale(module: nn.Module, parameter: str, *, powers_of_two: bool) -> None:
    """Divide each part of W by a scale that leaves it an RMS of 1 / sqrt(d_in), and multiply a multiplier by it.

    It is the part's scalar, else its rows, else the column of the whole matrix; a part without any stays as it is.
    """
    spec, own = specs_of(module)[parameter], multipliers_of(module, parameter)
    weight = module._parameters[parameter]
    assert weight is not None
    (d_out, d_in), lead = shape_of(weight, spec), weight.shape[:-2]
    oriented = weight.mT if spec.transposed else weight
    has_own = Axis.SCALAR in own or Axis.ROW in own
    parts, axes = spec.parts or RowParts(1, (d_out,)), spec.axes
    if not has_own:
        parts, axes = RowParts(1, (d_out,)), (spec.all_axes,)
    scales, rows, having = [], [], []
    blocks = oriented.unflatten(-2, (parts.groups, -1)).split(parts.sizes, -2)
    for size, part, block in zip(parts.sizes, axes, blocks, strict=True):
        scale = block.double().square().mean((-3, -2, -1)).sqrt() * math.sqrt(d_in)
        scale = torch.where((scale > 0) & bool(part), scale, 1.0)
        if powers_of_two:
            scale = scale.log2().round().exp2()
        rows.append(scale[..., None, None].expand(*lead, parts.groups, size))
        if part:
            scales.append(scale[..., None])
            having.append(rows[-1].flatten(-2))
    row = torch.cat(rows, -1).flatten(-2)
    oriented.copy_(oriented.double() / row[..., None])
    if Axis.SCALAR in own:
        own[Axis.SCALAR].mul_(torch.cat(scales, -1))
    elif Axis.ROW in own:
        own[Axis.ROW].mul_(row if is_uniform(spec) else torch.cat(having, -1))
    else:
        own[Axis.COLUMN].mul_(scales[0])


class _Multiplied(nn.Module):
    """First base of the subclasses: what casts, copies and pickles must know of multipliers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts no multiplier to 16 bits, see `nn.precision`."""
        own = [one for name in specs_of(self) for one in multipliers_of(self, name).values()]
        known = {id(one) for one in own} | {id(one.grad) for one in own if one.grad is not None}
        keep = keeping_float32(fn)
        super()._apply(lambda x: (keep if id(x) in known else fn)(x), recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        """Would write to W_eff, and be lost."""
        raise UserError("a module with multipliers cannot be initialized again; do so before add_multipliers")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A subclass made at runtime cannot be found by its name."""
        return _rebuild, (type(self)._plain, type(self)._names), self.__dict__  # type: ignore[attr-defined]


def _rebuild(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _subclass(plain, names)
    return made.__new__(made)


def _set_class(module: nn.Module) -> None:
    plain = getattr(type(module), "_plain", type(module))
    names = tuple(name for name, spec in specs_of(module).items() if not spec.is_identity)
    module.__class__ = _subclass(plain, names) if names else plain


_subclasses: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _subclass(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (plain, names) not in _subclasses:
        _subclasses[plain, names] = _make_subclass(plain, names)
    return _subclasses[plain, names]


def _make_subclass(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: property(_reader(name), _holder(name), _keeper(name)) for name in names}
    members |= {size: property(_reader_of_size(size), _fixed(size)) for size in _SIZES}
    members |= {"_plain": plain, "_names": names, "__module__": plain.__module__}
    if names == ("weight",) and (forward := _forward_of(plain)) is not None:
        members["forward"] = forward
    return type(f"Multiplied{plain.__name__}", (_Multiplied, plain), members)


_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features")


def _holder(name: str) -> Callable[[nn.Module, Tensor], None]:
    def hold(module: nn.Module, value: Tensor) -> None:
        """A replica of `nn.DataParallel` has no parameters, but their values."""
        module.__dict__[name] = value

    return hold


def _keeper(name: str) -> Callable[[nn.Module], None]:
    def keep(module: nn.Module) -> None:
        raise taken_out(name)

    return keep


def _reader_of_size(name: str) -> Callable[[nn.Module], Any]:
    def read(module: nn.Module) -> Any:
        if name not in module.__dict__:
            raise AttributeError(name)
        return module.__dict__[name]

    return read


def _fixed(name: str) -> Callable[[nn.Module, Any], None]:
    def refuse(module: nn.Module, value: Any) -> None:
        raise UserError(f"{name} = {value}: a matrix with multipliers keeps its size; resize it before add_multipliers")

    return refuse


_WANT_PARAMETERS = ("torch.distributed.", "torch.nn.modules.module")
"""Modules of torch that read attributes for the parameters themselves: to shard them, or as `get_parameter`."""


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(_WANT_PARAMETERS):
                return _stored(module, name)
        try:
            return effective(module, name)
        except AttributeError as error:  # nn.Module would go on with its own lookup, and give W
            raise RuntimeError(f"cannot form the effective {name}: {error}") from error

    return read


def _forward_of(plain: type[nn.Module]) -> Callable[..., Tensor] | None:
    if plain.forward is nn.Linear.forward:
        return _forward_linear
    if plain.forward is nn.Embedding.forward:
        return _forward_embedding
    return _forward_linear if plain.forward.__qualname__ == "Conv1D.forward" and is_conv1d(plain) else None


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer whose weight is (d_in, d_out)."""
    return any(base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in kind.__mro__)


def _forward_linear(self: Any, x: Tensor) -> Tensor:
    weight, bias, spec = _stored(self, "weight"), self.bias, specs_of(self)["weight"]
    if torch.compiler.is_compiling() or not spec.is_plain:
        matrix = effective(self, "weight")  # a compiler plans by itself what to keep
        return F.linear(x, matrix.mT if spec.transposed else matrix, bias)
    row, column = _vectors(self, weight, spec)
    x = x if spec.constant == 1.0 else x * spec.constant  # less to multiply than a head
    return functions.linear(x, weight.mT if spec.transposed else weight, bias, row, column)


def _forward_embedding(self: nn.Embedding, ids: Tensor) -> Tensor:
    weight, spec = _stored(self, "weight"), specs_of(self)["weight"]
    if torch.compiler.is_compiling() or not spec.is_plain or self.scale_grad_by_freq:
        return F.embedding(ids, effective(self, "weight"), self.padding_idx, None, 2.0, self.scale_grad_by_freq)
    row, column = _vectors(self, weight, spec)
    return functions.embedding(ids, weight, row, column, self.padding_idx)


def _stored(module: nn.Module, parameter: str) -> Tensor:
    """W, as stored."""
    weight = module._parameters.get(parameter)
    return module.__dict__[parameter] if weight is None else weight  # in a replica, see `_holder`


def _vectors(module: nn.Module, weight: Tensor, spec: MatrixSpec) -> tuple[Tensor | None, Tensor | None]:
    """Row and column, with the scalar in one of them."""
    scalar, row, column = _factors(module, "weight", spec)
    if scalar is None:
        return row, column
    if row is None and column is not None:
        return None, column * scalar
    return (scalar.expand(shape_of(weight, spec)[0]) if row is None else row * scalar), column


def _factors(module: nn.Module, parameter: str, spec: MatrixSpec) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """scalar (), row (..., d_out) and column (..., d_in), as the formula takes them."""
    scalar, row, column = (
        _stored(module, multiplier_name(parameter, axis)) if axis in spec.all_axes else None for axis in _AXES
    )
    if spec.parts is not None and not is_uniform(spec):
        row, scalar = _by_part(spec, spec.parts, scalar, row), None
    elif scalar is not None and scalar.ndim > 1:  # of every expert
        weight = _stored(module, parameter)
        row = scalar.expand(-1, shape_of(weight, spec)[0]) if row is None else row * scalar
        scalar = None
    return None if scalar is None else scalar.view(()), row, column


def is_uniform(spec: MatrixSpec) -> bool:
    """Whether the row multiplier covers all rows, in their order, and there is no scalar of a part."""
    return Axis.SCALAR not in spec.all_axes and len({Axis.ROW in axes for axes in spec.axes}) == 1


def _by_part(spec: MatrixSpec, parts: RowParts, scalar: Tensor | None, row: Tensor | None) -> Tensor:
    """The factor of every row (..., d_out) of a fused matrix, from the multipliers that its parts have."""
    some = scalar if row is None else row
    assert some is not None
    lead, G = some.shape[:-1], parts.groups
    rows = iter(() if row is None else row.split([G * n for n in _having(spec, parts, Axis.ROW)], -1))
    scalars = iter(() if scalar is None else scalar.split(1, -1))
    blocks = []
    for size, axes in zip(parts.sizes, spec.axes, strict=True):
        block = next(rows).unflatten(-1, (G, size)) if Axis.ROW in axes else some.new_ones(*lead, G, size)
        blocks.append(block * next(scalars)[..., None] if Axis.SCALAR in axes else block)
    return torch.cat(blocks, -1).flatten(-2)


def _having(spec: MatrixSpec, parts: RowParts, axis: Axis) -> list[int]:
    return [size for size, axes in zip(parts.sizes, spec.axes, strict=True) if axis in axes]


def _start(axis: Axis, weight: Tensor, spec: MatrixSpec) -> Tensor:
    """Initial values of a multiplier, in the shape in which it is stored; a scalar is (1,), as FSDP2 wants it."""
    lead, (d_out, d_in) = weight.shape[:-2], shape_of(weight, spec)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if not spec.is_plain:
        oriented = (weight.mT if spec.transposed else weight).detach().to(dtype)
        unit = KINDS[spec.kind].start(axis, (d_out, d_in), float(oriented.square().mean().sqrt()))
        return spec.formula.start(axis, oriented, unit, unit).reshape(-1)  # of a plain matrix: `find` refuses others
    size = {Axis.SCALAR: 1, Axis.ROW: d_out, Axis.COLUMN: d_in}[axis]
    if spec.parts is not None and axis is not Axis.COLUMN:
        having = _having(spec, spec.parts, axis)
        size = len(having) if axis is Axis.SCALAR else spec.parts.groups * sum(having)
    return weight.new_ones(*lead, size, dtype=dtype)

"""muP on anybody's model: how its matrices start and train, from their shapes and those at a base width."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn

from lit_mult.errors import ConfigError, UserError
from lit_mult.inject.families import Fused, known_role
from lit_mult.inject.groups import multipliers_in
from lit_mult.inject.layers import MatrixSpec, matrix_name, multiply, set_width, shape_of, specs_of
from lit_mult.inject.table import layers_together, named, sides
from lit_mult.method.rules import Scaling, init_std, scaling
from lit_mult.registry.contracts import RowParts
from lit_mult.registry.optimizers import check_known
from lit_mult.registry.roles import HIDDEN_ROLES, Role, Shape

Model = TypeVar("Model", bound=nn.Module)
Rescale = Literal["outputs", "all"]


@dataclass(frozen=True)
class _Settings:
    """`method.rules.WidthSettings`."""

    rule: str
    width_rule: str = "lr"
    embedding_std: float = 1.0


@dataclass(frozen=True)
class _Place:
    """A matrix in both models."""

    name: str
    module: nn.Module
    parameter: str
    spec: MatrixSpec
    base_weight: Tensor
    shapes: list[tuple[Shape, Shape]]
    """(d_out, d_in) of each part, here and at base width."""
    tied_to: str | None
    """The embedding, if it is a head with the same weight."""

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight


def width_rules(
    model: Model,
    base_model: nn.Module,
    optimizer: str = "adamw",
    rule: str = "lr",
    *,
    rescale: Rescale | None = "outputs",
    verbose: bool = True,
) -> Model:
    """Scale learning rates and initial weights with width by muP, so that a learning rate tuned at a base width holds.

    `build_param_groups` then multiplies lr and weight_decay of every matrix by the factors of `method.rules`
    (arXiv:2203.03466 table 3, arXiv:2601.04890 table 1; for Muon and Hyperball `registry.optimizers`). Embeddings,
    positions, norms, biases and multipliers have factors of 1. A head that shares the embedding's weight trains with
    it, and gets a constant factor base d_in / d_in on W_eff instead. Widen a model by more heads of the same size:
    attention stays as it is. The same call again changes nothing.

    Args:
        model: after `add_multipliers`, perhaps with kind "none", before it is wrapped, compiled or sharded.
        base_model: the same architecture at the width at which lr was tuned, with or without multipliers; on the meta
            device it costs nothing. Fused matrices whose parts were given in `roles` divide in proportion there.
        optimizer: that of `build_param_groups`.
        rule: lr: weight decay stays, and acts less at larger widths; lr_wd: lr * weight_decay stays; lr_sqrt_wd: in
            between (arXiv:2510.15262).
        rescale: which initial weights to multiply. "outputs": head and routers, by sqrt(base d_in / d_in), for models
            whose matrices start at a std of 1 / sqrt(d_in), as in mup's set_base_shapes; "all": hidden matrices by
            sqrt(base d_in / d_in), head and routers by base d_in / d_in, for models that start at the same std at every
            width, as transformers' initializer_range; None: none, for a model that is trained, or was rescaled before
            `remove_multipliers`. A warning says when the weights do not start as the choice assumes.
        verbose: print the table of all factors.

    Returns:
        The model itself.

    Raises:
        UserError: the models have different structures; a matrix that widens has no role, or parts that need different
            factors; weights to rescale were split; or the optimizer has no such width rule. The model is then as
            before.
    """
    _check_choices(optimizer, rule, rescale)
    places = list(_places(model, base_model))
    scalings = [_scaling(place, optimizer, rule) for place in places]
    factors = [_on_weights(place, rescale) for place in places]
    _check_start(places, rescale, getattr(getattr(model, "config", None), "initializer_range", None))
    done = set[int]()
    for place, its, factor in zip(places, scalings, factors, strict=True):
        if factor != place.spec.rescaled and id(place.weight) not in done:
            multiply(place.module, place.parameter, factor / place.spec.rescaled)
        done.add(id(place.weight))
        wanted = {"lr": its.lr, "weight_decay": its.weight_decay, "constant": its.forward, "rescaled": factor}
        set_width(place.module, place.parameter, width=(optimizer, rule), **wanted)
    if verbose:
        print("\n".join(describe_widths(model, base_model)))
    return model


def describe_widths(model: nn.Module, base_model: nn.Module) -> Iterator[str]:
    """Lines of the table of width factors: name, role, shapes (d_out x d_in), factors, what was done to the weights."""
    rows = []
    for place in _places(model, base_model):
        spec = place.spec
        done = f"W x {spec.rescaled:.4g}" if spec.rescaled != 1.0 else "as it was"
        if place.tied_to:
            done = f"W_eff x {spec.constant:.4g}: weight of {place.tied_to}, which is tied"
        shapes = (sides(place.weight, spec), sides(place.base_weight, spec))
        rows.append((place.name, named(spec), *shapes, f"x {spec.lr:.4g}", f"x {spec.weight_decay:.4g}", done))
    yield from layers_together(("matrix", "role", "shape", "at base width", "lr", "weight decay", "start"), rows)
    yield "all other parameters: lr x 1, weight decay x 1"


def _check_choices(optimizer: str, rule: str, rescale: str | None) -> None:
    check_known(optimizer)
    if rule not in ("lr", "lr_wd", "lr_sqrt_wd"):
        why = "; lr_wd trains as multiplier does" if rule == "multiplier" else ""
        raise ConfigError("rule", rule, f"must be lr, lr_wd or lr_sqrt_wd{why}")
    if rescale not in ("outputs", "all", None):
        raise ConfigError("rescale", rescale, "must be outputs, all or None")


def _places(model: nn.Module, base_model: nn.Module) -> Iterator[_Place]:
    """Raises: UserError, where shapes do not tell how the models widen."""
    weights, base_weights = _plain_parameters(model), _plain_parameters(base_model)
    for name in sorted(weights.keys() ^ base_weights.keys()):
        lacks = "base_model" if name in weights else "model"
        raise UserError(f"{name}: {lacks} has no such parameter; give the same architecture at another width")
    found = [(path, module, name) for path, module in model.named_modules() for name in specs_of(module)]
    if not found:
        raise UserError("model has no roles; call add_multipliers first, perhaps with kind none")
    embeddings: dict[int, str] = {}
    for path, module, parameter in found:
        if specs_of(module)[parameter].roles == (Role.EMBEDDING,):
            embeddings.setdefault(id(module._parameters[parameter]), path)
    known = {f"{path}.{parameter}".removeprefix(".") for path, _, parameter in found}
    for name, weight in weights.items():
        base_sizes = base_weights[name].shape
        if weight.ndim != len(base_sizes):
            raise UserError(f"{name}: has {len(base_sizes)} dimensions in base_model, and {weight.ndim} in model")
        if name not in known and sum(a != b for a, b in zip(weight.shape, base_sizes, strict=True)) > 1:
            raise _no_role(name)
    for path, module, parameter in found:
        spec, name = specs_of(module)[parameter], f"{path}.{parameter}".removeprefix(".")
        weight, base_weight = weights[name], base_weights[name]
        shape, base_shape = shape_of(weight, spec), shape_of(base_weight, spec)
        shown = matrix_name(path, parameter)
        if None in spec.roles and shape[1] != base_shape[1] and not isinstance(module, nn.Embedding):
            raise _no_role(shown)
        shapes = [(shape, base_shape)]
        if spec.parts is not None:
            own = specs_of(base_model.get_submodule(path)).get(parameter)
            base_rows = _base_rows(shown, spec, own, base_model, base_shape[0])
            shapes = [((n, shape[1]), (m, base_shape[1])) for n, m in zip(_rows(spec.parts), base_rows, strict=True)]
        tied_to = embeddings.get(id(weight)) if spec.roles == (Role.LM_HEAD,) else None
        yield _Place(shown, module, parameter, spec, base_weight, shapes, tied_to)


def _no_role(name: str) -> UserError:
    return UserError(f"{name}: is a matrix that widens, of no role; pass roles={{'{name}': ...}} to add_multipliers")


def _plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter but multipliers, a shared one by each of its names."""
    multipliers = {id(one) for one in multipliers_in(model)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: one for name, one in named if id(one) not in multipliers}


def _rows(parts: RowParts) -> list[int]:
    return [parts.groups * size for size in parts.sizes]


def _base_rows(name: str, spec: MatrixSpec, own: MatrixSpec | None, base_model: nn.Module, d_out: int) -> list[int]:
    """Rows of the parts of a fused matrix of the base model: by its `own` spec, its family, or else in proportion."""
    assert spec.parts is not None
    parts, known = own.parts if own else None, known_role(name)
    if parts is None and isinstance(known, Fused) and known.roles == spec.roles:
        block = base_model.get_submodule(name.rpartition(".")[0])
        parts = known.divide(block, getattr(base_model, "config", None), d_out)
        rows = _rows(parts) if parts else []
    else:
        rows = _rows(parts) if parts else [n * d_out // spec.parts.rows for n in _rows(spec.parts)]
    if sum(rows) != d_out or len(rows) != len(spec.roles):
        raise UserError(f"{name}: its parts in base_model are unknown; add_multipliers to it, too, with their rows")
    return rows


def _scaling(place: _Place, optimizer: str, rule: str) -> Scaling:
    """Factors of the rule; `forward` is that of a tied head."""
    settings = _Settings("mup", rule)
    if place.tied_to:  # as in `method.plan`: the constant does all of its scaling
        ((shape, base_shape),) = place.shapes
        return Scaling(init_std=math.nan, lr=1.0, weight_decay=1.0, forward=base_shape[1] / shape[1])
    first, *others = (
        scaling(role or Role.EMBEDDING, *shapes, optimizer, settings)
        for role, shapes in zip(place.spec.roles, place.shapes, strict=True)
    )
    for other in others:
        if not math.isclose(other.lr, first.lr, rel_tol=1e-9):
            what = f"its parts need different factors on the lr under {optimizer} ({first.lr:.4g} and {other.lr:.4g})"
            raise UserError(f"{place.name}: {what}; widen all of them alike, or give them matrices of their own")
    return first


def _on_weights(place: _Place, rescale: Rescale | None) -> float:
    """Factor on the weights that the model would start with."""
    role, (shape, base_shape) = place.spec.roles[0] or Role.EMBEDDING, place.shapes[0]
    if rescale is None or place.tied_to:
        return 1.0
    without = init_std(role, shape if rescale == "outputs" else base_shape, base_shape, _Settings("standard"))
    factor = init_std(role, shape, base_shape, _Settings("mup")) / without
    if factor != 1.0 and place.spec.is_split:
        raise UserError(
            f"{place.name}: multipliers took over its scale (split), for a trained model; pass rescale=None"
        )
    return factor


def _check_start(places: Sequence[_Place], rescale: Rescale | None, initializer_range: float | None) -> None:
    """Warn when hidden matrices do not start as `rescale` assumes; nothing is known on the meta device alone."""
    exponents = []
    for place in places:
        if not set(place.spec.roles) <= HIDDEN_ROLES or place.spec.rescaled != 1.0 or place.weight.is_meta:
            continue
        ((_, d_in), (_, base_in)), *_ = place.shapes
        std = float(place.weight.detach().float().std())
        base_std = initializer_range if place.base_weight.is_meta else float(place.base_weight.detach().float().std())
        if base_std and std and d_in != base_in:
            exponents.append(math.log(std / base_std) / math.log(d_in / base_in))
    if not exponents or rescale is None:
        return
    is_constant = statistics.median(exponents) > -0.25  # half-way between a constant std and 1 / sqrt(d_in)
    if is_constant and rescale == "outputs":
        warnings.warn("hidden matrices start at the same std at both widths; pass rescale='all'", stacklevel=3)
    elif not is_constant and rescale == "all" and not places[0].base_weight.is_meta:
        warnings.warn("hidden matrices start at a std of 1 / sqrt(d_in) already; pass rescale='outputs'", stacklevel=3)

"""Adding learnable multipliers to a model, taking them away, and merging them into its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lit_mult.errors import ConfigError, UserError, one_of
from lit_mult.inject.find import (
    Found,
    Names,
    Roles,
    check_matrices,
    find_matrices,
    matches,
    refuse_adapters,
    selector,
    some,
)
from lit_mult.inject.layers import (
    MatrixSpec,
    attach,
    detach,
    effective,
    is_uniform,
    specs_of,
    take_scale,
    taken_out,
)
from lit_mult.inject.table import parameters
from lit_mult.method.placement import PLACEMENTS, parse_axes
from lit_mult.optim.sharding import as_dtensor
from lit_mult.registry import load
from lit_mult.registry.contracts import NONE, Axes
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.roles import Role

Model = TypeVar("Model", bound=nn.Module)
Split = Literal["rms", "rms_power_of_two"]


def add_multipliers(
    model: Model,
    kind: str = "vector",
    table: str = "full",
    *,
    placement: str | Mapping[str, str] | None = None,
    roles: Roles | None = None,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    split: Split | None = None,
    verbose: bool = True,
) -> Model:
    """Give the weight matrices of a model learnable multipliers, in place (arXiv:2601.04890 eq. 2 and 3).

    Every `nn.Linear`, `nn.Embedding` and transformers' `Conv1D` needs a role, by `inject.families` or by `roles`, or
    must be excluded. Multipliers start at 1, are float32 or wider, and lie beside the weight as `row` (d_out,),
    `column` (d_in,) and `scalar` (1,). Fused matrices have the rows of their parts, stacks of experts one set each.
    With kind "none" the roles alone are noted, for a baseline with the same parameter groups. The same call again
    changes nothing.

    Args:
        model: on its device, before it is wrapped, compiled or sharded.
        kind: none, scalar, vector, weight_norm or a plugin's.
        table: placement table: full (what the paper ran) or minimal (no redundancies).
        placement: name or pattern -> axes ("none", or row, column and scalar joined by +), over the table's; or another
            table.
        roles: name or pattern -> role, or the parts of a fused matrix: `{"Wqkv": [("q_proj", 64), ("k_proj", 16),
            ...]}`. Roles are embedding, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head;
            ssm_gate, ssm_input, ssm_step, ssm_out of Mamba blocks; router of experts, position of learned positions.
        target_modules: only these get multipliers: names, endings or patterns, or one regular expression.
        exclude_modules: these get none, and need no role.
        filter_fn: (module, name) -> whether it gets any.
        split: "rms" divides every matrix with multipliers by a scale that leaves it an RMS of 1 / sqrt(d_in), and
            starts a multiplier there, so that W_eff stays; "rms_power_of_two" takes the nearest power of two, which is
            exact.
        verbose: print the table of all matrices.

    Returns:
        The model itself.

    Raises:
        UserError: the model cannot have multipliers; a matrix has no role; a pattern matches nothing; nothing would get
            multipliers; or there are others already. The model is then as before.
    """
    if isinstance(placement, str):
        table, placement = placement, None
    found = find_matrices(model, roles)
    _check_choices(kind, table, split)
    selected = selector(found, target_modules, exclude_modules, filter_fn)
    chosen = {one.name for one in found if selected(one)}
    check_matrices(model, [one for one in found if one.name in chosen])
    found = [one for one in found if one.has_weight]
    placed = _placed(found, chosen, table, placement or {})
    specs = {one.name: _spec(one, kind, placed[one.name], split=split is not None) for one in found}
    learnable = KINDS[kind].is_learnable
    if learnable and not any(spec.all_axes for spec in specs.values()):
        raise UserError(f"no matrix would get multipliers of kind {kind}; matrices are {some(found)}")
    held = {one.name: specs_of(one.module).get(one.parameter) for one in found}
    if any(spec is not None for spec in held.values()):
        if held != specs:
            raise UserError("model has multipliers of another call; remove_multipliers or merge_and_unload it first")
        return model
    for one in found:
        attach(one.module, one.parameter, specs[one.name])
        if specs[one.name].is_split:
            take_scale(one.module, one.parameter, powers_of_two=split == "rms_power_of_two")
    if verbose:
        print(parameters(model))
    return model


def remove_multipliers(model: Model) -> Model:
    """Take the multipliers away, in place; weights stay what they are in the optimizer, W and not W_eff.

    Raises:
        UserError: there are none, or W is not the model's without them: it was split, or `width_rules` gave a tied head
            a factor.
    """
    modules = with_specs(model)
    if any(spec.is_split for module in modules for spec in specs_of(module).values()):
        raise UserError("multipliers took over the scale of the matrices (split); use merge_and_unload")
    if any(spec.constant != 1.0 for module in modules for spec in specs_of(module).values()):
        raise UserError("a tied head has a factor (width_rules); use merge_and_unload")
    for module in modules:
        detach(module)
    return model


@torch.no_grad()
def merge_and_unload(model: Model) -> Model:
    """Put W_eff in place of every W, formed in float64 and cast once, and take the multipliers away, in place.

    Matrices that shared a weight and have no longer the same W_eff get weights of their own;
    `config.tie_word_embeddings` is then set to False.

    Raises:
        UserError: there are no multipliers, or the model is sharded.
    """
    modules = with_specs(model)
    places = [(module, name) for module in modules for name in specs_of(module)]
    stored = [module.get_parameter(name) for module, name in places]
    if any(as_dtensor(one) is not None for one in stored):
        raise UserError("model is sharded; load its full state_dict into one that is not, and merge that")
    merged = [effective(module, name, exact=True) for module, name in places]
    tied: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    for (module, name), one, weight in zip(places, stored, merged, strict=True):
        tied.setdefault(id(one), []).append((module, name, weight))
    for module in modules:
        detach(module)
    own_places = {(id(module), name) for module, name in places}
    others = {
        id(one)
        for module in model.modules()
        for name, one in module._parameters.items()
        if (id(module), name) not in own_places
    }
    for key, group in tied.items():
        first, parameter, weight = group[0]
        shared = first._parameters[parameter]
        assert shared is not None
        if key not in others:  # a module that nothing is known of may read the weight, too: it keeps W
            shared.data = weight
        made = [shared]
        for module, name, own in group:
            same = next((one for one in made if torch.equal(one, own)), None)
            if same is None:
                same = nn.Parameter(own, requires_grad=shared.requires_grad)
                made.append(same)
            module._parameters[name] = same
        if len(made) > 1 and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return model


def _check_choices(kind: str, table: str, split: str | None) -> None:
    for field, value, allowed in (("kind", kind, list(KINDS)), ("table", table, list(PLACEMENTS))):
        if value not in allowed:
            raise ConfigError(field, value, f"must be one of {one_of(value, allowed)}")
    if split not in (None, "rms", "rms_power_of_two"):
        raise ConfigError("split", split, "must be None, rms or rms_power_of_two")
    if split and not (KINDS[kind].is_learnable and KINDS[kind].is_plain):
        raise ConfigError("split", split, f"needs learnable multipliers of a plain product, not kind {kind}")


def _placed(
    found: Sequence[Found], chosen: set[str], table: str, placement: Mapping[str, str]
) -> dict[str, tuple[Axes, ...]]:
    """Name -> the axes of every part, before those of the kind. Raises: UserError, as of `add_multipliers`."""
    placed: dict[str, tuple[Axes, ...]] = {}
    unknown = []
    for one in found:
        if one.name not in chosen:
            placed[one.name] = (NONE,) * len(one.roles)
        elif None in one.roles:
            unknown.append(one)
        else:
            placed[one.name] = tuple(PLACEMENTS[table][role] - one.spare for role in one.roles if role is not None)
    if unknown:
        role = Role.EMBEDDING if isinstance(unknown[0].module, nn.Embedding) else Role.Q_PROJ
        hint = f"pass roles={{'{_ending(unknown[0].name)}': '{role}'}} (or another role), or exclude_modules"
        raise UserError(f"no role is known for {some(unknown)}; {hint}")
    for pattern, text in placement.items():
        axes = parse_axes(text, f"placement.{pattern}")
        matched = [one for one in found if matches(one.name, [pattern])]
        if not matched:
            raise ConfigError(f"placement.{pattern}", text, f"matches no matrix; names are {some(found)}")
        placed |= {one.name: (axes,) * len(one.roles) for one in matched if one.name in chosen}
    return placed


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:]) if name.count(".") > 1 else name


def _spec(one: Found, kind: str, placed: tuple[Axes, ...], *, split: bool) -> MatrixSpec:
    axes = tuple(KINDS[kind].axes(part) for part in placed)
    spec = MatrixSpec(one.roles, kind, load(KINDS[kind].formula), axes, one.parts, one.transposed)
    if not spec.all_axes:
        return spec
    zeros_count = not (spec.is_plain or spec.formula.takes_zero_rows)
    if zeros_count and not one.weight.detach().any(-2 if one.transposed else -1).all():
        raise UserError(
            f"{one.name}: has a row of zeros (a padding token?), which kind {kind} cannot scale; exclude it"
        )
    is_fused = spec.parts is not None and not is_uniform(spec)
    if not spec.is_plain and (one.weight.ndim > 2 or is_fused):
        raise UserError(f"{one.name}: is fused or a stack of experts, which kind {kind} does not support; exclude it")
    if len({"column" in part for part in axes}) > 1:
        raise UserError(f"{one.name}: its parts read the same input; give all of them a column multiplier, or none")
    if isinstance(one.module, nn.Embedding) and (one.module.sparse or one.module.max_norm is not None):
        raise UserError(f"{one.name}: has sparse gradients or a max_norm, which multipliers do not support; exclude it")
    # A tied matrix keeps its scale: the other one reads it, too.
    return replace(spec, is_split=split and not one.is_tied)


def with_specs(model: nn.Module) -> list[nn.Module]:
    """The modules that `add_multipliers` has seen.

    Raises:
        UserError: there are none; a weight was taken out of its module, or has PEFT's adapters.
    """
    refuse_adapters(model)
    modules = [module for module in model.modules() if specs_of(module)]
    if not modules:
        raise UserError("model has no multipliers; call add_multipliers first")
    for module in modules:
        for name in specs_of(module).keys() - module._parameters.keys():
            raise taken_out(name)
    return modules

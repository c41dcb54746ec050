"""Optimizer groups and gradient clipping for a model with multipliers (or the same model without)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lit_mult.errors import ConfigError
from lit_mult.inject.layers import multipliers_of, specs_of
from lit_mult.inject.model import with_specs
from lit_mult.method.decay import decay_of
from lit_mult.optim.clipping import clip_gradients
from lit_mult.optim.decay import rule_settings
from lit_mult.optim.sharding import placement_of, reshard
from lit_mult.registry.optimizers import check_known, trained_by
from lit_mult.registry.roles import Role


def build_param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    optimizer: str = "adamw",
    *,
    weight_decay_mode: str = "coupled",
    steps: float | None = None,
    vector_lr: float | None = None,
    multiplier_lr: float | None = None,
    multiplier_weight_decay: float = 2e-3,
) -> list[dict[str, Any]]:
    """Every trainable parameter in one group, for `HybridOptimizer`, or for any optimizer that keeps to its groups.

    Matrices decay; norms, biases, convolutions and other parameters that are no matrix do not; multipliers decay
    lightly, against drift along their symmetries (arXiv:2601.04890 sec. 4.1). A group has `params`, `name` (its roles),
    `optimizer`, `lr` and `weight_decay`, for fused matrices `parts` and `transposed` (see `optim.muon.Muon`), and for
    corrected and cautious decay, which `HybridOptimizer` alone knows, `decay_rule` and `peak_lr` (`optim.decay`).

    Args:
        model: after `add_multipliers`, perhaps with kind "none".
        lr: learning rate of the matrices; after `width_rules` that at the base width.
        weight_decay: of the matrices, likewise; a step shrinks them by lr * weight_decay.
        optimizer: of the hidden matrices; for the rest as in `registry.optimizers`, mostly AdamW.
        weight_decay_mode: what weight_decay means for matrices, a row of the table in `method.decay`. For corrected, lr
            is the peak of the schedule.
        steps: of the run, in steps at the peak lr, for timescale.
        vector_lr: learning rate of parameters that are no matrix; by default lr.
        multiplier_lr: learning rate of the multipliers; by default vector_lr.
        multiplier_weight_decay: weight decay of the multipliers.

    Raises:
        UserError: `add_multipliers` has not been called, no such optimizer, or not that of `width_rules`; parts of a
            fused matrix need different ones; or PEFT's adapters are on it; or steps are missing.
    """
    check_known(optimizer)
    modules = with_specs(model)
    reshard(model)
    vector_lr = lr if vector_lr is None else vector_lr
    multiplier_lr = vector_lr if multiplier_lr is None else multiplier_lr
    others, of_multipliers = (trained_by(role, optimizer) for role in (Role.NORM, Role.MULTIPLIER))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[int] = set()
    specs = [(module._parameters[name], spec) for module in modules for name, spec in specs_of(module).items()]
    heads = {id(weight) for weight, spec in specs if Role.LM_HEAD in spec.roles}

    def add(parameter: nn.Parameter, name: str, key: tuple[Any, ...], extra: dict[str, Any]) -> None:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            own = dict(zip(("optimizer", "lr", "weight_decay"), key, strict=True))
            alike = (name if name in _ALONE else "matrix", placement_of(parameter), *key, *extra.values())
            group = groups.setdefault(alike, {"params": [], "names": [], **own, **extra})
            group["params"].append(parameter)
            if name not in group["names"]:
                group["names"].append(name)

    for module in modules:
        for parameter, spec in specs_of(module).items():
            weight = module._parameters[parameter]
            assert weight is not None
            roles = [role.value if role else "matrix" for role in spec.roles]
            of_role = {trained_by(role, optimizer) if role else "adamw" for role in spec.roles}
            if len(of_role) > 1:
                raise ConfigError("optimizer", optimizer, f"does not train all of {' and '.join(roles)}, in one matrix")
            its = of_role.pop()
            if spec.width is not None and spec.width[0] != optimizer:
                what = f"factors by width are for {spec.width[0]}; call width_rules(optimizer={optimizer!r}) first"
                raise ConfigError("optimizer", optimizer, what)
            fused = its != "adamw" and (spec.parts is not None or spec.transposed)
            extra = {"parts": spec.parts, "transposed": spec.transposed} if fused else {}
            # The parts of a fused matrix are hidden ones.
            decay = decay_of(
                its,
                weight_decay_mode,
                weight_decay,
                spec.roles[0],
                lr * spec.lr,
                width_factor=spec.weight_decay,
                steps=steps,
                is_head=id(weight) in heads,
            )
            extra |= rule_settings(decay.rule, lr * spec.lr)
            add(weight, "+".join(roles), (its, lr * spec.lr, decay.weight_decay), extra)
    multipliers = {id(one) for one in multipliers_in(model)}
    for one in model.parameters():
        if id(one) in multipliers:
            add(one, "multiplier", (of_multipliers, multiplier_lr, multiplier_weight_decay), {})
        else:
            add(one, "vector", (others, vector_lr, 0.0), {})
    for group in groups.values():
        group["name"] = "+".join(group.pop("names"))
    return list(groups.values())


_ALONE = ("multiplier", "vector")


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the joint norm of all gradients but the multipliers', whose own stay as they are; return the norm () before.

    With multipliers in it the norm is far above 1 early in training, and every update shrinks (arXiv:2601.04890 sec.
    4.3).
    """
    multipliers = {id(one) for one in multipliers_in(model)}
    return clip_gradients([one for one in model.parameters() if id(one) not in multipliers], max_norm)


def multipliers_in(model: nn.Module) -> Iterator[nn.Parameter]:
    """All learnable multipliers of a model."""
    for module in model.modules():
        for name in specs_of(module):
            yield from multipliers_of(module, name).values()

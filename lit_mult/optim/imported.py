"""Optimizers of libraries by import path, import:MODULE.CLASS, on our parameter groups.

Each group has an lr and a weight_decay, which means what the library makes of it; decay times (`method.regime`) suppose
that a step decays by lr * weight_decay. `optim.extra` holds further arguments of the class.
"""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lit_mult.errors import ConfigError, one_line
from lit_mult.registry.optimizers import is_imported

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

_OWN = {"lr": "optim.lr", "weight_decay": "optim.weight_decay", "params": "the model"}


def check(optimizer: str, config: OptimConfig) -> None:
    """Make a library's optimizer for one small matrix, and a step; nothing for others.

    Raises:
        ConfigError: as of `build`; or it cannot step on a gradient alone.
    """
    if is_imported(optimizer):
        group = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "name": "w", "optimizer": optimizer}
        made = build([group | {"lr": config.lr, "weight_decay": config.weight_decay}], config)
        made.param_groups[0]["params"][0].grad = torch.ones(2, 2)
        try:
            made.step()
        except Exception as error:  # one that wants a closure or sparse gradients, say
            raise ConfigError("optimizer", optimizer, f"cannot make a step ({one_line(error)})") from error


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """The optimizer; each group has an lr and weight_decay.

    Raises:
        ConfigError: there is no such class, it is no `torch.optim.Optimizer`, or does not take the arguments or the
            weight decay.
    """
    name, extra = groups[0]["optimizer"], dict(config.extra)
    for argument in extra.keys() & _OWN.keys():
        raise ConfigError(f"optim.extra.{argument}", extra[argument], f"is set by {_OWN[argument]}")
    kind = _load(name)
    try:
        made = kind(groups, **extra)
    except Exception as error:  # a library's own
        field, value = ("optim.extra", extra) if extra else ("optimizer", name)
        raise ConfigError(field, value, f"{kind.__name__} does not take it ({one_line(error)})") from error
    if "lr" not in made.defaults:
        raise ConfigError("optimizer", name, "has no lr, which schedules change")
    if "weight_decay" not in made.defaults and any(group["weight_decay"] for group in groups):
        raise ConfigError("optimizer", name, "has no weight_decay; set optim.weight_decay, or those of its roles, to 0")
    for group in made.param_groups:
        group.pop("__class__", None)  # of locals(), from which some libraries make their settings
        _check_plain(name, {key: value for key, value in group.items() if key != "params"})
    return made


def _check_plain(name: str, settings: dict[str, Any]) -> None:
    """Raises: ConfigError when a setting cannot be in a checkpoint, which holds plain values alone."""
    for key, value in settings.items():
        buffer = BytesIO()
        try:
            torch.save(value, buffer)
            torch.load(BytesIO(buffer.getvalue()), weights_only=True)
        except Exception as error:  # of pickle or of torch
            has = f"has a {type(value).__name__} in its groups ({key}), which checkpoints cannot hold"
            raise ConfigError("optimizer", name, has) from error


def _load(name: str) -> type[Optimizer]:
    module, _, attribute = name.removeprefix("import:").rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # of whatever the module runs
        raise ConfigError("optimizer", name, f"cannot be imported ({one_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError("optimizer", name, "is no torch.optim.Optimizer")
    return found

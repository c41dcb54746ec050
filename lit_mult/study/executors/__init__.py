"""Executors: one module each, found by its name, with a function `connect` (see `executor.Connect`)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, cast

from lit_mult.errors import UserError, one_of

if TYPE_CHECKING:
    from lit_mult.study.executor import Connect


def names() -> list[str]:
    """Names of all executors, without importing them."""
    return sorted(module.name for module in iter_modules(__path__))


def load(name: str) -> Connect:
    """Import an executor. Raises: UserError for an unknown name."""
    if name not in names():
        raise UserError(f"--executor {name}: must be one of {one_of(name, names())}")
    return cast("Connect", import_module(f"{__name__}.{name}").connect)

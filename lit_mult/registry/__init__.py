"""Registries of multiplier kinds and optimizers. Needs no torch.

Other packages add entries through the entry points `lit_mult.kinds` and `lit_mult.optimizers`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from lit_mult.errors import UserError

Entry = TypeVar("Entry")


def with_plugins(own: tuple[Entry, ...], group: str) -> dict[str, Entry]:
    """Name -> entry: the built-in ones, then those of installed packages' entry points.

    Raises:
        UserError: an entry point cannot be loaded, is not such an entry, or has a name that is taken.
    """
    entries = {entry.name: entry for entry in own}  # type: ignore[attr-defined]
    for point in entry_points(group=group):
        try:
            entry = point.load()
        except Exception as error:
            raise UserError(f"entry point {group}:{point.name}: cannot be loaded ({error})") from error
        if not isinstance(entry, type(own[0])) or entry.name != point.name:  # type: ignore[attr-defined]
            raise UserError(f"entry point {group}:{point.name}: is no {type(own[0]).__name__} of that name")
        if point.name in entries:
            raise UserError(f"entry point {group}:{point.name}: the name is taken")
        entries[point.name] = entry
    return entries


def load(path: str) -> Any:
    """Import the object at "module:attribute"; lazily, as it may need torch."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def modules_in(folder: str) -> tuple[str, ...]:
    """Names of the modules in a folder of the package, without importing them."""
    found = iter_modules([str(Path(__file__).parents[1] / folder)])
    return tuple(sorted(module.name for module in found))

"""Registries of multiplier kinds and optimizers. Needs no torch.

Other packages add entries through the entry points `lit_mult.kinds` and `lit_mult.optimizers`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from lit_mult.errors import one_line

Entry = TypeVar("Entry")

_FAULTS: dict[str, str] = {}


def with_plugins(own: tuple[Entry, ...], group: str) -> dict[str, Entry]:
    """Name -> entry: the built-in ones, then those of installed packages' entry points.

    An entry point that cannot be loaded, is not such an entry or has a name that is taken is left out; see `fault_of`.
    """
    entries = {entry.name: entry for entry in own}  # type: ignore[attr-defined]
    for point in entry_points(group=group):
        fault = None
        try:
            entry = point.load()
        except Exception as error:  # of a package of somebody else's
            fault = f"cannot be loaded ({one_line(error)})"
        else:
            if not isinstance(entry, type(own[0])) or entry.name != point.name:  # type: ignore[attr-defined]
                fault = f"is no {type(own[0]).__name__} of that name"
            elif point.name in entries:
                fault = "the name is taken"
        if fault is None:
            entries[point.name] = entry
        else:
            _FAULTS[point.name] = f"entry point {group}:{point.name}: {fault}"
    return entries


def fault_of(name: object) -> str:
    """The end of a message on an unknown name: why the entry point of that name was left out; or nothing."""
    return f"; {_FAULTS[str(name)]}" if str(name) in _FAULTS else ""


def load(path: str) -> Any:
    """Import the object at "module:attribute"; lazily, as it may need torch."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def modules_in(folder: str) -> tuple[str, ...]:
    """Names of the modules in a folder of the package, without importing them."""
    found = iter_modules([str(Path(__file__).parents[1] / folder)])
    return tuple(sorted(module.name for module in found))

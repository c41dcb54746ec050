"""What can be chosen: one entry for each multiplier kind and optimizer, with what it supports. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules


def modules_in(folder: str) -> tuple[str, ...]:
    """Names of the modules in a folder of the package, without importing them."""
    found = iter_modules([str(Path(__file__).parents[1] / folder)])
    return tuple(sorted(module.name for module in found))

"""What can be chosen: one entry for each multiplier kind and optimizer, with what it supports. Needs no torch."""

from __future__ import annotations

import pkgutil
from pathlib import Path


def modules_in(folder: str) -> tuple[str, ...]:
    """Names of the modules in a folder of the package, without importing them."""
    path = Path(__file__).parents[1] / folder
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(path)])))

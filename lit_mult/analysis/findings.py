"""The content of one part of a report: tables, figures and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from lit_mult.analysis.drawing import Figure


@dataclass
class Findings:
    """Tables for programs and readers, figures, and sentences."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name -> table with every digit."""
    display_tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name -> table of strings."""
    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    """Name of a figure -> caption."""
    answers: list[str] = field(default_factory=list)
    """A sentence for each declared question."""
    statements: dict[str, list[str]] = field(default_factory=dict)
    """Heading -> sentences, each a point of a list."""
    warnings: list[str] = field(default_factory=list)
    """Caveats of the results."""
    how_to_read: str = ""
    """Points of a Markdown list."""
    unit: str = ""
    """Unit of the numbers in the tables."""
    text: str = ""
    """Text for the terminal."""

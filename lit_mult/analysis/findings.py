"""What one part of a report has to say: tables, figures and sentences, which `report` puts on a page."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from lit_mult.analysis.style import Figure


@dataclass
class Findings:
    """Tables for programs and for readers, figures, and sentences."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name -> table with every digit."""
    display_tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name -> table of strings."""
    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    """Name of a figure -> what it shows."""
    statements: dict[str, list[str]] = field(default_factory=dict)
    """Heading -> sentences, each a point of a list."""
    warnings: list[str] = field(default_factory=list)
    """What stands against the results."""
    how_to_read: str = ""
    """Points of a Markdown list."""
    unit: str = ""
    """What the numbers of the tables are."""
    text: str = ""
    """What a terminal shows."""

"""Words that the generators draw from."""

from __future__ import annotations

NAMES = tuple(
    "Anna Ben Carl Dora Emma Fred Gina Hugo Ida Jack Kate Leo Mia Nina Otto Paul Rosa Sam Tina Vera Will Zoe".split()
)
THINGS = tuple(
    "apple pen book coin shell stamp card nut cup ball key plum hat ring bead brick leaf egg fig rope".split()
)

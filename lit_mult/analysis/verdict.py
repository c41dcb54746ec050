"""Verdicts: a claim, the statistic that it predicts, that statistic's interval over seeds, and what follows.

The rule is one for all. A claim says in which range a statistic lies, such as a slope within 1 ± 0.1 or a difference
above 0; where the paper gives a direction and no number, the range is this project's. The statistic has a value for
each seed, and its 95 % interval is that of the mean of these by Student's t, which is wide over few seeds, as it must
be. The claim is

- *reproduced* when the whole interval lies in the range;
- *contradicted* when the whole interval lies outside;
- *undecided* when it straddles an end of the range, which is a lack of power, or when there is none: over one seed, or
  where a run that the claim needs diverged;
- *not at this scale* when the runs do not meet a precondition of the claim, whatever its statistic is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lit_mult.analysis.seeds import mean_interval

Outcome = Literal["reproduced", "undecided", "not at this scale", "contradicted"]
ABOVE_0 = (0.0, math.inf)
BELOW_0 = (-math.inf, 0.0)


@dataclass(frozen=True)
class Verdict:
    """The verdict of the records on one claim."""

    claim: str
    """What the paper (or, where it asks, a possible answer) says, as a sentence without its stop."""
    statistic: str
    """What was computed, in words, with its unit."""
    value: float
    """Mean over seeds."""
    low: float
    """95 % interval of the mean; NaN for fewer than two seeds."""
    high: float
    range_low: float
    """Range of the statistic according to the claim."""
    range_high: float
    seeds: int
    tested: bool = True
    """Whether the runs meet the assumptions of the claim; if not, they are no evidence, whatever the statistic is."""

    @property
    def outcome(self) -> Outcome:
        if not self.tested:
            return "not at this scale"
        if not math.isfinite(self.low):
            return "undecided"
        if self.range_low < self.low and self.high < self.range_high:  # strictly: equal arms differ by 0
            return "reproduced"
        outside = self.high <= self.range_low or self.low >= self.range_high
        return "contradicted" if outside else "undecided"

    def sentence(self) -> str:
        """The verdict in words, for a list; an undecided one says what remains possible."""
        span = f"[{self.low:.3g}, {self.high:.3g}]" if self.seeds > 1 else "no interval"
        counted = f"{self.seeds} seed{'s' * (self.seeds != 1)}; judged: {_range(self.range_low, self.range_high)}"
        counted += "" if self.tested else ", which these runs do not test"
        said = f"**{self.outcome}**: {self.claim}. {self.statistic}: {self.value:.3g} {span}, {counted}."
        return f"{said} {self._possible()}" if self.outcome == "undecided" else said

    def _possible(self) -> str:
        """What an undecided verdict leaves open."""
        if math.isfinite(self.low):
            return f"Values from {self.low:.3g} to {self.high:.3g} remain possible, in the range and outside."
        lack = "A seed without a value, as of a run that diverged," if self.seeds > 1 else "Fewer than two seeds"
        return f"{lack} leave{'s' * (self.seeds > 1)} any value possible."


def judge(
    claim: str, statistic: str, by_seed: ArrayLike, within: tuple[float, float], *, tested: bool = True
) -> Verdict:
    """The verdict on a claim that a statistic lies `within` a range, from one value of it for each seed.

    A value that is not finite (a diverged run) leaves a tested claim undecided.
    """
    values = np.asarray(by_seed, dtype=float)
    return Verdict(claim, statistic, *mean_interval(values), *within, len(values), tested)


def verdicts_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """A row a verdict, every digit."""
    return pd.DataFrame([asdict(verdict) | {"outcome": verdict.outcome} for verdict in verdicts])


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return f"above {low:g}"
    return f"below {high:g}" if math.isinf(low) else f"{low:g} to {high:g}"

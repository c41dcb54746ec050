"""What an experiment works on, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.analysis.verdict import Verdict, verdicts_table

_COLUMNS = ["cell", "arm", "optimizer", "d_model", "lr", "seed"]
READING = """\
- A statistic is computed for each seed by itself; brackets and bars are 95 % intervals of the mean over seeds by
  Student's t. A claim is *reproduced* when the whole interval lies in the range that it predicts, *contradicted* when
  all of it lies outside, and else *not at this scale*; *undecided* when there is one seed or a run diverged. Not
  corrected for the number of claims.
- ‖x‖ is the root mean square of the entries.
"""


@dataclass(frozen=True)
class Evidence:
    """Runs of a study and their diagnostics."""

    folder: Path
    runs: pd.DataFrame
    """`frame.load_records`."""

    @cached_property
    def readings(self) -> pd.DataFrame:
        """`diagnostics.load_diagnostics` with arm, optimizer, d_model, lr, seed and the factors of each cell.

        Raises:
            UserError: there are none, or they are damaged.
        """
        factors = [name for name in self.runs if "." in str(name)]
        return load_diagnostics(self.folder).merge(self.runs[_COLUMNS + factors], on="cell")

    def at_end(self, *quantities: str) -> pd.DataFrame:
        """Readings of some quantities at the last step of each cell; NaN for a run that has no end: it diverged."""
        chosen = self.readings[self.readings["quantity"].isin(quantities)]
        last = chosen[chosen["step"] == chosen.groupby("cell")["step"].transform("max")]
        return last.assign(value=last["value"].mask(last["cell"].isin(self._without_end["cell"])))

    @property
    def warnings(self) -> list[str]:
        """Runs that diverged or were pruned, as one sentence; nothing where all came to their end."""
        count = len(self._without_end)
        named = ", ".join(f"{row.cell} ({row.status})" for row in rows(self._without_end))
        left = "diverged or were pruned, which leaves claims that need them undecided"
        return [f"{count} of {len(self.runs)} runs {left}: {named}"] if count else []

    @property
    def _without_end(self) -> pd.DataFrame:
        return self.runs[self.runs["final_loss"].isna()]


def with_verdicts(found: Findings, verdicts: Sequence[Verdict]) -> Findings:
    """The findings with their verdicts as sentences, as a table and for the terminal."""
    outcomes = [verdict.outcome for verdict in verdicts]
    counted = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    sentences = [verdict.sentence() for verdict in verdicts]
    found.csvs = {"verdicts": verdicts_table(verdicts)} | found.csvs
    found.statements = {f"Verdict: {counted}": sentences} | found.statements
    found.reading = READING + found.reading
    found.said += ["\n".join(sentences)]
    return found

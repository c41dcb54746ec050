"""What the experiments work on, and what several of them share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import pandas as pd

from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.analysis.verdict import Outcome, Verdict, verdicts_table
from lit_mult.errors import UserError
from lit_mult.schema import RunRecord

_COLUMNS = ["cell", "arm", "optimizer", "d_model", "lr", "seed"]
_HOW_TO_READ = """\
- A statistic has a value for each seed; brackets and bars are 95 % intervals of the mean over seeds by Student's t. A
  claim is *reproduced* when the whole interval lies in the range it is judged by, *contradicted* when all of it lies
  outside, and *undecided* when it straddles an end of the range (too few or too noisy seeds), when there is one seed or
  when a run diverged. *Not at this scale* means that the runs do not meet a precondition of the claim. Where the paper
  gives a direction and no number, the range is this project's. Not corrected for the number of claims.
- ‖x‖ is the root mean square of the entries.
"""


@dataclass(frozen=True)
class Evidence:
    """Runs of a study and their diagnostics."""

    folder: Path
    runs: pd.DataFrame
    """`frame.load_records`."""

    def expect(self, arms: Collection[str], factors: Collection[str] = ()) -> None:
        """Check that the study varies what the experiment is about and nothing else.

        Raises:
            UserError: an arm or a factor (optimizer, or a dotted field) that the experiment does not know, or none of
                those that it needs.
        """
        where = f"{self.folder}: the experiment that the study names"
        if strange := sorted(set(self.runs["arm"]) - set(arms)):
            raise UserError(f"{where} has the arms {', '.join(arms)}, not {', '.join(strange)}")
        # Width and rate have columns of their own, whether or not they are factors.
        plain = {"model.d_model": "width", "optim.lr": "rate"}
        columns = self.runs.rename(columns=plain | {"d_model": "model.d_model", "lr": "optim.lr"})
        if lacking := sorted(name for name in factors if name not in columns):
            raise UserError(f"{where} needs the factor {', '.join(lacking)}")
        settings = [str(name) for name in columns if name == "optimizer" or "." in str(name)]
        varied = {name for name in settings if columns[name].nunique(dropna=False) > 1}
        if others := sorted(varied - set(factors)):
            raise UserError(f"{where} does not vary {', '.join(others)}; give each of its values a study")

    @cached_property
    def readings(self) -> pd.DataFrame:
        """`diagnostics.load_diagnostics` with arm, optimizer, d_model, lr, seed and the factors of each cell.

        Raises:
            UserError: there are none, or they are damaged.
        """
        factors = [name for name in self.runs if "." in str(name)]
        columns = list(dict.fromkeys(_COLUMNS + factors))
        return load_diagnostics(self.folder).merge(self.runs[columns], on="cell")

    def at_end(self, *quantities: str) -> pd.DataFrame:
        """Readings of some quantities at the last step of each cell; NaN for a run that has no end: it diverged."""
        chosen = self.readings[self.readings["quantity"].isin(quantities)]
        last = chosen[chosen["step"] == chosen.groupby("cell")["step"].transform("max")]
        return last.assign(value=last["value"].mask(last["cell"].isin(self._without_end["cell"])))

    def record(self, arm: str) -> RunRecord:
        """The record of an arm's first run, for what all of its runs have in common.

        Raises:
            UserError: it has gone or is damaged.
        """
        return RunRecord.read(Path(self.runs.loc[self.runs["arm"] == arm, "path"].iloc[0]))

    def with_verdicts(self, found: Findings, verdicts: Iterable[Verdict]) -> Findings:
        """Findings with verdicts as sentences, as a table and for the terminal, and with the warnings of the runs."""
        verdicts = list(verdicts)
        outcomes = [verdict.outcome for verdict in verdicts]
        counted = ", ".join(f"{outcomes.count(one)} {one}" for one in get_args(Outcome) if one in outcomes)
        sentences = [verdict.sentence() for verdict in verdicts]
        return replace(
            found,
            tables={"verdicts": verdicts_table(verdicts)} | found.tables,
            statements={f"Verdict: {counted or 'nothing to judge'}": sentences} | found.statements,
            warnings=[*self.warnings, *found.warnings],
            how_to_read=_HOW_TO_READ + found.how_to_read,
            text="\n".join(sentences),
        )

    @property
    def warnings(self) -> list[str]:
        """Runs that diverged or were pruned, and those without diagnostics, a sentence each."""
        found = []
        if count := len(self._without_end):
            named = ", ".join(f"{row.cell} ({row.status})" for row in rows(self._without_end))
            left = "diverged or were pruned, which leaves claims that need them undecided"
            found.append(f"{count} of {len(self.runs)} runs {left}: {named}")
        if "readings" in self.__dict__:  # an experiment on losses alone has none
            unread = sorted(set(self.runs["cell"]) - set(self.readings["cell"]))
            found += [f"no diagnostics of {', '.join(unread)}, so left out"] * bool(unread)
        return found

    @property
    def _without_end(self) -> pd.DataFrame:
        return self.runs[self.runs["final_loss"].isna()]

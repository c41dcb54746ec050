"""Which function makes the findings of which experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lit_mult.analysis.experiments.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.errors import UserError

EXPERIMENTS: dict[str, Callable[[Evidence], Findings]] = {}


def findings_of(experiment: str, folder: Path, runs: pd.DataFrame) -> Findings:
    """Figure, tables and verdicts of the experiment that a study is.

    Raises:
        UserError: there is no such experiment, or its diagnostics are not there.
    """
    if experiment not in EXPERIMENTS:
        raise UserError(f"{folder}: experiment {experiment}: must be one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[experiment](Evidence(folder, runs))

"""Arms, runs or studies side by side: losses at each side's best rate, differences, speed-up and cost."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd

from lit_mult.analysis import cost, questions, sensitivity, speedup, tables
from lit_mult.analysis.comparison import warnings_of
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.analysis.page.document import document
from lit_mult.analysis.page.payload import Content, payload
from lit_mult.analysis.report import unequal
from lit_mult.analysis.seeds import mean_interval
from lit_mult.analysis.sides import CORPUS, load_sides
from lit_mult.schema import Measure, Question

_HOW_TO_READ = """\
- Every side is judged at its own best learning rate, one for all seeds; differences, speed-ups and costs of a step pair
  runs at equal seed and settings with those of the first side. Intervals are 95 % intervals of Student's t over seeds;
  p values are corrected together (Holm).
- Seconds depend on the machine and on what else it did: they are compared only between runs on equal devices, outside
  of stacks.
"""


def compare(sides: Sequence[str]) -> Findings:
    """Findings on all sides against the first.

    Args:
        sides: as `sides.load_sides` reads them.

    Raises:
        UserError: as `load_sides`.
    """
    runs = load_sides(sides)
    names = list(runs["arm"].unique())
    points = sensitivity.points(runs)
    summary = sensitivity.summary(points)
    asked = [
        Question(of=name, against=names[0], measure=measure, over=[])
        for measure in _measures(points)
        for name in names[1:]
    ]
    answered = questions.answers(runs, asked)
    sooner = speedup.speedups(runs, asked)
    bill = cost.bill(runs, points, None)
    steps = step_costs(runs, names[0])
    found = Findings(
        tables={"summary": summary, "differences": answered, "speedups": sooner, "cost": bill, "steps": steps},
        display_tables={
            "summary": tables.summary_table(summary),
            "differences": questions.answers_table(answered),
            "speed-up": tables.speedups_table(sooner),
            "cost": tables.bill_table(bill)[["line", "width", "FLOPs of the best run", "of the search"]],
            "cost of a step": tables.step_costs_table(steps),
        },
        statements={
            f"Against {names[0]}": [
                *map(questions.statement, rows(answered)),
                *map(speedup.statement, rows(sooner)),
            ]
        },
        warnings=[*unequal(runs), *_sampled(runs), *_unpaired(runs, answered, names), *warnings_of(runs, points)],
        how_to_read=_HOW_TO_READ + speedup.HOW_TO_READ,
        unit="Losses in nats per token",
    )
    shown = {name: table for name, table in found.display_tables.items() if len(table)}
    found.text = "\n".join(f"{name}\n{tables.to_text(table)}" for name, table in shown.items())
    return found


def step_costs(runs: pd.DataFrame, base: str) -> pd.DataFrame:
    """Seconds of a training step (validation included) over those of the side `base`, at equal setting and seed.

    Columns: arm, setting, d_model, seeds, seconds (mean), ratio (geometric mean over seeds) and its interval (low,
    high); NaN where devices differ, and of runs in stacks, whose seconds are shares.
    """
    point = ["setting", "d_model", "seed"]
    by_seed = runs.assign(seconds=runs["wall_seconds"] / runs["steps"]).groupby(["arm", *point], sort=False)
    timed = by_seed.agg(seconds=("seconds", "mean"), device=("device", _only), members=("members", _only)).reset_index()
    both = timed.merge(timed[timed["arm"] == base].drop(columns="arm"), on=point, suffixes=("", "_base"))
    alike = (both["device"] == both["device_base"]) & (both["members"] == 1) & (both["members_base"] == 1)
    both["ratio"] = (both["seconds"] / both["seconds_base"]).where(alike)
    found = []
    for key, group in both[both["arm"] != base].groupby(["arm", "setting", "d_model"], sort=False):
        ratio, low, high = (math.exp(x) for x in mean_interval(np.log(group["ratio"].dropna())))
        found.append((*key, len(group), group["seconds"].mean(), ratio, low, high))
    columns = ["arm", "setting", "d_model", "seeds", "seconds", "ratio", "low", "high"]
    return pd.DataFrame(found, columns=columns)


def _measures(points: pd.DataFrame) -> list[Measure]:
    """Those that some seed has."""
    return [name for name in get_args(Measure) if points[name].notna().any()]


def _sampled(runs: pd.DataFrame) -> Iterator[str]:
    for name in runs.loc[runs["sampler"] != "grid", "arm"].unique():
        yield f"{name}: its search was sampled, so that each seed has a best rate of its own, which favours it"


def _unpaired(runs: pd.DataFrame, answered: pd.DataFrame, names: Sequence[str]) -> Iterator[str]:
    corpora = {name: set(part) for name, part in runs.groupby("arm")[CORPUS]} if CORPUS in runs else {}
    paired = set(answered["of"])
    for name in (name for name in names[1:] if name not in paired):
        if corpora and not corpora[name] & corpora[names[0]]:
            texts = [f"{one} ({', '.join(sorted(corpora[one]))})" for one in (name, names[0])]
            yield f"{' and '.join(texts)} are of different texts or tokenizers, on which losses do not compare"
            continue
        first, its = (sorted(map(int, runs.loc[runs["arm"] == one, "seed"].unique())) for one in (names[0], name))
        apart = f"{name} and {names[0]} have no settings and seed in common (seeds {its} and {first})"
        yield f"{apart}, or no run that ended; to compare over a factor, fix it in both: FOLDER@optimizer=muon"


def _only(values: pd.Series) -> Any:
    """The one value; None where there are several."""
    return values.iloc[0] if values.nunique() == 1 else None


def to_markdown(found: Findings, sides: Sequence[str]) -> str:
    """The page of a comparison, with the command that makes it."""
    parts = ["# Comparison", *(f"- {line}" for lines in found.statements.values() for line in lines)]
    parts += [f"- Warning: {line}" for line in found.warnings]
    shown = {name: table for name, table in found.display_tables.items() if len(table)}
    parts += [f"## {name.capitalize()}\n\n{tables.to_markdown(table)}" for name, table in shown.items()]
    return "\n\n".join([*parts, f"{found.unit}.", found.how_to_read, f"Made by: `lit-mult compare {' '.join(sides)}`"])


def to_html(found: Findings, sides: Sequence[str]) -> str:
    """An interactive page of a comparison.

    Raises:
        UserError: as `load_sides`.
    """
    runs, command = load_sides(sides), f"lit-mult compare {shlex.join(sides)}"
    base, *others = runs["arm"].unique()
    content = Content(
        title=f"{', '.join(others)} against {base}",
        folder=None,
        runs=runs,
        parts=[found],
        warnings=found.warnings,
        provenance=[*(f"Side: {side}" for side in sides), f"Made by: `{command} --html FILE`"],
    )
    return document(payload(content))


def to_json(found: Findings) -> str:
    """All tables with every digit, as lists of rows, and the warnings."""
    made: dict[str, Any] = {name: json.loads(table.to_json(orient="records")) for name, table in found.tables.items()}
    return json.dumps(made | {"warnings": found.warnings}, indent=1)

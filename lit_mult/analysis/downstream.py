"""The part of a report that is about downstream scores: a table, differences, their power, and figures, by suite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lit_mult.analysis import score_plots, scores, tables
from lit_mult.analysis.bootstrap import ENOUGH_SEEDS
from lit_mult.analysis.frame import rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_SUITE = "paper"
READING = f"""\
- Scores are per cent ± their standard error, differences are points with 95 % intervals; both allow for other seeds
  and for other items of the kind at once (pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1(2)). Runs are paired by
  seed and item. Power is the smallest difference that would show four times in five: {scores.DETECTED} standard errors.
"""


@dataclass
class Downstream:
    """Tables for programs and for people, figures, and sentences."""

    csvs: dict[str, pd.DataFrame] = field(default_factory=dict)
    shown: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def downstream(folder: Path, runs: pd.DataFrame) -> Downstream:
    """All that the evaluations in a folder show; empty where there are none.

    Raises:
        UserError: an evaluation is damaged.
    """
    found = Downstream()
    table = scores.load_scores(folder, runs)
    if len(table):
        for suite, part in scores.at_best_rates(table).groupby("suite", sort=False):
            _suite(found, str(suite), part)
    return found


def _suite(found: Downstream, suite: str, table: pd.DataFrame) -> None:
    slug = "scores_" + re.sub(r"\W+", "_", suite).strip("_")
    means, compared = scores.means(table), scores.differences(table)
    last = means[means["last"]]
    power = scores.power(compared)
    made = {slug: means, f"{slug}_differences": compared, f"{slug}_power": power}
    found.csvs |= {name: table for name, table in made.items() if len(table)}
    found.shown[slug] = tables.scores_table(last)
    if suite == PAPER_SUITE:
        found.shown["scores_of_the_paper"] = paper_table()
    if len(compared):
        found.shown[f"{slug}_differences"] = tables.score_differences_table(compared)
    if len(power):
        found.shown[f"{slug}_power"] = tables.power_table(power)
    widths = sorted(last["d_model"].unique())
    for width in widths:
        here, name = last[last["d_model"] == width], f"{slug}_d{width}" if len(widths) > 1 else slug
        between = compared[(compared["d_model"] == width) & (compared["task"] != scores.CONTRAST)]
        found.figures[name] = score_plots.downstream(here, between)
        found.captions[name] = (
            f"Scores on {suite} (d = {width}), and differences between arms and optimizers, with 95 % intervals over "
            "seeds and items. Blue: knowledge, orange: reasoning."
        )
        on_the_way = means[means["d_model"] == width]
        if on_the_way["step"].nunique() > 1:
            found.figures[f"{name}_along"] = score_plots.scores_along_training(on_the_way)
            found.captions[f"{name}_along"] = f"Scores on {suite} (d = {width}) along training."
    found.statements += _statements(suite, compared)
    found.warnings += _warnings(suite, table)


def _statements(suite: str, compared: pd.DataFrame) -> Iterator[str]:
    """A sentence for each comparison of means over tasks; none is ranked without an interval over seeds."""
    for row in rows(compared[compared["task"].isin([*scores.AVERAGES, scores.CONTRAST])]):
        if row.low <= 0 <= row.high:
            verdict = "no difference shown"
        elif row.seeds < 2:
            verdict = "one seed: an interval over items alone, which ranks these two models and not their arms"
        else:
            verdict = f"**{row.of if row.difference > 0 else row.against} is better**"
            if row.task == scores.CONTRAST:
                more = scores.REASONING if row.difference > 0 else scores.KNOWLEDGE
                verdict = f"**{more} gains more from {row.of}**"
            verdict += " (weak evidence: few seeds)" if row.seeds < ENOUGH_SEEDS else ""
        where = ", ".join(filter(None, (row.within, f"d = {row.d_model}", f"{row.seeds} seeds")))
        span = f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
        name = f"{suite}, {row.task}, {row.of} - {row.against}"
        yield f"{name} ({where}): {100 * row.difference:+.1f} points, {span}: {verdict}."


def _warnings(suite: str, table: pd.DataFrame) -> Iterator[str]:
    cut = table.drop_duplicates(["label", "d_model", "seed", "step"])["truncated"]
    if (worst := int(cut.max())) > 0:
        yield f"{suite}: up to {worst} requests of a run were longer than the model's context and lost their beginning"
    if (counts := table.groupby("task")["items_hash"].nunique()).gt(1).any():
        yield f"{suite}: runs were asked different items of {', '.join(counts[counts > 1].index)}; those do not pair"


def paper_table() -> pd.DataFrame:
    """Table 2 of arXiv:2601.04890, per cent: a row an arm, a column a task, and their mean."""
    cells = [
        {"line": arm, **{t: f"{v:.2f}" for t, v in zip(scores.PAPER_TASKS, values, strict=True)}}
        | {scores.AVERAGE: f"{sum(values) / len(values):.2f}"}
        for arm, values in scores.PAPER.items()
    ]
    return pd.DataFrame(cells)

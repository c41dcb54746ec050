"""The part of a report that is about downstream scores: a table, differences, their power, and figures, by suite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from lit_mult.analysis import score_plots, scores, tables
from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows

PAPER_SUITE = "paper"
_HOW_TO_READ = """\
- Scores are per cent ± their standard error, differences are points with 95 % intervals; both allow for other seeds
  and for other items of the kind at once (variance components, Student's t). Runs are paired by seed and item, every
  arm is shown at its best learning rate, judged by the loss. Power is the smallest difference that would show four
  times in five. They are not corrected for the number of comparisons.
"""


def downstream(folder: Path, runs: pd.DataFrame) -> Findings:
    """Findings of the evaluations in a folder; empty if there are none.

    Raises:
        UserError: an evaluation is damaged.
    """
    found = Findings()
    table = scores.load_scores(folder, runs)
    if table.empty:
        return found
    labels = arm_labels(runs)
    found.how_to_read, found.unit = _HOW_TO_READ, "scores per cent, differences in points"
    for suite, part in table[table["best"]].groupby("suite", sort=False):
        _suite(found, str(suite), part, labels)
    if others := table.loc[~table["best"], "run"].nunique():
        found.warnings.append(
            f"scores of {others} runs are left out: they are not at the best learning rate of their arm"
        )
    shown = found.display_tables.items()
    found.text = "\n".join(f"{name.replace('_', ' ')} (per cent)\n{tables.to_text(table)}" for name, table in shown)
    return found


def _suite(found: Findings, suite: str, table: pd.DataFrame, labels: Mapping[str, str]) -> None:
    slug = "scores_" + re.sub(r"\W+", "_", suite).strip("_")
    means, compared = scores.means(table), scores.differences(table)
    last = means[means["last"]]
    power = scores.power(compared)
    made = {slug: means, f"{slug}_differences": compared, f"{slug}_power": power}
    found.tables |= {name: table for name, table in made.items() if len(table)}
    shown = tables.scores_table(last)
    if suite.split(",")[0] == PAPER_SUITE:
        shown = pd.concat([shown, paper_rows(list(last["task"].unique()))]).fillna("")
    found.display_tables[slug] = shown
    if len(compared):
        found.display_tables[f"{slug}_differences"] = tables.score_differences_table(compared)
    if len(power):
        found.display_tables[f"{slug}_power"] = tables.power_table(power)
    widths = sorted(last["d_model"].unique())
    for width in widths:
        here = last[(last["d_model"] == width) & last["share"]]
        if here.empty:
            continue
        name = f"{slug}_d{width}" if len(widths) > 1 else slug
        between = compared[(compared["d_model"] == width) & (compared["task"] != scores.CONTRAST) & compared["share"]]
        found.figures[name] = score_plots.downstream(here, between, labels)
        found.captions[name] = (
            f"Scores on {suite} (d = {width}), and differences between arms and optimizers, with 95 % intervals over "
            "seeds and items. Blue: knowledge, orange: reasoning. Not shown: scores that are no share of right answers."
        )
        on_the_way = means[(means["d_model"] == width) & means["share"]]
        if on_the_way["step"].nunique() > 1:
            found.figures[f"{name}_along"] = score_plots.scores_along_training(on_the_way, labels)
            found.captions[f"{name}_along"] = f"Scores on {suite} (d = {width}) along training."
    if statements := list(_statements(suite, compared)):
        found.statements.setdefault("Downstream", []).extend(statements)
    found.warnings += _warnings(suite, table)


def _statements(suite: str, compared: pd.DataFrame) -> Iterator[str]:
    """A sentence for each comparison of means over tasks; none is ranked without an interval over seeds."""
    of_means = compared[compared["task"].isin([*scores.AVERAGES, scores.CONTRAST]) & compared["low"].notna()]
    for row in rows(of_means):
        if row.low <= 0 <= row.high:
            verdict = "no difference shown"
        elif row.seeds < 2:
            verdict = "one seed: an interval over items alone, which ranks these two models and not their arms"
        else:
            verdict = f"**{row.of if row.difference > 0 else row.against} is better**"
            if row.task == scores.CONTRAST:
                more = scores.REASONING if row.difference > 0 else scores.KNOWLEDGE
                verdict = f"**{more} gains more from {row.of}**"
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


def paper_rows(tasks: list[str]) -> pd.DataFrame:
    """Table 2 of arXiv:2601.04890 under the names of the suite's tasks, in its order, and their mean; per cent."""
    columns = [task for task in tasks if task not in scores.AVERAGES]
    cells = [
        {"line": f"arXiv:2601.04890: {arm}", **dict(zip(columns, (f"{value:.2f}" for value in values), strict=False))}
        | {scores.AVERAGE: f"{sum(values) / len(values):.2f}"}
        for arm, values in scores.PAPER.items()
    ]
    return pd.DataFrame(cells)

"""What a reader should know first: three to six sentences chosen from all that a report says, each with its doubt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd

from lit_mult.analysis import questions, tables
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows

MOST = 6
_REGIME = "do not reach the balance"
_EDGES = "at the edge of"
_ANSWERED = {name: name for name in get_args(questions.Outcome)}
_JUDGED = {
    "contradicted": "contradicted",
    "reproduced": "reproduced",
    "undecided": "undecided",
    "not at this scale": "not tested at this scale",
}
"""Outcome -> how it is counted; the order is that of sentences."""


@dataclass(frozen=True)
class Headline:
    """A sentence, and the numbers that it rests on."""

    text: str
    outcome: str = ""
    """lower, higher, equivalent, undecided; reproduced, contradicted, not at this scale; best; doubt; or "" for a
    count."""
    value: float = math.nan
    low: float = math.nan
    """95 % interval, in the unit of the value; NaN where there is none."""
    high: float = math.nan
    range_low: float = math.nan
    """What the interval is judged by: a margin of equivalence, or the range of a claim; NaN for none."""
    range_high: float = math.nan


def headlines(parts: Sequence[Findings], warnings: Sequence[str]) -> list[Headline]:
    """The most telling sentences of a report: declared answers, or verdicts, or the best arms; then what is in doubt.

    Answers keep the order in which the study declares them, as its author knows what matters; verdicts start with the
    contradicted. Of more than fit, a count comes first. Doubts are short runs and optima at an edge of the rates.
    """
    doubts = list(_doubts(warnings))
    room = MOST - len(doubts)
    by_name = {name: table for part in parts for name, table in part.tables.items() if len(table)}
    if "answers" in by_name:
        found = _answers(by_name["answers"], "declared questions", room)
    elif "outcome" in by_name.get("differences", ()):  # of a comparison of sides, which asks by itself
        found = _answers(by_name["differences"], "comparisons", room)
    elif "verdicts" in by_name:
        found = _verdicts(by_name["verdicts"], room)
    else:
        said = (Headline(line) for part in parts for lines in part.statements.values() for line in lines)
        found = list(_best(by_name))[:room] or list(said)[:room]
    return [*found, *doubts]


def _answers(answers: pd.DataFrame, name: str, room: int) -> list[Headline]:
    told = [
        Headline(questions.statement(row), row.outcome, row.difference, row.low, row.high, -row.margin, row.margin)
        for row in rows(answers)
    ]
    if len(told) <= room:
        return told
    counted = _counted(answers["outcome"], _ANSWERED)
    return [Headline(f"Of {len(told)} {name}: {counted}. The first of them:"), *told[: room - 1]]


def _verdicts(verdicts: pd.DataFrame, room: int) -> list[Headline]:
    claims = f"{len(verdicts)} claims" if len(verdicts) > 1 else "one claim"
    found = [Headline(f"Of {claims} judged over seeds: {_counted(verdicts['outcome'], _JUDGED)}.")]
    # One of each outcome before a second of any: a reader wants to know what failed and what held.
    rank = verdicts["outcome"].map(list(_JUDGED).index)
    place = verdicts.groupby("outcome").cumcount()
    for row in rows(verdicts.assign(place=place, rank=rank).sort_values(["place", "rank"]).head(room - 1)):
        span = f"[{row.low:.3g}, {row.high:.3g}]" if math.isfinite(row.low) else "no interval"
        seeds = f"{row.seeds} seed{'s' * (row.seeds != 1)}"
        text = f"{row.claim}: {row.outcome}. {row.statistic}: {row.value:.3g}, 95 % interval {span}, {seeds}."
        found.append(Headline(text, row.outcome, row.value, row.low, row.high, row.range_low, row.range_high))
    return found


def _best(by_name: dict[str, pd.DataFrame]) -> Iterator[Headline]:
    """The arm of lowest best loss in each setting, at its largest width, and what sets it apart from the next."""
    if "summary" not in by_name or "differences" not in by_name:
        return
    summary, differences = by_name["summary"], by_name["differences"]
    between = differences[(differences["between"] == "arm") & (differences["measure"] == "best_loss")]
    for setting, group in summary[summary["best_loss"].notna()].groupby("setting", sort=False):
        at_width = group[group["d_model"] == group["d_model"].max()].sort_values("best_loss", kind="stable")
        first, *others = rows(at_width)
        where = ", ".join(filter(None, (str(setting), f"d = {first.d_model}")))
        told = f"has the lowest best loss of {len(at_width)} arms," if others else "has a best loss of"
        span = (
            tables.interval(first.best_loss_low, first.best_loss_high, first.seeds)
            if first.seeds > 1
            else "no interval"
        )
        seeds = f"{first.seeds} seed{'s' * (first.seeds != 1)}"
        text = f"{where}: {first.arm} {told} {tables.number(first.best_loss)}, {span}, {seeds}"
        if not others:
            yield Headline(f"{text}, at a learning rate of {tables.power_of_two(first.best_lr)}.", "best")
            continue
        pair = _paired(
            between[(between["within"] == setting) & (between["d_model"] == first.d_model)], first, others[0]
        )
        if pair is None:
            yield Headline(f"{text}.", "best")
            continue
        difference, low, high, doubtful = pair
        apart = "no difference to the next is shown"
        if doubtful:
            apart = f"what sets it apart from the next is in doubt ({doubtful} pairs)"
        elif high < 0:
            apart = f"{-difference:.4f} below the next"
        elif low > 0:  # the arms have different seeds so far
            apart = f"{difference:.4f} above the next at equal seeds"
        compared = f"{first.arm} - {others[0].arm}: {tables.signed(difference)}"
        text = f"{text}; {apart} ({compared}, {tables.interval(low, high, first.seeds)})."
        yield Headline(text, "best", difference, low, high)


def _paired(between: pd.DataFrame, of: Any, against: Any) -> tuple[float, float, float, int] | None:
    """Difference of two arms with its interval, and the number of doubtful pairs; None where nothing pairs them."""
    for row in rows(between):
        if (row.of, row.against) == (of.arm, against.arm):
            return row.difference, row.low, row.high, row.doubtful
        if (row.of, row.against) == (against.arm, of.arm):
            return -row.difference, -row.high, -row.low, row.doubtful
    return None


def _doubts(warnings: Sequence[str]) -> Iterator[Headline]:
    yield from (Headline(_sentence(line), "doubt") for line in warnings if _REGIME in line)
    if edges := [line for line in warnings if _EDGES in line]:
        more = f" (and {len(edges) - 1} more, under Warnings)" if len(edges) > 1 else ""
        yield Headline(_sentence(edges[0] + more), "doubt")


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def _counted(outcomes: Any, names: dict[str, str]) -> str:
    counts = Counter(map(str, outcomes))
    return ", ".join(f"{counts[one]} {name}" for one, name in names.items() if counts[one])

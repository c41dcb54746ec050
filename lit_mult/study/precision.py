"""Further seeds for a finished grid, until the intervals of the study's questions are as narrow as it asks for.

Seeds come in rounds. A round is decided by the records of the cells before it and by nothing else, so that whoever
reads the folder derives the same cells, whenever and from whatever further records there are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING, Any

from lit_mult.schema import Question, RunRecord
from lit_mult.study.spec import Cell, Point, StudySpec

if TYPE_CHECKING:
    import pandas as pd

_LR = "optim.lr"


@dataclass(frozen=True)
class _Line:
    """A point, as one kind of question needs its seeds."""

    point: str
    """Its name."""
    at_optimum: bool
    """Further seeds run at the rates around the optimum alone; otherwise at all planned rates."""


@dataclass(frozen=True)
class _Asked:
    """A question at one value of the factors that it leaves open, and the lines that answer it."""

    question: Question
    lines: frozenset[_Line]

    @property
    def points(self) -> set[str]:
        return {line.point for line in self.lines}


def further_cells(spec: StudySpec, grid: Mapping[str, Cell], records: Mapping[str, RunRecord]) -> dict[str, Cell]:
    """The cells of further seeds, by id: of all rounds up to the first that has a cell without a record.

    A round takes in every line of each question whose interval is not narrow enough (see `seeds_needed`). For best_loss
    the new seeds run at the rates around the line's optimum (`rates_around_optimum`), for the other measures at all
    planned ones. The rates are those that the planned seeds show.

    Args:
        spec: a study with a `precision`.
        grid: all cells of its planned seeds by id, with the rates added at an edge.
        records: cell -> record; others may be among them.
    """
    further: dict[str, Cell] = {}
    if not grid.keys() <= records.keys():
        return further
    asked = list(questions_asked(spec))
    lines = {line for one in asked for line in one.lines}
    points = {point.name: point for point in spec.points()}
    cells_of = _by_point(grid.values())
    rates = {line: _rates(points[line.point], line, cells_of[line.point], records) for line in lines}
    n_seeds = dict.fromkeys(lines, len(spec.seeds))
    while grid.keys() | further.keys() <= records.keys():
        wanted = _next_round(spec, asked, n_seeds, _by_point([*grid.values(), *further.values()]), records)
        if wanted == n_seeds:
            break
        for line, n in sorted(wanted.items(), key=lambda item: (item[0].point, item[0].at_optimum)):
            for seed in spec.all_seeds[n_seeds[line] : n]:
                for nuisance in rates[line]:
                    cell = points[line.point].cell(nuisance, seed, refines=True)
                    further[cell.id] = cell
        n_seeds = wanted
    return further


def questions_asked(spec: StudySpec) -> Iterator[_Asked]:
    """Every question, at each value of the factors that it leaves open, with the lines of both of its sides.

    A factor that one side alone fixes has that value on the other side, too.
    """
    points = list(spec.points())
    for question in spec.questions:
        of, against = {**question.against, **question.of}, {**question.of, **question.against}
        free = [name for name in ("arm", *spec.factors) if name not in of]
        left_open = [name for name in free if name not in question.over]
        pairs: dict[str, set[str]] = {}
        for one, other in itertools.product(points, points):
            if _matches(one, of) and _matches(other, against) and _values(one, free) == _values(other, free):
                pairs.setdefault(_values(one, left_open), set()).update((one.name, other.name))
        for names in pairs.values():
            yield _Asked(question, frozenset(_Line(name, question.measure == "best_loss") for name in names))


def seeds_needed(differences: Sequence[float], n: int, precision: float, most: int) -> int:
    """Number of seeds that a question needs next; `n` when its interval is narrow enough, or it has `most`.

    It is the number at which Student's t interval would be narrow enough if the standard deviation were the one of the
    seeds so far, and at the most twice as many as there are.

    Args:
        differences: of the seeds that have one, nats per token. None have where a side diverged at all of its rates;
            then more seeds would not help.
        n: seeds so far.
        precision: half width of the 95 % interval, nats per token.
        most: seeds that a line may have.
    """
    from lit_mult.analysis.seeds import mean_interval, t_quantile

    if n >= most or not len(differences):
        return n
    if len(differences) < 2:
        return min(2 * n, most)
    _, low, high = mean_interval(differences)
    if (high - low) / 2 <= precision:
        return n
    deviation = stdev(differences)
    enough = (m for m in range(n + 1, 2 * n) if t_quantile(0.975, m - 1) * deviation / math.sqrt(m) <= precision)
    return min(next(enough, 2 * n), most)


def rates_around_optimum(cells: Iterable[Cell], records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """Values of the nuisance factors around the optimum of a point: the best ones, and their neighbours in lr.

    The best have the lowest mean loss over seeds, on none of which they diverged (of equal means the lowest lr).
    Neighbours have the best values of the other nuisance factors; at an edge there is one, and without a rate that
    never diverged there is nothing.
    """
    rates = mean_losses(cells, records)
    mean, best = min(rates, key=lambda rate: rate[0])
    if not math.isfinite(mean):
        return []
    others = {**best, _LR: None}
    along = [nuisance for _, nuisance in rates if {**nuisance, _LR: None} == others]
    place = along.index(best)
    return along[max(0, place - 1) : place + 2]


def mean_losses(cells: Iterable[Cell], records: Mapping[str, RunRecord]) -> list[tuple[float, dict[str, Any]]]:
    """Mean loss over seeds (infinite where one diverged) of each value of the nuisance factors, by lr."""
    losses: dict[str, list[float]] = {}
    for cell in cells:
        loss = records[cell.id].final_loss
        losses.setdefault(json.dumps(cell.nuisance, sort_keys=True), []).append(math.inf if loss is None else loss)
    means = [(sum(found) / len(found), json.loads(text)) for text, found in losses.items()]
    return sorted(means, key=lambda rate: rate[1].get(_LR, 0.0))


def _next_round(
    spec: StudySpec,
    asked: Iterable[_Asked],
    n_seeds: Mapping[_Line, int],
    cells_of: Mapping[str, Sequence[Cell]],
    records: Mapping[str, RunRecord],
) -> dict[_Line, int]:
    """Line -> number of seeds after the next round."""
    from lit_mult.analysis.frame import frame_of

    assert spec.precision is not None
    assert spec.budget.seeds is not None
    runs = frame_of(records[cell.id] for cells in cells_of.values() for cell in cells)
    wanted = dict(n_seeds)
    for one in asked:
        own = {cell.id for point in one.points for cell in cells_of[point]}
        n = min(n_seeds[line] for line in one.lines)
        for differences in _differences(runs[runs["cell"].isin(own)], one.question):
            needed = seeds_needed(differences, n, spec.precision, spec.budget.seeds)
            for line in one.lines:
                wanted[line] = max(wanted[line], needed)
    return wanted


def _differences(runs: pd.DataFrame, question: Question) -> Iterator[list[float]]:
    """Differences by seed, as the report has them."""
    from lit_mult.analysis.questions import differences_by_seed

    for _, part in differences_by_seed(runs, question).groupby("within"):
        yield [float(value) for value in part.sort_values("seed")["difference"] if math.isfinite(value)]


def _rates(point: Point, line: _Line, cells: Iterable[Cell], records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    return rates_around_optimum(cells, records) if line.at_optimum else list(point.grid())


def _by_point(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.point.name, []).append(cell)
    return found


def _matches(point: Point, side: Mapping[str, Any]) -> bool:
    values = {"arm": point.arm, **point.factors}
    return all(values[name] == value for name, value in side.items())


def _values(point: Point, names: Iterable[str]) -> str:
    values = {"arm": point.arm, **point.factors}
    return json.dumps([values[name] for name in names])

"""Tables for readers (Markdown and terminal text, rounded) and for programs (CSV, every digit)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import pandas as pd

from lit_mult.analysis.frame import rows

NO_INTERVAL = "1 seed: no interval"
_NOTHING = "n/a"


def to_csv(table: pd.DataFrame) -> str:
    """CSV with floats that round-trip."""
    return table.to_csv(index=False, lineterminator="\n")


def to_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of a table of strings, such as the ones below return."""
    cells = [list(table.columns), ["---"] * len(table.columns), *_cells(table)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in cells)


def to_text(table: pd.DataFrame) -> str:
    """The same table in aligned columns, for a terminal."""
    cells = [list(table.columns), *_cells(table)]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() + "\n" for row in cells
    )


def _by_row(write: Callable[[Any], dict[str, str]]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """From a function that writes a row to one that writes a table."""

    @wraps(write)
    def table(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame([write(row) for row in rows(frame)])

    return table


@_by_row
def summary_table(row: Any) -> dict[str, str]:
    """`sensitivity.summary` for readers: losses in nats per token, four decimals."""
    return {
        **_best_loss(row),
        "lr sensitivity": number(row.sensitivity),
        "95 % interval ": interval(row.sensitivity_low, row.sensitivity_high, row.sensitivity_seeds),
        "optimal lr": power_of_two(row.optimum_lr),
        "diverged": f"{row.diverged} of {row.runs}",
        "doubts": _doubts(row, "one lr only" * row.reference, f"{row.pruned} runs pruned" * bool(row.pruned)),
    }


@_by_row
def differences_table(row: Any) -> dict[str, str]:
    """`sensitivity.paired_differences` for readers: nats per token, below 0 where the first named is better."""
    return {
        "difference": f"{row.of} - {row.against}",
        "within": row.within or _NOTHING,
        "width": str(row.d_model),
        "measure": str(row.measure).replace("_", " "),
        "seeds": str(row.seeds),
        "mean": signed(row.difference),
        "95 % interval": interval(row.low, row.high, row.seeds),
        "doubtful pairs": f"{row.doubtful} of {row.pairs}" if row.doubtful else "",
    }


@_by_row
def drift_table(row: Any) -> dict[str, str]:
    """`sensitivity.optimum_drift` for readers."""
    return {
        "line": row.label,
        "widths": str(row.widths),
        "seeds": str(row.seeds),
        "slope": signed(row.slope),
        "95 % interval": interval(row.slope_low, row.slope_high, row.seeds),
        "doubts": _doubts(row),
    }


@_by_row
def bill_table(row: Any) -> dict[str, str]:
    """`cost.bill` for readers: means over seeds; FLOPs and tokens with two digits."""
    return {
        **_best_loss(row),
        "FLOPs of the best run": scientific(row.run_flops),
        "of the search": scientific(row.search_flops),
        "of the tuning": scientific(row.tuning_flops),
        "in total": scientific(row.total_flops),
        "tokens in total": scientific(row.total_tokens),
        "seconds in total": _written(row.total_seconds, ",.0f"),
    }


@_by_row
def speedups_table(row: Any) -> dict[str, str]:
    """`speedup.speedups` for readers."""
    return {
        "of": row.of,
        "against": row.against,
        "within": row.within or _NOTHING,
        "measured on": row.measured_on,
        "seeds": str(row.seeds),
        "speed-up": spanned(row.speedup, row.low, row.high),
    }


@_by_row
def step_costs_table(row: Any) -> dict[str, str]:
    """`compare.step_costs` for readers."""
    return {
        "line": f"{row.arm} · {row.setting}" if row.setting else row.arm,
        "width": str(row.d_model),
        "seeds": str(row.seeds),
        "seconds of a step": f"{row.seconds:.2g}",
        "against the first": _NOTHING if math.isnan(row.ratio) else spanned(row.ratio, row.low, row.high),
    }


def scores_table(means: pd.DataFrame) -> pd.DataFrame:
    """`scores.means` of one suite for readers: a row a line, a column a task.

    Shares of right answers are per cent with their standard error, other scores stand as lm-eval has them.
    """
    widths = means["d_model"].nunique() > 1
    cells = []
    for (label, width), group in means.groupby(["label", "d_model"], sort=False):
        first = next(rows(group))
        name = f"{label}, d = {width}" if widths else str(label)
        values = {row.task: _score(row.value, row.stderr, row.share) for row in rows(group)}
        cells.append({"line": name, "seeds": str(first.seeds), **values})
    chances = {row.task: _per_cent(row.chance) for row in rows(means.drop_duplicates("task"))}
    return pd.DataFrame([*cells, {"line": "chance", "seeds": "", **chances}]).fillna("")


def score_differences_table(differences: pd.DataFrame) -> pd.DataFrame:
    """`scores.differences` of one suite for readers: a row a task, a column a comparison, points with their interval.

    Of scores that are no shares of right answers the differences are in their own unit.
    """
    widths, cells = differences["d_model"].nunique() > 1, []
    for row in rows(differences):
        within = ", ".join(filter(None, (row.within, f"d = {row.d_model}" if widths else "")))
        name = f"{row.of} - {row.against}{f' ({within})' if within else ''}"
        unit, digits = (100, 1) if row.share else (1, 4)
        span = "" if math.isnan(row.low) else f" [{unit * row.low:+.{digits}f}, {unit * row.high:+.{digits}f}]"
        cells.append(({"task": row.task}, name, f"{unit * row.difference:+.{digits}f}{span}"))
    return wide_table(cells)


def power_table(power: pd.DataFrame) -> pd.DataFrame:
    """`scores.power` of one suite for readers: points."""
    points = power.drop(columns=["suite", "comparisons"]).set_index("task").map(_per_cent).reset_index()
    return points.rename(columns=lambda name: f"{name.removeprefix('seeds_')} seeds" if "_" in name else name)


def means_table(
    means: pd.DataFrame, columns: Sequence[str], write: Callable[[float], str] | None = None
) -> pd.DataFrame:
    """`seeds.means_over_seeds` for readers: the given columns, of which the last is the mean, and its interval.

    `write` formats the mean and the ends of its interval; with four decimals, unless it is given.
    """
    write = write or number
    *keys, value = columns
    cells = [
        {key.rpartition(".")[2]: str(row[key]) for key in keys}
        | {"seeds": str(row["seeds"]), value.replace("_", " "): write(row[value])}
        | {"95 % interval": NO_INTERVAL if row["seeds"] < 2 else f"[{write(row['low'])}, {write(row['high'])}]"}
        for row in means.to_dict("records")
    ]
    return pd.DataFrame(cells)


def wide_table(cells: Iterable[tuple[dict[str, str], str, str]]) -> pd.DataFrame:
    """A table of (columns that name a row, further column, text); rows and columns in the order of their first cell."""
    table = dict[tuple[str, ...], dict[str, str]]()
    for row, column, text in cells:
        table.setdefault(tuple(row.values()), dict(row))[column] = text
    return pd.DataFrame(list(table.values())).fillna("")


def number(value: float) -> str:
    """Four decimals; n/a for NaN, here and below."""
    return _written(value, ".4f")


def signed(value: float) -> str:
    """Four decimals with a sign."""
    return _written(value, "+.4f")


def interval(low: float, high: float, seeds: int) -> str:
    """The interval in brackets, or why there is none."""
    if seeds == 0:
        return _NOTHING
    return NO_INTERVAL if math.isnan(low) else f"[{low:.4f}, {high:.4f}]"


def spanned(value: float, low: float, high: float) -> str:
    """Three digits, with the interval where there is one."""
    return _written(value, ".3g") + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")


def scientific(value: float) -> str:
    """Two digits and a power of ten, as in 3.1e15; 0 for 0."""
    if math.isnan(value):
        return _NOTHING
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value else "0"


def power_of_two(lr: float) -> str:
    """A learning rate as 2^-6.25."""
    return _NOTHING if math.isnan(lr) else f"2^{math.log2(lr):.2f}"


def _written(value: float, style: str) -> str:
    return _NOTHING if math.isnan(value) else format(value, style)


def _per_cent(share: float) -> str:
    return _written(100 * share, ".1f")


def _score(value: float, stderr: float, share: bool) -> str:
    if not share:
        return number(value)
    return _per_cent(value) + ("" if math.isnan(stderr) else f" ± {100 * stderr:.1f}")


def _best_loss(row: Any) -> dict[str, str]:
    return {
        "line": row.label,
        "width": str(row.d_model),
        "seeds": str(row.seeds),
        "best loss": number(row.best_loss),
        "95 % interval": interval(row.best_loss_low, row.best_loss_high, row.seeds),
    }


def _doubts(row: Any, before: str = "", behind: str = "") -> str:
    """What stands against a row, in words; empty when nothing does."""
    edge = f"optimum at the edge ({row.at_edge} times)" if row.at_edge else ""
    missing = f"runs missing ({row.incomplete} times)" if row.incomplete else ""
    return ", ".join(filter(None, (before, edge, missing, behind)))


def _cells(table: pd.DataFrame) -> Iterable[list[str]]:
    return ([str(cell) for cell in row] for row in table.itertuples(index=False))

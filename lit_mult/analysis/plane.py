"""Loss over the plane of learning rate and weight decay, and how flat it is: for studies that search both on a grid.

The balance of noise and decay fixes the norm of a matrix at about sqrt(lr / weight_decay), and takes 1 / (lr *
weight_decay) steps to reach: along a line of constant lr * weight_decay the norm moves and the time does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis import drawing, tables
from lit_mult.analysis.drawing import Axes, Figure, panel_grid, styled
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.analysis.seeds import mean_interval, means_over_seeds, paired
from lit_mult.analysis.sensitivity import capped
from lit_mult.analysis.styles import letters, scale
from lit_mult.method.decay import BY_LR
from lit_mult.schema import RunRecord

_LR, _DECAY = "optim.lr", "optim.weight_decay"
_LINE = ["setting", "d_model", "arm"]
ALONG = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "balance": "constant lr · weight decay",
    "plane": "the whole plane",
}
"""What the excess over the lowest loss is averaged along."""
_WITHOUT_LR = set(ALONG) - {"balance"}
"""Where a step's decay does not depend on the learning rate, as lines of equal weight decay are those of balance."""
_LEAST_ON_A_LINE = 3
_CAPTIONS = {
    "plane": "Final validation loss over learning rate and weight decay: mean over seeds, above the lowest of the row, "
    "and differences of arms at equal learning rate, weight decay and seed (blue: the first named is lower). Stars "
    "mark the lowest mean. Thousandths of a nat per token; a diverged run counts as its initial loss."
}
_HOW_TO_READ = """\
- *Excess* is min(loss, initial loss) minus the lowest of its line, as the sensitivity is along the learning rate: its
  mean over lines of equal weight decay (along the learning rate), of equal learning rate, of equal lr * weight_decay
  (lines of three points or more), and over the whole plane. It depends on the ranges, which all arms share.
"""
_HEADING = "The plane of learning rate and weight decay (exploratory)"


def plane(runs: pd.DataFrame) -> Findings:
    """Findings on the plane; empty unless learning rate and weight decay were searched together on a grid.

    Args:
        runs: `frame.load_records`.
    """
    if not _is_plane(runs):
        return Findings()
    losses = runs.assign(loss=capped(runs["final_loss"], runs["initial_loss"]))
    means = means_over_seeds(losses, [*_LINE, _LR, _DECAY], "loss")
    differences, excess = _differences(losses), _excess(losses, set(ALONG) if _decays_by_lr(runs) else _WITHOUT_LR)
    flatness = means_over_seeds(excess, [*_LINE, "along"], "excess")
    return Findings(
        tables={"plane": means, "plane_differences": differences, "plane_excess": excess},
        display_tables={"plane_excess": _shown(flatness)},
        figures={"plane": _figure(means, differences)},
        captions=_CAPTIONS,
        statements={_HEADING: list(_statements(excess))},
        warnings=list(_edges(means)),
        how_to_read=_HOW_TO_READ,
        unit="excess over the lowest loss in nats per token",
    )


def _edges(means: pd.DataFrame) -> Iterator[str]:
    """Lines whose lowest mean lies at the lowest or highest weight decay; the comparison has those of the rate."""
    best = means.loc[means.groupby(_LINE)["loss"].idxmin()]
    at_edge = best[best[_DECAY].isin([means[_DECAY].min(), means[_DECAY].max()])]
    if len(at_edge):
        lines = (f"{line.arm} · {line.setting}, d = {line.d_model}" for line in rows(at_edge))
        yield f"best weight decay at the edge of those tried, so a better one may lie outside: {'; '.join(lines)}"


def _is_plane(runs: pd.DataFrame) -> bool:
    if not {_LR, _DECAY} <= set(runs.columns) or runs[[_LR, _DECAY]].isna().any(axis=None):
        return False
    no_other = runs["nuisance"].str.fullmatch(r"weight_decay=[^,]*")  # nuisance factor but for the learning rate
    enough = min(runs[_LR].nunique(), runs[_DECAY].nunique()) > 1
    return bool(no_other.all() and enough and (runs["sampler"] == "grid").all())


def _decays_by_lr(runs: pd.DataFrame) -> bool:
    """Whether decay is proportional to the learning rate (`optim.weight_decay_mode`) in the runs of every line."""
    configs = (RunRecord.read(Path(path)).config for path in runs.groupby(_LINE)["path"].first())
    return all(config["optim"].get("weight_decay_mode", "coupled") in BY_LR for config in configs)


def _differences(losses: pd.DataFrame) -> pd.DataFrame:
    """Loss of each arm minus that of each arm before it, over the seeds at every point of the plane."""
    point, found = ["setting", "d_model", _LR, _DECAY], []
    for against, of in combinations(losses["arm"].unique(), 2):
        pairs = paired(losses, of, against, [*point, "seed"], "loss").rename(columns={"loss": "difference"})
        found.append(means_over_seeds(pairs, point, "difference").assign(of=of, against=against))
    columns = ["of", "against", "setting", "d_model", _LR, _DECAY, "difference", "low", "high", "seeds"]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)


def _excess(losses: pd.DataFrame, directions: Set[str]) -> pd.DataFrame:
    """Columns of the line, seed, along and excess: the mean over lines in these directions of loss - the lowest of all.

    A seed counts where it has every point of the plane.
    """
    found = []
    # Equal products of floats may differ in their last bits.
    losses = losses.assign(balance=np.log2(losses[_LR] * losses[_DECAY]).round(6), plane=0)
    groups = {"lr": _DECAY, "weight_decay": _LR, "balance": "balance", "plane": "plane"}
    for line, here in losses.groupby(_LINE, sort=False):
        points = here.groupby("seed").size()
        for seed, plane in here[here["seed"].map(points) == points.max()].groupby("seed"):
            for along in filter(directions.__contains__, groups):
                held = groups[along]
                over = plane.groupby(held)["loss"]
                excess = (over.mean() - over.min())[over.size() >= (_LEAST_ON_A_LINE if along == "balance" else 1)]
                if len(excess):
                    found.append((*line, seed, along, float(excess.mean())))
    return pd.DataFrame(found, columns=[*_LINE, "seed", "along", "excess"])


def _statements(excess: pd.DataFrame) -> Iterator[str]:
    for against, of in combinations(excess["arm"].unique(), 2):
        line = ["setting", "d_model", "along"]
        both = paired(excess, of, against, [*line, "seed"], "excess")
        for (setting, width, along), pairs in both.groupby(line, sort=False):
            mean, low, high = mean_interval(pairs["excess"])
            where = ", ".join(filter(None, (str(setting), f"d = {width}", f"{len(pairs)} seeds")))
            span = tables.interval(low, high, len(pairs))
            answer = f"{of} {'lower' if high < 0 else 'higher'}" if low > 0 or high < 0 else "no difference shown"
            asked = f"Excess along {ALONG[str(along)]}, {of} - {against} ({where})"
            yield f"{asked}: {tables.signed(mean)}, {span}: {answer}."


def _shown(flatness: pd.DataFrame) -> pd.DataFrame:
    """Mean excess for readers, a column for each of `ALONG`."""
    cells = (
        (
            {"arm": row.arm, "setting": row.setting, "width": str(row.d_model), "seeds": str(row.seeds)},
            ALONG[row.along],
            tables.spanned(row.excess, row.low, row.high),
        )
        for row in rows(flatness)
    )
    return tables.wide_table(cells)


@styled
def _figure(means: pd.DataFrame, differences: pd.DataFrame) -> Figure:
    """A row a setting and width; a panel for each arm, and one for each pair of arms."""
    places = list(means[["setting", "d_model"]].drop_duplicates().itertuples(index=False))
    arms, pairs = list(means["arm"].unique()), differences[["of", "against"]].drop_duplicates()
    figure, axes = panel_grid(len(places), len(arms) + len(pairs), 2.2, wide=True)
    scale = float(differences["difference"].abs().max()) if len(pairs) else 1.0
    for (setting, width), panels in zip(places, axes, strict=True):
        here = means[(means["setting"] == setting) & (means["d_model"] == width)]
        above = here.assign(above=here["loss"] - here["loss"].min())
        most = float(above["above"].quantile(0.9)) or 1.0  # a few points at the edge would leave the rest one colour
        for arm, ax in zip(arms, panels, strict=False):
            one = above[above["arm"] == arm]
            _heat(ax, one, "above", cmap="viridis_r", vmin=0, vmax=most)
            best = one.loc[one["loss"].idxmin()]
            _star(ax, one, best)
            drawing.entitle(ax, arm, setting, f"$d$ = {width}")
        for pair, ax in zip(rows(pairs), panels[len(arms) :], strict=True):
            one = differences[(differences["of"] == pair.of) & (differences["against"] == pair.against)]
            one = one[(one["setting"] == setting) & (one["d_model"] == width)]
            _heat(ax, one, "difference", cmap="RdBu_r", vmin=-scale, vmax=scale)
            drawing.entitle(ax, f"{pair.of} - {pair.against}", setting)
    for ax in axes[-1]:
        ax.set_xlabel("learning rate")
    for ax in axes[:, 0]:
        ax.set_ylabel("weight decay")
    return figure


def _heat(ax: Axes, table: pd.DataFrame, value: str, **colours: Any) -> None:
    """Values over learning rate (x) and weight decay (y) as colours, with the number of thousandths in each field."""
    grid = table.pivot(index=_DECAY, columns=_LR, values=value)
    image = ax.imshow(grid, origin="lower", aspect="auto", **colours)
    every = -(-4 * len(grid.columns) // letters(ax))  # a label is about four letters wide
    rates = dict(list(enumerate(grid.columns))[::every])
    ax.set_xticks(list(rates), [f"$2^{{{np.log2(lr):.3g}}}$" for lr in rates.values()])
    ax.set_yticks(range(len(grid.index)), [f"{decay:g}" for decay in grid.index])
    ax.grid(visible=False)
    size = 6 * scale() * min(1.0, letters(ax) / (3.6 * len(grid.columns)))
    for (row, column), number in np.ndenumerate(grid.to_numpy(float)):
        if np.isfinite(number):
            light = sum(image.cmap(image.norm(number))[:3]) > 1.5
            text = f"{1000 * number:+.0f}" if value == "difference" else f"{1000 * number:.0f}"
            ax.text(column, row, text, ha="center", va="center", size=size, color="black" if light else "white")


def _star(ax: Axes, table: pd.DataFrame, best: pd.Series) -> None:
    column = sorted(table[_LR].unique()).index(best[_LR])
    row = sorted(table[_DECAY].unique()).index(best[_DECAY])
    ax.plot(column + 0.32, row + 0.32, **drawing.STAR | {"mfc": "white", "ms": 5, "ls": "none"})

"""Should the multipliers' own learning rate and weight decay scale with width? Open in arXiv:2601.04890 sec. 4.2.

The paper gives no answer; claims here are possible ones. Arm `rate` varies the multipliers' learning rate at one decay,
arm `decay` their decay at one rate; the rest scales by muP.

The optimal rate of a seed is interpolated. Losses are compared at values of lowest mean over the seeds, the same for
all of them (`seeds.at_best`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import (
    DIVERGED,
    Figure,
    add_legend,
    draw_means,
    line_styles,
    mark_at_top,
    pairs_across,
    panel_grid,
    styled,
)
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.exponents import TOLERANCE
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.seeds import at_best, means_over_seeds, of_like_seeds, slope
from lit_mult.analysis.sensitivity import interpolated_optimum
from lit_mult.analysis.tables import means_table, signed
from lit_mult.analysis.verdict import BELOW_0, Verdict, judge
from lit_mult.schema import NEGLIGIBLE

Grids = dict[tuple[str, int], pd.DataFrame]

_FIELDS = {"rate": "optim.multiplier_lr", "decay": "optim.multiplier_weight_decay"}
"""Arm -> what it varies."""
_NAMES = {"rate": "learning rate of the multipliers", "decay": "weight decay of the multipliers"}
_NO_SCALING = (-TOLERANCE, TOLERANCE)
"""Half of the smallest power of the width, 1/2, that a rule would have."""
_AS_GOOD = (-math.inf, NEGLIGIBLE)
_CAPTION = """\
Final validation loss against the multipliers' learning rate (left) and weight decay (right, with 0), a line a width:
loss minus that of the same seed at the width's best value; means over seeds with 95 % intervals by Student's t, none at
the best itself. Crosses: runs that diverged. The question is one that the paper leaves open."""
_HOW_TO_READ = """\
- Best values are those of the lowest mean loss over seeds, one for all of them. An optimum at the edge of
  the grid leaves the slope undecided: the optimum may lie outside.
"""


def findings(evidence: Evidence) -> Findings:
    """Do the best rate and the best decay of the multipliers move with the width, and what does a fixed one cost?"""
    evidence.expect(_FIELDS, ["model.d_model", *_FIELDS.values()])
    grids = _grids(evidence.runs)
    excess, optima = _excess(grids), _optima(grids)
    rates = means_over_seeds(optima, ["d_model"], "log2_optimum")
    losses = means_over_seeds(excess, ["arm", "d_model", "value"], "excess")
    found = Findings(
        tables={"excess": excess, "optima": optima},
        display_tables={
            "optimal_rates": means_table(rates, ["d_model", "log2_optimum"], signed),
            "excess_losses": means_table(losses, ["arm", "d_model", "value", "excess"]),
        },
        figures={"multiplier_rates": _figure(excess)},
        captions={"multiplier_rates": _CAPTION},
        warnings=list(_edges(optima)),
        how_to_read=_HOW_TO_READ,
        unit="Losses in nats per token",
    )
    return evidence.with_verdicts(found, _verdicts(grids, optima))


def _grids(runs: pd.DataFrame) -> Grids:
    """Final loss by seed (rows) and value (columns) of each arm and width, of the seeds with the most values.

    The loss of a run that diverged is NaN.
    """
    grids = {}
    for (arm, width), here in runs.groupby(["arm", "d_model"]):
        field = _FIELDS[str(arm)]
        alike = of_like_seeds(here, field)
        grids[str(arm), int(str(width))] = alike.pivot(index="seed", columns=field, values="final_loss")
    return grids


def _best(grid: pd.DataFrame) -> float:
    """The value of lowest mean loss over seeds, of those at which no seed diverged; NaN without one."""
    means = grid.mean(skipna=False).dropna()
    return float(means.index[int(means.argmin())]) if len(means) else math.nan


def _excess(grids: Grids) -> pd.DataFrame:
    """Loss of each run minus that of the same seed at the best value of its arm and width."""
    parts = []
    for (arm, width), grid in grids.items():
        over = grid.sub(grid.get(_best(grid), math.nan), axis="index").rename_axis(columns="value")
        long = over.reset_index().melt("seed", value_name="excess").astype({"value": float})
        parts.append(long.assign(arm=arm, d_model=width))
    return pd.concat(parts, ignore_index=True)


def _optima(grids: Grids) -> pd.DataFrame:
    """log2 of the interpolated optimal rate of each width and seed, and whether it is at the edge of the grid."""
    made = []
    for (arm, width), grid in grids.items():
        for seed, losses in grid.iterrows() if arm == "rate" else ():
            optimum = interpolated_optimum(grid.columns, losses)
            made.append((width, seed, np.log2(optimum.lr), optimum.at_edge))
    return pd.DataFrame(made, columns=["d_model", "seed", "log2_optimum", "at_edge"])


def _slope(optima: pd.DataFrame) -> float:
    """Least-squares slope of log2 (optimum) against log2 (width); NaN with an optimum at the edge, or with none."""
    if optima["at_edge"].any() or optima["log2_optimum"].isna().any():
        return math.nan
    return slope(np.log2(optima["d_model"]), optima["log2_optimum"])


def _verdicts(grids: Grids, optima: pd.DataFrame) -> Iterator[Verdict]:
    if (every := optima["d_model"].nunique()) > 1:
        claim = "The optimal learning rate of the multipliers does not depend on the width"
        by_seed = [_slope(here) for _, here in optima.groupby("seed") if len(here) == every]
        yield judge(claim, "slope of log2 (interpolated optimal rate) against log2 (width)", by_seed, _NO_SCALING)
    for arm, name in _NAMES.items():
        widths = sorted(width for other, width in grids if other == arm)
        if len(widths) < 2:
            continue
        small, large = widths[0], widths[-1]
        claim = f"The best {name} at width {small} does for width {large}"
        statistic = f"loss at width {large} with the best value of width {small} - with its own, nats per token "
        statistic += f"({100 * NEGLIGIBLE:g} % of the perplexity counts as nothing)"
        losses = grids[arm, large]
        excess = at_best(losses, grids[arm, small]) - at_best(losses)
        yield judge(claim, statistic, excess, _AS_GOOD)
    for (arm, width), grid in grids.items():
        if arm == "decay" and 0 in grid and grid.shape[1] > 1:
            claim = f"Decay of the multipliers lowers the loss at width {width}"
            gain = at_best(grid, grid.drop(columns=0)) - grid[0]
            yield judge(claim, "loss at the best decay above 0 - at none, nats per token", gain, BELOW_0)


def _edges(optima: pd.DataFrame) -> Iterator[str]:
    for width, here in optima[optima["at_edge"]].groupby("d_model"):
        seeds = ", ".join(map(str, here["seed"]))
        yield f"optimal rate of the multipliers at the edge of the grid (it may lie outside): d = {width}, seed {seeds}"


@styled
def _figure(excess: pd.DataFrame) -> Figure:
    """A panel for the rate and one for the decay: excess loss against it, a line a width."""
    excess = excess.assign(arm="d = " + excess["d_model"].astype(str), panel=excess["arm"], reference=False)
    widths = excess.sort_values("d_model")["arm"].unique()
    styles = line_styles(widths)
    figure, axes = panel_grid(2 // pairs_across(), pairs_across(), 2.6)
    for (panel, name), ax in zip(_NAMES.items(), axes.flat, strict=True):
        here = excess[excess["panel"] == panel]
        for arm, line in means_over_seeds(here, ["arm", "value"], "excess").groupby("arm"):
            draw_means(ax, line["value"], line, "excess", styles[str(arm)])
            mark_at_top(ax, line.loc[line["excess"].isna(), "value"], 0.97, styles[str(arm)]["color"])
        values = np.sort(here["value"].unique())
        if panel == "rate":
            ax.set_xscale("log", base=2)
            ax.set_xticks(values, [f"$2^{{{np.log2(value):.3g}}}$" for value in values])
        elif len(values) > 1:  # 0 has its place on a symmetric log axis, a step beside the smallest decay
            ax.set_xscale("symlog", base=2, linthresh=values[values > 0].min(), linscale=1)
            ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.margins(y=0.1)
        ax.set(xlabel=name, ylabel="loss - loss at the best\n(nats per token)")
    add_legend(figure, excess, styles, [DIVERGED] if excess["excess"].isna().any() else [])
    return figure

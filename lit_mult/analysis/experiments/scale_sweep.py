"""What reports share of studies that vary the scale S of some matrices: tables, warnings and panels against S."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lit_mult.analysis.experiments.evidence import Evidence
from lit_mult.analysis.experiments.scale_curves import LOSS, by_seed, curves, rise, typical_factor
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name, rows
from lit_mult.analysis.style import CROSS, Styles, against_width, beside, draw_means
from lit_mult.analysis.tables import interval, number, signed, spanned
from lit_mult.analysis.verdict import means_over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_READING = """\
- S is the scale sqrt(lr / weight decay) of the matrices over that at a factor of 1 of their learning rate; their
  lr x weight decay is the same in every run.
- A *rise* is the loss at an end of the scales minus that at the best of the other scales, which is the one of the
  lowest mean over the other seeds: chosen without the seed that it is compared on, it does not favour a rise.
- A *slope* is that of log value against log S by least squares, 0 for what does not depend on S and 1 for what is
  proportional to it. A *noise factor* is the typical factor between a norm and that of the Brownian reference,
  exp(mean |ln(norm / noise)|) over scales (and matrices): 1 for noise, more for what lies above it or below it.
- Means over seeds are geometric but for losses, rises, slopes and noise factors.
"""


def findings(evidence: Evidence, table: pd.DataFrame, fits: pd.DataFrame, ratios: Sequence[str]) -> Findings:
    """What every such study has to say, from its points, its `slopes` and columns of ratios to noise."""
    ends = (float(table["scale"].min()), float(table["scale"].max()))
    rises = pd.concat([by_seed(table, [LOSS], partial(rise, at=at), "rise", at=at) for at in ends], ignore_index=True)
    factors = by_seed(table, ratios, typical_factor, "factor")
    shown = {
        "rises": _shown(rises, "rise"),
        "slopes": _shown(fits, "slope"),
        "noise_factors": _shown(factors, "factor"),
    }
    said = list(_extremes(rises))
    return Findings(
        csvs={"points": table, "rises": rises, "slopes": fits, "noise_factors": factors},
        shown=shown | {"means": _means(table)},
        statements={"Loss at the extremes": said} if said else {},
        warnings=[*evidence.warnings, *_warnings(table)],
        reading=_READING,
        unit="Losses and rises in nats per token; slopes and noise factors have no unit",
    )


def against_scale(ax: Axes, scales: pd.Series) -> None:
    """Make the x axis log2 with a tick at each scale."""
    against_width(ax, scales)
    ax.xaxis.set_major_formatter("{x:g}")


def draw(ax: Axes, table: pd.DataFrame, measure: str, styles: Styles, look: Mapping[str, Any] | None = None) -> None:
    """`means` against S with 95 % intervals, a line an arm; crosses at the top where losses diverged."""
    for place, (arm, line) in enumerate(table.groupby("arm", sort=False)):
        points, style = means(line, measure), styles[str(arm)]
        draw_means(ax, beside(points["scale"], str(arm), styles), points, measure, {**style, **(look or {})})
        lost = line.loc[line[LOSS].isna() & (measure == LOSS), "scale"].to_numpy(float)
        at_top = {"transform": ax.get_xaxis_transform(), "color": style["color"], "zorder": 4}
        ax.plot(lost, np.full(len(lost), 0.97 - 0.06 * place), **CROSS | at_top)


def means(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Means over seeds at every scale with their interval; of what is no loss, geometric: scales multiply."""
    if measure == LOSS:
        return means_over_seeds(table, ["scale"], measure)
    found = means_over_seeds(table.assign(**{measure: np.log(table[measure])}), ["scale"], measure)
    return found.assign(**{name: np.exp(found[name]) for name in (measure, "low", "high")})


def _extremes(rises: pd.DataFrame) -> Iterator[str]:
    """At which ends the loss exceeds its best by more than the interval of the rise, a sentence an arm."""
    ends = means_over_seeds(rises, ["optimizer", "arm", "at"], "rise")
    ends["answer"] = [
        "may or may not exceed" if math.isnan(low) else "exceeds" if low > 0 else "does not exceed"
        for low in ends["low"]
    ]
    for (optimizer, arm), line in ends.groupby(["optimizer", "arm"]):
        said = []
        for answer, found in line.groupby("answer", sort=False):
            places = [f"S = {row.at:g} ({spanned(row.rise, row.low, row.high)} nats per token)" for row in rows(found)]
            said.append(f"{answer} its best by more than the interval at {' and '.join(places)}")
        yield f"{arm}, {optimizer_name(str(optimizer))}: the loss {'; it '.join(said)}."


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """`means` for people: the numbers of the figure."""
    cells = []
    for place, runs in curves(table, list(table.columns)[list(table.columns).index(LOSS) :]):
        found = means(runs, place["measure"]).set_index("scale")[place["measure"]]
        cells.append(_place(**place) | {f"S = {at:g}": number(value) for at, value in found.items()})
    return pd.DataFrame(cells).fillna("n/a")


def _place(optimizer: str, arm: str, measure: str) -> dict[str, str]:
    return {"optimizer": optimizer_name(optimizer), "arm": arm, "measure": measure.replace("_", " ")}


def _shown(table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    by, written = list(table.columns[:-2]), number if statistic == "factor" else signed  # by all but seed and statistic
    cells = []
    for row in rows(means_over_seeds(table, by, statistic)):
        value = getattr(row, statistic)
        cells.append(
            _place(row.optimizer, row.arm, row.measure)
            | {name.replace("_", " "): f"{getattr(row, name):g}" for name in by[3:]}
            | {"seeds": str(row.seeds), statistic: written(value)}
            | {"95 % interval": interval(row.low, row.high, 0 if math.isnan(value) else row.seeds)}
        )
    return pd.DataFrame(cells)


def _warnings(table: pd.DataFrame) -> Iterator[str]:
    for (optimizer, arm), group in table.groupby(["optimizer", "arm"]):
        runs = group.groupby("seed").size()
        if lacking := [str(seed) for seed in runs.index[runs < table["scale"].nunique()]]:
            place = f"{arm}, {optimizer_name(str(optimizer))}, seed {', '.join(lacking)}"
            yield f"not a run at every scale, so left out of rises, slopes and noise factors: {place}"

"""At what signal-to-noise ratio (SNR) of its gradient a parameter leaves the noise: open in arXiv:2601.04890.

The paper's explanation of trapped matrices and free vectors (sec. 1) is that a multiplier sums gradients over a
matrix, row or column and is far less noisy. So a parameter should move the less like its Brownian reference the more
signal its gradient has, multipliers should have more of it than their matrix, and larger batches should free
parameters. No size of these effects is known: the claims are of signs alone. The SNR at which trapped and free separate
is reported, not judged.

The SNR is that of the gradient of the whole parameter over one batch of B sequences: B * signal / noise, signal being
the squared norm of the true gradient and noise the trace of its covariance over sequences (`optim.gradients`). It is
the mean over entries of (mean / standard deviation)^2, each weighted by its variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Axes, Figure, against_width, draw_means, log_y, mark_legend, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.evidence import parameters as p
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.analysis.seeds import mean_interval, means_over_seeds
from lit_mult.analysis.tables import spanned, wide_table
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge
from lit_mult.diagnostics.noise_band import noise_band

_ARM, _BATCH = "vectors", "train.batch_size"
_MARKERS = ("o", "s", "^", "D", "v", "P", "h")
_SIDES: dict[str, dict[str, Any]] = {
    "matrices": {"color": "black", "marker": "o", "ls": "-"},
    "vectors": {"color": "0.5", "marker": "s", "ls": "--"},
}
_CUT: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": ":"}
_FLOOR = 1e-3
"""SNRs below this, negative estimates among them, count as this in the figure and for the cut: both take logs."""
_CAPTION = (
    "What parameters moved over what their Brownian reference did, against the signal-to-noise ratio (SNR) of a "
    "batch's gradient in the second half of the run: matrices (left), multipliers and RMSNorm weights (middle). A "
    "point is one parameter at one batch size, mean over seeds. Shaded: ratios that count as noise; lighter, for "
    "parameters of few entries alone. Dotted, where any does: the SNR that best separates trapped from free. SNRs "
    f"below {_FLOOR:g} stand there. Right: share of parameters that are free, mean over seeds with 95 % intervals. "
    "An open question: the paper has no such figure."
)
_HOW_TO_READ = f"""\
- The SNR is B * signal / noise of a parameter's whole gradient, from the two halves of a batch of B (arXiv:1812.06162
  app. A.1); signal and noise are averaged over the second half of the run before they are divided. The estimate has no
  bias but an error, larger in vectors, so that it may be negative; errors weaken correlations and blur the cut.
- A parameter is *free* when the ratio of moved and of noise's moved is off 1 by more than 10 %, on either side, and by
  what chance does to so few entries, as in `lit-mult brownian`: outside 0.75 to 1.29 for a vector of 64.
- *SNR at the cut*: the value that best splits a seed's parameters of all batch sizes into trapped (below) and free, the
  geometric mean of the SNRs on its two sides and of all cuts that are as good; SNRs below {_FLOOR:g} count as that.
  *Misplaced without*: share of parameters misplaced when all are called the same; without a better cut there is none.
"""


def findings(evidence: Evidence) -> Findings:
    """SNR against motion, the cut between trapped and free, and verdicts."""
    evidence.expect([_ARM], [_BATCH])
    points = _points(evidence)
    cuts, kinds, sides = _cuts(points), _by_batch(points, "kind"), _by_batch(points, "side")
    names = ["seed", "batch", "name", "role", "part", "signal", "error", "noise", "snr", "ratio", "low", "high", "free"]
    found = Findings(
        tables={"parameters": points[names], "kinds": kinds, "sides": sides, "cuts": cuts},
        display_tables={"kinds": _kinds_table(kinds), "trapped_or_free": _cuts_table(cuts)},
        how_to_read=_HOW_TO_READ,
        unit="SNRs (means), ratios (geometric means) and shares with 95 % intervals",
    )
    if len(points):
        found.figures = {"signal_to_noise": motion_against_snr(points, sides, cuts)}
        found.captions = {"signal_to_noise": _CAPTION}
    if unresolved := int((points["signal"] < 2 * points["error"]).sum()):
        found.warnings = [f"{unresolved} of {len(points)} signals lie less than two standard errors above 0"]
    return evidence.with_verdicts(found, _verdicts(evidence.runs, points))


def _points(evidence: Evidence) -> pd.DataFrame:
    """A row for each parameter of a completed run: signal with its standard error, noise, snr, ratio, side, free.

    Low and high are the ratios between which it is not free.
    """
    every = p.parameters(evidence, "signal", "noise", "moved", "noise_moved")
    read = every.dropna(subset=["signal", "noise"])
    late = read[read["step"] >= read.groupby("cell")["step"].transform("max") / 2]
    key = ["cell", "name", "part"]
    means = late.groupby(key).agg(signal=("signal", "mean"), error=("signal", "sem"), noise=("noise", "mean"))
    points = p.beside_noise(every).drop(columns=["signal", "noise"]).merge(means, on=key)
    points["batch"] = points[_BATCH]
    points["snr"] = points["batch"] * points["signal"] / points["noise"]
    record = evidence.record(_ARM)  # of any batch size: the model is one
    bands = [noise_band(p.entries(record, row.name, row.role, row.part)) for row in rows(points)]
    points[["low", "high"]] = np.array(bands).reshape(-1, 2)
    points["free"] = ~points["ratio"].between(points["low"], points["high"])
    points["side"] = np.where(points["kind"].isin(p.MATRICES), "matrices", "vectors")
    return points


def _verdicts(runs: pd.DataFrame, points: pd.DataFrame) -> Iterator[Verdict]:
    sizes = sorted(runs[_BATCH].unique())
    seeds = [seed for seed, group in runs.groupby("seed") if group[_BATCH].nunique() == len(sizes)]
    lost = set(runs.loc[runs["final_loss"].isna(), "seed"])
    by_seed = [points[(points["seed"] == seed) & (seed not in lost)] for seed in seeds]

    signal = "The more signal a gradient has, the farther from noise its parameter moves"
    statistic = "rank correlation of SNR and |log(moved / noise's moved)| over {} and batch sizes"
    yield judge(signal, statistic.format("parameters"), [_rank_correlation(group) for group in by_seed], ABOVE_0)
    matrices = [_rank_correlation(group[group["side"] == "matrices"]) for group in by_seed]
    yield judge(f"{signal}, among matrices alone", statistic.format("matrices"), matrices, ABOVE_0)
    claim = "Multipliers sum gradients over a matrix, row or column and are less noisy than their matrix, as in sec. 1"
    statistic = "mean SNR of multipliers over that of the matrices that they belong to"
    yield judge(claim, statistic, [_lead(group) for group in by_seed], (1.0, math.inf))
    if len(sizes) > 1:
        shares = [group.groupby("batch")["free"].mean().reindex(sizes) for group in by_seed]
        freed = [share.iloc[-1] - share.iloc[0] for share in shares]
        statistic = f"share of parameters that are free, batch size {sizes[-1]} - {sizes[0]}"
        yield judge("A larger batch frees parameters from noise", statistic, freed, ABOVE_0)


def _rank_correlation(points: pd.DataFrame) -> float:
    """Spearman's."""
    return float(points["snr"].rank().corr(np.log(points["ratio"]).abs().rank()))


def _lead(points: pd.DataFrame) -> float:
    """Ratio of means, not mean of ratios: single SNRs may be negative, and those of vectors have larger errors."""
    matrices = points[points["part"] == "weight"]
    pairs = points[points["kind"].isin(p.MULTIPLIERS)].merge(matrices, on=["cell", "name"], suffixes=("", "_matrix"))
    return float(pairs["snr"].mean() / pairs["snr_matrix"].mean())


def best_cut(points: pd.DataFrame) -> tuple[float, float, float]:
    """SNR that best splits parameters into trapped (below) and free, share that it misplaces, and share without it.

    The SNR is NaN where no cut misplaces fewer than calling all parameters the same does.
    """
    ordered = points.sort_values("snr")
    snr, free = ordered["snr"].clip(lower=_FLOOR).to_numpy(float), ordered["free"].to_numpy(bool)
    below = np.arange(1, len(snr))  # how many lie below a cut
    wrong = np.cumsum(free)[:-1] + (~free).sum() - np.cumsum(~free)[:-1]
    apart = snr[1:] > snr[:-1]
    without = min(free.sum(), (~free).sum())
    best = min(wrong[apart], default=without)
    if best >= without:
        return math.nan, without / len(snr), without / len(snr)
    at = below[apart & (wrong == best)]
    return math.exp(np.log(snr[at] * snr[at - 1]).mean() / 2), best / len(snr), without / len(snr)


def _cuts(points: pd.DataFrame) -> pd.DataFrame:
    made = [(side, seed, *best_cut(group)) for (side, seed), group in points.groupby(["side", "seed"])]
    return pd.DataFrame(made, columns=["side", "seed", "snr", "wrong", "wrong_without"])


def _by_batch(points: pd.DataFrame, group: str) -> pd.DataFrame:
    """Mean SNR, geometric mean ratio and share free of the parameters of a group at a batch size; means over seeds."""
    by = [group, "batch", "seed"]
    means = points.groupby(by).agg(snr=("snr", "mean"), ratio=("ratio", p.geometric_mean), free=("free", "mean"))
    return means_over_seeds(means.reset_index().melt(by, var_name="measure"), [group, "batch", "measure"], "value")


def _kinds_table(kinds: pd.DataFrame) -> pd.DataFrame:
    titles, cells = {"snr": "SNR", "ratio": "moved over noise", "free": "share free"}, []
    for row in rows(kinds):
        keys = {"parameters": row.kind, "batch size": str(row.batch)}
        cells.append((keys, titles[row.measure], spanned(row.value, row.low, row.high)))
    return wide_table(cells)


def _cuts_table(cuts: pd.DataFrame) -> pd.DataFrame:
    cells = []
    for side, group in cuts.groupby("side"):
        found = np.log(group["snr"].dropna())
        wrong, without = (mean_interval(group[name]) for name in ("wrong", "wrong_without"))
        cells.append(
            {
                "parameters": str(side),
                "SNR at the cut": spanned(*np.exp(mean_interval(found))),
                "seeds with a cut": f"{len(found)} of {len(group)}",
                "misplaced": spanned(*wrong),
                "misplaced without": spanned(*without),
            }
        )
    return pd.DataFrame(cells)


@styled
def motion_against_snr(points: pd.DataFrame, sides: pd.DataFrame, cuts: pd.DataFrame) -> Figure:
    """Ratio of moved against SNR, for matrices and for vectors, and the share that is free against batch size.

    Args:
        points: a row a parameter of a run: side, kind, name, part, batch, snr, ratio, low, high (of ratios like noise).
        sides: mean and interval of the share that is free: side, batch, measure, value, low, high.
        cuts: SNR between trapped and free for each side and seed, NaN for none.
    """
    figure, axes = panel_grid(1, 3, 3.2)
    sizes = sorted(points["batch"].unique())
    markers = {size: _MARKERS[number % len(_MARKERS)] for number, size in enumerate(sizes)}
    over_seeds = points.groupby(["side", "kind", "batch", "name", "part", "low", "high"])
    drawn = over_seeds.agg(snr=("snr", "mean"), ratio=("ratio", p.geometric_mean)).reset_index()
    drawn["snr"] = drawn["snr"].clip(lower=_FLOOR)
    for ax, side in zip(axes[0], _SIDES, strict=False):
        _scatter(ax, drawn[drawn["side"] == side], markers)
        if len(found := cuts.loc[cuts["side"] == side, "snr"].dropna()):
            ax.axvline(p.geometric_mean(found), **_CUT)
        ax.set(xscale="log", title=side, xlabel="SNR of the batch's gradient")
        ax.set_xlim(drawn["snr"].min() / 1.5, drawn["snr"].max() * 1.5)
        ax.set_ylim(drawn["ratio"].min() / 1.3, drawn["ratio"].max() * 1.3)
        log_y(ax)
    axes[0, 0].set_ylabel("moved / noise's moved")
    right, free = axes[0, 2], sides[sides["measure"] == "free"].sort_values("batch")
    for side, look in _SIDES.items():
        line = free[free["side"] == side]
        draw_means(right, line["batch"], line, "value", look)
    against_width(right, points["batch"])
    right.set(ylim=(-0.05, 1.05), title="share that is free", xlabel="batch size (sequences)")
    marks = [(kind, {"color": p.KINDS[kind], "marker": "o", "mfc": "none"}) for kind in p.kinds_drawn(points["kind"])]
    marks += [(f"batch size {size}", {"color": "0.3", "marker": markers[size], "mfc": "none"}) for size in sizes]
    marks += [(f"share of {side}", look) for side, look in _SIDES.items()]
    marks += [("cut", _CUT)] if cuts["snr"].notna().any() else []
    mark_legend(figure, marks)
    return figure


def _scatter(ax: Axes, drawn: pd.DataFrame, markers: dict[Any, str]) -> None:
    for row in rows(drawn):
        look: dict[str, Any] = {"color": p.KINDS[row.kind], "marker": markers[row.batch]}
        ax.plot(row.snr, row.ratio, **look, ls="none", ms=3.5, mew=0.7, mfc="none")
    ax.axhspan(drawn["low"].min(), drawn["high"].max(), color="0.93", lw=0)
    ax.axhspan(drawn["low"].max(), drawn["high"].min(), color="0.85", lw=0)

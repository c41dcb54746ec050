"""Norms of matrices and multipliers beside pure noise under the same optimizer (arXiv:2601.04890 fig. 1 bottom left).

The paper: matrices coincide with the Brownian reference under strong weight decay and come close to it under weak
decay; multipliers do not resemble it. Arms are the strengths of decay. The deviation of a run from noise is the mean
|ln(norm / noise norm)| over its hidden matrices, in which those above and below do not cancel, and exp of it the
typical factor. "Coincide" is read as a factor below 1.1, the tolerance of `lit-mult brownian`; "come close" as below a
third more, as a shorter time in units of 1 / (lr * decay) leaves more of what was learned early.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Figure, log_y, mark_legend, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.evidence import parameters as p
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name, rows
from lit_mult.analysis.seeds import means_over_seeds, paired
from lit_mult.analysis.tables import spanned, wide_table
from lit_mult.analysis.verdict import ABOVE_0, Verdict, judge
from lit_mult.diagnostics.noise_band import TOLERANCE
from lit_mult.registry.roles import Role

_CAPTION = (
    "Norms over training, as in fig. 1 bottom left of arXiv:2601.04890: of matrices (above), and of multipliers and "
    "RMSNorm weights (below). A thin line is one matrix or vector, mean over seeds. Dashed: their references, the "
    "same optimizer, schedule, decay and start on gradients that are pure noise, a line for each that differs. Under "
    "Muon the embedding, the LM head and all vectors are AdamW's."
)
_HOW_TO_READ = """\
- *Norm over noise* is the ratio of norms at the end, of the parameter and of its Brownian reference. *Moved over noise*
  compares the decayed sums of all updates, so leaves out the start, of which decay has kept most in multipliers and
  RMSNorm weights. 1: like noise; above, gradients agree over steps; below, the loss pulls the parameter back.
- Ratios are geometric means over the matrices of a role (vectors of a kind) and then means over seeds.
"""
_NOISE: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1.0}
_CLAIMS = {
    "strong": ("Under strong decay the norms of hidden matrices coincide with pure noise", 1 + TOLERANCE),
    "weak": ("Under weak decay the norms of hidden matrices come close to pure noise", 1.33),
}
_FREE = (TOLERANCE, math.inf)
"""More than what counts as noise. By chance a vector of 64 entries deviates by 0.07, so that 0 would test nothing."""
_LINES = list(dict.fromkeys([*(role.value for role in Role), *p.KINDS]))


def findings(evidence: Evidence) -> Findings:
    """Trajectories beside noise, ratios by role, matrices unlike noise, and verdicts for each decay and optimizer."""
    evidence.expect(_CLAIMS, ["optimizer"])
    every = p.parameters(evidence, "rms", "noise_rms", "moved", "noise_moved")
    end = p.beside_noise(every)
    end["norm_ratio"] = end["rms"] / end["noise_rms"]
    ratios = _by_line(end)
    names = ["arm", "optimizer", "seed", "name", "role", "part", "rms", "noise_rms", "norm_ratio", "moved"]
    decays = {str(arm): evidence.record(arm).config["optim"]["weight_decay"] for arm in evidence.runs["arm"].unique()}
    found = Findings(
        tables={"parameters": end[[*names, "noise_moved", "ratio"]], "ratios": ratios},
        display_tables={
            "norm_over_noise": _display(ratios[ratios["measure"] == "norm_ratio"]),
            "moved_over_noise": _display(ratios[ratios["measure"] == "ratio"]),
        },
        figures={"brownian_overlay": trajectories(every, decays)},
        captions={"brownian_overlay": _CAPTION},
        statements={"Hidden matrices unlike noise (norm over noise)": list(_unlike_noise(end))},
        how_to_read=_HOW_TO_READ,
        unit="Ratios to pure noise with 95 % intervals",
    )
    return evidence.with_verdicts(found, _verdicts(_deviations(evidence.runs, end)))


def _deviations(runs: pd.DataFrame, end: pd.DataFrame) -> pd.DataFrame:
    """The runs with mean |ln(norm / noise norm)| of hidden matrices and of multipliers; NaN where a run diverged."""
    deviations = end.assign(deviation=np.abs(np.log(end["norm_ratio"])))
    means = {
        name: deviations[deviations["kind"].isin(kinds)].groupby("cell")["deviation"].mean()
        for name, kinds in {"off_hidden": p.HIDDEN, "off_multipliers": p.MULTIPLIERS}.items()
    }
    return runs.join(pd.DataFrame(means), on="cell")


def _verdicts(runs: pd.DataFrame) -> Iterator[Verdict]:
    deviation = "mean |ln(norm / noise norm)|"
    for (arm, optimizer), group in runs.groupby(["arm", "optimizer"], sort=False):
        name = optimizer_name(str(optimizer))
        claim, below = _CLAIMS[str(arm)]
        statistic = "typical factor between norm and noise norm over hidden matrices"
        yield judge(f"{claim} ({name}), as in fig. 1", statistic, np.exp(group["off_hidden"]), (-math.inf, below))
        claim = f"Multipliers do not resemble noise, unlike matrices ({arm} decay, {name}), as in fig. 1"
        excess = group["off_multipliers"] - group["off_hidden"]
        yield judge(claim, f"{deviation} of multipliers - of hidden matrices", excess, _FREE)
    contrasts = paired(runs, "weak", "strong", ["optimizer", "seed"], "off_hidden")
    for optimizer, group in contrasts.groupby("optimizer", sort=False):
        name = optimizer_name(str(optimizer))
        claim = f"Hidden matrices are closer to noise under strong decay than under weak ({name}), as in fig. 1"
        yield judge(claim, f"{deviation} of hidden matrices, weak - strong decay", group["off_hidden"], ABOVE_0)


def _unlike_noise(end: pd.DataFrame) -> Iterator[str]:
    """Names and ratios of hidden matrices beyond the tolerance, geometric means over seeds."""
    hidden = end[end["kind"].isin(p.HIDDEN)]
    for (arm, optimizer), group in hidden.groupby(["arm", "optimizer"], sort=False):
        ratios = group.groupby("name")["norm_ratio"].agg(p.geometric_mean).sort_values()
        beyond = ratios[np.abs(np.log(ratios)) > math.log1p(TOLERANCE)]
        named = [f"{name} {ratio:.2f}" for name, ratio in beyond.items()]
        where = f"({arm} decay, {optimizer_name(str(optimizer))})"
        counted = f"{len(beyond)} of {len(ratios)} hidden matrices"
        yield f"Outside {100 * TOLERANCE:g} % of noise at the end {where}: {', '.join([counted, *named])}."


def _by_line(end: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of both ratios for each arm, optimizer and role of a matrix, or kind of a vector."""
    line = end["kind"].astype(str).where(end["part"] != "weight", end["role"])
    by = ["arm", "optimizer", "line", "seed"]
    means = end.assign(line=pd.Categorical(line, _LINES)).groupby(by, sort=False, observed=True)
    long = means[["norm_ratio", "ratio"]].agg(p.geometric_mean).reset_index().melt(by, var_name="measure")
    return means_over_seeds(long.sort_values("line", kind="stable"), ["measure", "line", "arm", "optimizer"], "value")


def _display(ratios: pd.DataFrame) -> pd.DataFrame:
    return wide_table(
        ({"parameters": row.line}, f"{row.arm}, {optimizer_name(row.optimizer)}", spanned(row.value, row.low, row.high))
        for row in rows(ratios)
    )


@styled
def trajectories(every: pd.DataFrame, decays: dict[str, float]) -> Figure:
    """Norms over steps beside their references: a column a decay and optimizer, matrices above vectors.

    `decays` are the weight decays of the arms.
    """
    columns = list(every.groupby(["arm", "optimizer"], sort=False))
    figure, axes = panel_grid(2, len(columns), 2.1, sharex=True, sharey="row", xlabel="step")
    for number, ((arm, optimizer), column) in enumerate(columns):
        is_matrix = column["kind"].isin(p.MATRICES)
        for ax, part in zip(axes[:, number], (column[is_matrix], column[~is_matrix]), strict=True):
            for (kind, _, _), line in part.groupby(["kind", "name", "part"]):
                norm = line.groupby("step")["rms"].mean()
                ax.plot(norm.index, norm, color=p.KINDS[str(kind)], lw=0.8)
            noise = part.pivot_table("noise_rms", "step", ["name", "part"]).T.drop_duplicates()
            ax.plot(noise.columns, noise.T, **_NOISE)
        axes[0, number].set_title(f"{arm} decay ({decays[str(arm)]:g})\n{optimizer_name(str(optimizer))}")
    for ax, label in zip(axes[:, 0], ("‖W‖ of matrices", "‖·‖ of vectors"), strict=True):
        ax.set_ylabel(label)
        log_y(ax)
    drawn = [(kind, {"color": p.KINDS[kind], "ls": "-"}) for kind in p.kinds_drawn(every["kind"])]
    mark_legend(figure, [*drawn, ("pure noise", _NOISE)])
    return figure

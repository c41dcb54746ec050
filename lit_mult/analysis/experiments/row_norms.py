"""Distribution of the norms of matrix rows, with and without learnable vectors (arXiv:2601.04890 fig. 3)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name
from lit_mult.analysis.seeds import Floats, geometric_means, mean_logs, means_over_seeds, paired
from lit_mult.analysis.style import Figure, line_styles, panel_grid, styled
from lit_mult.analysis.tables import means_table, number
from lit_mult.analysis.verdict import judge

_ARMS = ("none", "vectors")
_GROUPS = {"attention-in": ["q_proj", "k_proj", "v_proj"], "MLP gate": ["gate_proj"]}
LEVELS = {f"row_norm_q{level}": level / 100 for level in (0, 5, 25, 50, 75, 95, 100)}
_BROADER = (1.0, math.inf)
# "Much" is no number in the paper; a distribution that is less than twice as broad would hardly be called so.
_MUCH_BROADER = (2.0, math.inf)
_BINS = 100
_CAPTION = """\
Density of row norms of effective matrices over the mean of their matrix, at the end of training, as in fig. 3 of the \
paper. Each matrix's distribution is known by seven quantiles, between which its density is constant in log(norm); \
drawn is the mean of these densities over layers, matrices and seeds, without bars, from the smallest 5 % quantile of \
any matrix on."""
_HOW_TO_READ = """\
- The breadth of a distribution is the standard deviation of ln(row norm) within a matrix; breadths are geometric means
  over layers and matrices, and ratios those of the two arms at equal seed. Rows that die out, with norms near 0, count
  for much in it, in either arm.
"""


def findings(evidence: Evidence) -> Findings:
    """How much broader vectors make the distribution of row norms, by role and for the groups of the paper."""
    evidence.expect(_ARMS, ["optimizer"])
    ends = evidence.at_end("row_norm_log_std", *LEVELS)
    breadths = ends[ends["quantity"] == "row_norm_log_std"]
    breadths = breadths.assign(log=np.log(breadths["value"]))
    ratios = paired(breadths, "vectors", "none", ["optimizer", "role", "name", "seed"], "log")
    by_role = geometric_means(mean_logs(breadths, ["optimizer", "role", "arm", "seed"]), ["optimizer", "role", "arm"])
    arms = by_role.set_index(["optimizer", "role", "arm"])["value"].unstack("arm", sort=False).reindex(columns=_ARMS)
    ratio = mean_logs(ratios, ["optimizer", "role", "seed"])
    ratio = means_over_seeds(ratio.assign(ratio=np.exp(ratio["log"])), ["optimizer", "role"], "ratio")
    breadth = arms.reset_index().merge(ratio)
    verdicts = []
    for group, roles in _GROUPS.items():
        for optimizer, chosen in ratios[ratios["role"].isin(roles)].groupby("optimizer", sort=False):
            by_seed = np.exp(mean_logs(chosen, ["seed"])["log"])
            where, statistic = f"({group}, {optimizer_name(str(optimizer))})", "Breadth with vectors / without"
            for much, within in (("", _BROADER), ("much ", _MUCH_BROADER)):
                claim = f"With vectors the distribution of row norms becomes {much}broader, as in fig. 3 {where}"
                verdicts.append(judge(claim, statistic, by_seed, within))
    found = Findings(
        tables={"breadth": breadth},
        display_tables={"breadth": _display(breadth)},
        figures={"row_norms": _figure(ends)},
        captions={"row_norms": _CAPTION},
        how_to_read=_HOW_TO_READ,
        unit="Breadths are standard deviations of ln(row norm)",
    )
    return evidence.with_verdicts(found, verdicts)


def _display(breadth: pd.DataFrame) -> pd.DataFrame:
    shown = breadth.assign(
        optimizer=breadth["optimizer"].map(optimizer_name), **{arm: breadth[arm].map(number) for arm in _ARMS}
    )
    return means_table(
        shown.rename(columns={"ratio": "vectors / none"}), ["optimizer", "role", *_ARMS, "vectors / none"]
    )


@styled
def _figure(ends: pd.DataFrame) -> Figure:
    drawn = [role for roles in _GROUPS.values() for role in roles]
    quantiles = ends[ends["quantity"].isin(LEVELS) & ends["role"].isin(drawn)].dropna(subset="value")
    # A dead row has next to no norm: from the smallest norm on, the panels would be mostly empty.
    smallest = quantiles.loc[quantiles["quantity"] == "row_norm_q5", "value"].min()
    edges = np.linspace(np.log(smallest), np.log(quantiles["value"].max()), _BINS + 1)
    optimizers = list(ends["optimizer"].unique())
    labels = {"xlabel": "row norm / mean of the matrix", "ylabel": "density in ln(norm)"}
    figure, axes = panel_grid(len(optimizers), len(_GROUPS), 2.2, width=7.0, sharex=True, sharey="row", **labels)
    styles = line_styles(_ARMS)
    for optimizer, across in zip(optimizers, axes, strict=True):
        for (group, roles), ax in zip(_GROUPS.items(), across, strict=True):
            chosen = quantiles[(quantiles["optimizer"] == optimizer) & quantiles["role"].isin(roles)]
            for arm, matrices in chosen.groupby("arm"):
                colour = styles[str(arm)]["color"]
                mean = density(matrices, edges)
                ax.stairs(mean, np.exp(edges), color=colour, lw=1.3, label=arm)
                ax.stairs(mean, np.exp(edges), color=colour, fill=True, alpha=0.15)
            ax.set_title(f"{group}, {optimizer_name(optimizer)}")
            ax.set_xscale("log", base=2)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def density(quantiles: pd.DataFrame, edges: Floats) -> Floats:
    """Mean density over matrices in bins of ln(norm), from the quantiles of each."""
    by_matrix = quantiles.pivot(index=["cell", "name"], columns="quantity", values="value")[list(LEVELS)]
    below = [np.interp(edges, np.log(of_matrix), list(LEVELS.values())) for of_matrix in by_matrix.to_numpy(float)]
    return np.asarray(np.diff(np.mean(below, axis=0)) / np.diff(edges))

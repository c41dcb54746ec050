"""Distribution of the norms of matrix rows, with and without learnable vectors (arXiv:2601.04890 fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from lit_mult.analysis.drawing import Figure, line_styles, panel_grid, styled
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import optimizer_name
from lit_mult.analysis.seeds import Floats, geometric_means, mean_interval, mean_logs, means_over_seeds, paired
from lit_mult.analysis.tables import means_table, number, spanned
from lit_mult.analysis.verdict import Verdict, judge

_ARMS = ("none", "vectors")
_MATRIX = ["optimizer", "role", "name"]
_IQR, _STD = "interquartile range", "row_norm_log_std"
_GROUPS = {"attention-in": ["q_proj", "k_proj", "v_proj"], "MLP gate": ["gate_proj"]}
LEVELS = {f"row_norm_q{level}": level / 100 for level in (0, 5, 25, 50, 75, 95, 100)}
_LOW, _HIGH = "row_norm_q25", "row_norm_q75"
_IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal distribution over its standard deviation: so the two breadths compare."""
_DEAD = 0.01
"""Norm over the mean of the matrix below which a row is dead. The logarithms of a few such rows make most of a standard
deviation, and quartiles do not feel them while they are fewer than a quarter."""
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
- The breadth of a distribution is the interquartile range of ln(row norm) within a matrix over 1.349, which of a normal
  distribution is its standard deviation; breadths are geometric means over layers and matrices, and ratios those of the
  two arms at equal seed. By the standard deviation itself, given beside it, rows that die out count for much.
- A row is *dead* whose norm is below {dead:g} of the mean of its matrix. Shares of dead rows are means over layers,
  matrices and seeds, each read off seven quantiles, between which the density is taken as constant in log(norm). Where
  more than a quarter of the rows of a matrix are dead, its interquartile range has dead rows in it, too.
"""


def findings(evidence: Evidence) -> Findings:
    """How much broader vectors make the distribution of row norms, by role and for the groups of the paper."""
    evidence.expect(_ARMS, ["optimizer"])
    ends = evidence.at_end(_STD, *LEVELS)
    breadths = _breadths(ends)
    ratios = {name: paired(breadths, "vectors", "none", [*_MATRIX, "seed"], name) for name in (_IQR, _STD)}
    breadth = _by_role(breadths.assign(log=breadths[_IQR]), ratios[_IQR])
    by_std = _by_role(breadths.assign(log=breadths[_STD]), ratios[_STD])
    found = Findings(
        tables={"breadth": breadth, "breadth_by_standard_deviation": by_std, "dead_rows": _dead(ends)},
        display_tables={"breadth": _display(breadth), "breadth_by_standard_deviation": _display(by_std)},
        figures={"row_norms": _figure(ends)},
        captions={"row_norms": _CAPTION},
        statements={"Dead rows": list(_dead_sentences(ends))},
        how_to_read=_HOW_TO_READ.format(dead=_DEAD),
        unit="Breadths are of ln(row norm)",
    )
    return evidence.with_verdicts(found, _verdicts(ratios))


def _breadths(ends: pd.DataFrame) -> pd.DataFrame:
    """Columns optimizer, role, name, arm, seed, and the log of the two breadths of each matrix."""
    wide = ends.pivot(index=[*_MATRIX, "arm", "seed"], columns="quantity", values="value").rename_axis(columns=None)
    iqr = np.log(wide[_HIGH] / wide[_LOW]) / _IQR_OF_NORMAL
    return pd.DataFrame({_IQR: np.log(iqr), _STD: np.log(wide[_STD])}).reset_index()


def _by_role(breadths: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """Breadth of each arm by optimizer and role, and the ratio of the two; from logarithms."""
    by_role = geometric_means(mean_logs(breadths, ["optimizer", "role", "arm", "seed"]), ["optimizer", "role", "arm"])
    arms = by_role.set_index(["optimizer", "role", "arm"])["value"].unstack("arm", sort=False).reindex(columns=_ARMS)
    ratio = mean_logs(_logs(ratios), ["optimizer", "role", "seed"])
    ratio = means_over_seeds(ratio.assign(ratio=np.exp(ratio["log"])), ["optimizer", "role"], "ratio")
    return arms.reset_index().merge(ratio)


def _logs(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(columns={_IQR: "log", _STD: "log"})


def _verdicts(ratios: Mapping[str, pd.DataFrame]) -> Iterator[Verdict]:
    for group, roles in _GROUPS.items():
        chosen = {name: _logs(table[table["role"].isin(roles)]) for name, table in ratios.items()}
        for optimizer, judged in chosen[_IQR].groupby("optimizer", sort=False):
            by_seed = np.exp(mean_logs(judged, ["seed"])["log"])
            of_optimizer = chosen[_STD]["optimizer"] == optimizer
            by_std = np.exp(mean_logs(chosen[_STD][of_optimizer], ["seed"])["log"])
            where = f"({group}, {optimizer_name(str(optimizer))})"
            statistic = "Breadth with vectors / without, by the interquartile range of ln(row norm) (by its standard "
            statistic += f"deviation: {spanned(*mean_interval(by_std))})"
            for much, within in (("", _BROADER), ("much ", _MUCH_BROADER)):
                claim = f"With vectors the distribution of row norms becomes {much}broader, as in fig. 3 {where}"
                yield judge(claim, statistic, by_seed, within)


def _dead(ends: pd.DataFrame) -> pd.DataFrame:
    """Columns optimizer, role, name, arm, seed, dead: share of the rows of a matrix, interpolated between quantiles."""
    wide = ends.pivot(index=[*_MATRIX, "arm", "seed"], columns="quantity", values="value")[list(LEVELS)]
    with np.errstate(divide="ignore"):  # a row of norm 0
        logs = np.log(wide.dropna().to_numpy(float))
    levels = list(LEVELS.values())
    shares = [float(np.interp(math.log(_DEAD), of_matrix, levels, left=0.0)) for of_matrix in logs]
    return wide.dropna().index.to_frame(index=False).assign(dead=shares)


def _dead_sentences(ends: pd.DataFrame) -> Iterator[str]:
    """Share of dead rows and of matrices with more than a quarter of them, a sentence a group and optimizer."""
    dead = _dead(ends)
    for group, roles in _GROUPS.items():
        for optimizer, here in dead[dead["role"].isin(roles)].groupby("optimizer", sort=False):
            said = []
            for arm, matrices in here.groupby("arm", sort=False):
                many = f"more than a quarter in {(matrices['dead'] > 0.25).sum()} of {len(matrices)} matrices"
                said.append(f"{matrices['dead'].mean():.1%} of the rows of {arm} ({many})")
            yield f"{group}, {optimizer_name(str(optimizer))}: dead are about {'; '.join(said)}."


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
    figure, axes = panel_grid(len(optimizers), len(_GROUPS), 2.2, wide=True, sharex=True, sharey="row", **labels)
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

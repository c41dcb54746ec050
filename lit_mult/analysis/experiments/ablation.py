"""How much of muP's tuned multipliers is needed, with learnable vectors and without (arXiv:2601.04890 fig. 7).

Each arm stands at its best learning rate, that of the lowest mean loss over seeds, in every tier and optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lit_mult.analysis import drawing
from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import best_rates, load_curves, optimizer_name, rows
from lit_mult.analysis.seeds import difference, means_along_steps, means_over_seeds, paired
from lit_mult.analysis.tables import means_table, power_of_two, signed
from lit_mult.analysis.verdict import ABOVE_0, BELOW_0, Verdict, judge
from lit_mult.schema import NEGLIGIBLE, RunRecord

_TIER = "parametrization.tier"
_TIERS = ("NONE", "LR", "LRWD", "FULL")
_POINT = ["optimizer", _TIER, "seed"]
_HOW_TO_READ = """\
- *Tier*: how much of the tuned preset is used: nothing, learning rates, decays too, forward multipliers too. The *gap*
  is the loss of `vectors` minus that of `fixed`, at equal seed; below 0, the multipliers help.
- The best rate is chosen on the seeds that it is judged by, which flatters both arms alike.
"""
_CAPTIONS = {
    "tiers": "Final validation loss at the best learning rate of each point by tier, as in fig. 7 of the paper: means "
    "over seeds with 95 % intervals by Student's t.",
    "gap": "Loss of vectors minus that of fixed along training, each at its best learning rate, at equal seed; bands "
    "are 95 % intervals of the mean over seeds by Student's t. From the dashed line on, the learning rate decays. As"
    " in fig. 7 of the paper.",
}


def findings(evidence: Evidence) -> Findings:
    """What do learnable vectors add to tuned multipliers, and can they stand in for them?"""
    evidence.expect(["fixed", "vectors"], ["optimizer", _TIER, "optim.lr"])
    runs = evidence.runs.assign(optimizer=evidence.runs["optimizer"].map(optimizer_name))
    runs = runs.assign(rank=runs[_TIER].map(_TIERS.index)).sort_values(["optimizer", "rank"], ignore_index=True)
    best = best_rates(runs)
    gaps, decay_start = _gaps(best), _decay_start(runs)
    point = ["optimizer", _TIER]
    losses = means_over_seeds(best.assign(lr=best["lr"].map(power_of_two)), [*point, "arm", "lr"], "final_loss")
    final_gaps = means_over_seeds(paired(best, "vectors", "fixed", _POINT, "final_loss"), point, "final_loss")
    found = Findings(
        tables={"best": best[["arm", *_POINT, "lr", "final_loss"]], "gaps": gaps},
        display_tables={
            "best_losses": means_table(losses, [*point, "arm", "lr", "final_loss"]),
            "vectors_minus_fixed": means_table(final_gaps, [*point, "final_loss"], signed),
        },
        figures={"tiers": _tiers_figure(runs, best, arm_labels(runs)), "gap": _gap_figure(gaps, decay_start)},
        captions=_CAPTIONS,
        warnings=list(_edges(runs, best)),
        how_to_read=_HOW_TO_READ,
        unit="Losses in nats per token",
    )
    return evidence.with_verdicts(found, _verdicts(best, gaps, decay_start))


def _gaps(best: pd.DataFrame) -> pd.DataFrame:
    """Loss of vectors minus that of fixed at each validation, at equal optimizer, tier and seed."""
    curves = load_curves(best).merge(best[["path", "arm", "optimizer", _TIER]], on="path")
    return paired(curves[curves["split"] == "val"], "vectors", "fixed", [*_POINT, "step"], "loss")


def _decay_start(runs: pd.DataFrame) -> int:
    """Step at which the decay of the learning rate begins, from the config of a run."""
    config = RunRecord.read(Path(runs["path"].iloc[0])).config
    steps, share = int(config["train"]["steps"]), float(config["schedule"]["decay_fraction"])
    return steps - round(share * steps)


def _edges(runs: pd.DataFrame, best: pd.DataFrame) -> Iterator[str]:
    """Points whose best learning rate is the lowest or the highest tried."""
    ends = runs.groupby(["arm", "setting"])["lr"].agg(["min", "max"])
    for row in rows(best.drop_duplicates(["arm", "setting"]).join(ends, on=["arm", "setting"])):
        if row.lr in (row.min, row.max):
            yield f"best learning rate {power_of_two(row.lr)} at the edge of those tried: {row.label}"


def _verdicts(best: pd.DataFrame, gaps: pd.DataFrame, decay_start: int) -> Iterator[Verdict]:
    for name, here in best.groupby("optimizer"):
        for tier in _TIERS:
            claim = f"Learnable multipliers improve their parent under {name}, tier {tier}, as in fig. 7"
            gap = difference(here[here[_TIER] == tier], "vectors", "fixed", "final_loss")
            yield judge(claim, "best final loss, vectors - fixed, nats per token", gap, BELOW_0)
        points = here.assign(point=here["arm"] + " " + here[_TIER])
        claim = f"Learnable multipliers without tuning equal the tuned baseline under {name}, as in fig. 7"
        statistic = "best final loss, vectors at NONE - fixed at FULL, nats per token"
        statistic += f" ({100 * NEGLIGIBLE:g} % of the perplexity counts as equal)"
        untuned = difference(points, "vectors NONE", "fixed FULL", "final_loss", between="point")
        yield judge(claim, statistic, untuned, (-NEGLIGIBLE, NEGLIGIBLE))
        claim = f"Tuned learning rates still matter with learnable multipliers under {name}, as in fig. 7"
        rates = difference(points, "vectors LR", "vectors NONE", "final_loss", between="point")
        yield judge(claim, "best final loss, vectors at LR - vectors at NONE, nats per token", rates, BELOW_0)
        along = gaps[gaps["optimizer"] == name].groupby(["seed", "step"])["loss"].mean(skipna=False).unstack()
        if along.empty:
            continue
        # The constant stage: from a third of the run, well behind the warmup, to the last validation before the decay.
        steps = along.columns.to_numpy()
        end = steps.max()
        third, before = steps[steps >= end / 3].min(), steps[steps <= decay_start].max()
        gap_at = "mean over tiers of vectors - fixed, at step {} - at step {}, nats per token"
        if third < before:
            claim = f"The gap grows while the learning rate is constant under {name}, as in fig. 7"
            yield judge(claim, gap_at.format(before, third), along[before] - along[third], BELOW_0)
        claim = f"The gap shrinks in the decay of the learning rate under {name}, as in fig. 7"
        yield judge(claim, gap_at.format(end, before), along[end] - along[before], ABOVE_0)


@drawing.styled
def _tiers_figure(runs: pd.DataFrame, best: pd.DataFrame, labels: dict[str, str]) -> drawing.Figure:
    """A panel an optimizer, a line an arm: best final loss against the tier."""
    styles, optimizers = drawing.arm_styles(runs), sorted(runs["optimizer"].unique())
    xlabel, ylabel = "tuned multipliers in use", f"best {drawing.LOSS}"
    figure, axes = drawing.panel_grid(1, len(optimizers), 2.4, sharey=True, xlabel=xlabel, ylabel=ylabel)
    for optimizer, ax in zip(optimizers, axes[0], strict=True):
        means = means_over_seeds(best[best["optimizer"] == optimizer], ["arm", "rank"], "final_loss")
        for shift, (arm, look) in zip((-0.04, 0.04), styles.items(), strict=False):  # lest bars overlap
            line = means[means["arm"] == arm]
            drawing.draw_means(ax, line["rank"] + shift, line, "final_loss", look)
        ax.set_xticks(range(len(_TIERS)), _TIERS)
        ax.set(title=optimizer, xlim=(-0.4, len(_TIERS) - 0.6))
    drawing.add_legend(figure, runs, styles, labels=labels)
    return figure


@drawing.styled
def _gap_figure(gaps: pd.DataFrame, decay_start: int) -> drawing.Figure:
    """A row an optimizer, a column a tier: the gap along training, from the first validation behind step 0 on."""
    optimizers, tiers = gaps["optimizer"].unique(), gaps[_TIER].unique()
    ylabel, down, across = "loss, vectors - fixed\n(nats per token)", max(len(optimizers), 1), max(len(tiers), 1)
    figure, axes = drawing.panel_grid(
        down, across, 1.5, sharex=True, sharey=True, xlabel="optimizer step", ylabel=ylabel
    )
    look, mark = drawing.line_styles(["gap"])["gap"], {"color": "0.3", "ls": "--", "lw": 0.8}
    means = means_along_steps(gaps[gaps["step"] > 0], ["optimizer", _TIER], "loss")
    for optimizer, row in zip(optimizers, axes, strict=False):
        for tier, ax in zip(tiers, row, strict=True):
            line = means[(means["optimizer"] == optimizer) & (means[_TIER] == tier)]
            drawing.draw_band(ax, line["step"], line, "loss", look)
            ax.axhline(0, color="0.3", lw=0.8)
            ax.axvline(decay_start, **mark)
            ax.set_title(f"{optimizer}, {tier}")
    return figure

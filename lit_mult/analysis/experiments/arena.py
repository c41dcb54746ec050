"""The arena: contestants that fix the same flaw, the norm of a matrix set by lr and weight decay, each at its best.

Every contestant is an arm with a search space of its own and as many trials as the others, and is judged on seeds that
chose nothing. The baseline is the arm AdamW. A claim is judged where its arms are there; further arms are ranked alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from lit_mult.analysis import cost, drawing, sensitivity, speedup
from lit_mult.analysis.compare import step_costs
from lit_mult.analysis.comparison import warnings_of
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import judging, rows
from lit_mult.analysis.questions import answers, answers_table
from lit_mult.analysis.seeds import mean_interval
from lit_mult.analysis.styles import scale
from lit_mult.analysis.tables import drift_table, interval, number, power_of_two, scientific, signed, spanned
from lit_mult.analysis.verdict import BELOW_0, Verdict, judge
from lit_mult.errors import UserError
from lit_mult.method.regime import BALANCED
from lit_mult.schema import NEGLIGIBLE, Question

BASELINE = "AdamW"
_HOW_TO_READ = """\
- *Trials* are the values of the search space that were tried, on the seeds that only choose; *cost* counts all of them
  and one run at the best. A best rate at the edge of those that were tried has a warning.
- *Speed-up* is N / n where a contestant needs n of the baseline's N steps to reach its final loss, on validation
  curves, which understate it: a curve falls with the learning rate at the end.
- *At* are the values at which it is judged. *Sensitivity* to the learning rate is over as many octaves as stand beside
  it, on the seeds that choose: compare it at equal octaves.
- *Resolved* is the half width of the interval of the difference: smaller ones cannot be told from 0 here.
"""
_CAPTIONS = {
    "contestants": "Every contestant at its best against AdamW at its best, at equal seed: difference of the final "
    "loss, speed-up, and seconds of a step. Means over the seeds that judge, with 95 % intervals by Student's t.",
    "loss_vs_cost": "Loss on the seeds that judge against the seconds of the whole search and one run at its "
    "best, on the machine of the study and whatever else it did; bars are 95 % intervals by Student's t.",
}


@dataclass(frozen=True)
class _Claim:
    """What a publication says of two contestants."""

    text: str
    of: str
    against: str
    measure: Literal["loss", "speedup", "drift"] = "loss"
    within: tuple[float, float] = BELOW_0
    decays: bool = True
    """Whether it is about runs long enough for decay and noise to balance."""


_CLAIMS = (
    _Claim("Learnable vectors beat a tuned AdamW (arXiv:2601.04890)", "AdamW-vectors", "AdamW"),
    _Claim("They add to Muon (arXiv:2601.04890 table 2)", "Muon-vectors", "Muon"),
    _Claim("AdamW with vectors equals Muon without", "AdamW-vectors", "Muon", within=(-NEGLIGIBLE, NEGLIGIBLE)),
    _Claim(
        "Hyperball needs a fifth fewer tokens than AdamW (arXiv:2606.16899)",
        "Hyperball",
        "AdamW",
        "speedup",
        (1.25, math.inf),
    ),
    _Claim(
        "Hyperball needs a fifth fewer tokens than Muon, on Muon (arXiv:2606.16899)",
        "Muon-Hyperball",
        "Muon",
        "speedup",
        (1.25, math.inf),
    ),
    _Claim(
        "Hyperball's best rate moves by at most 1.4 over widths (arXiv:2606.16899)",
        "Hyperball",
        "Hyperball",
        "drift",
        (-math.log2(1.4), math.log2(1.4)),
        decays=False,
    ),
    _Claim("MD beats a tuned AdamW (arXiv:2606.25971)", "MD", "AdamW"),
    _Claim("MD on Muon beats a tuned Muon (arXiv:2606.25971)", "Muon-MD", "Muon"),
    _Claim("Muown beats Muon (arXiv:2605.10797)", "Muown", "Muon"),
    _Claim("NorMuon beats Muon (arXiv:2510.05491)", "NorMuon", "Muon", decays=False),
    _Claim("Corrected decay beats coupled decay (arXiv:2506.02285)", "AdamC", "AdamW"),
    _Claim("Cautious decay beats coupled decay (arXiv:2510.12402)", "AdamW-cautious", "AdamW"),
    _Claim("Weight normalization beats decay alone (arXiv:1602.07868)", "AdamW-weight-norm", "AdamW"),
)


def findings(evidence: Evidence) -> Findings:
    """Which contestant ends lowest, how much sooner it is there, what it costs, and which published claims hold."""
    runs = evidence.runs
    if BASELINE not in set(runs["arm"]):
        raise UserError(
            f"{evidence.folder}: the experiment that the study names needs the arm {BASELINE}, its baseline"
        )
    points = sensitivity.points(runs)
    names = [name for name in runs["arm"].unique() if name != BASELINE]
    asked = [Question(of=name, against=BASELINE, over=[]) for name in names]
    answered, sooner = answers(runs, asked), speedup.speedups(runs, asked)
    steps, bill = step_costs(runs, BASELINE), cost.bill(runs, points, None)
    table, drift = _contestants(runs, points, answered, sooner, steps, bill), sensitivity.optimum_drift(points)
    every_digit = {"against_the_baseline": answered, "speedups": sooner, "steps": steps, "bill": bill, "drift": drift}
    found = Findings(
        tables={"contestants": table} | every_digit,
        display_tables={
            "contestants": _contestants_table(table),
            "against_the_baseline": answers_table(answered),
            "drift": drift_table(drift),
        },
        figures={"contestants": _forest(table), "loss_vs_cost": _against_cost(table)},
        captions=_CAPTIONS,
        statements={"Ranking": list(_ranking(table))},
        warnings=[*_unjudged(points), *warnings_of(runs, points)],
        how_to_read=_HOW_TO_READ,
        unit="Losses in nats per token",
    )
    return evidence.with_verdicts(found, _verdicts(runs, points))


def _contestants(
    runs: pd.DataFrame,
    points: pd.DataFrame,
    answered: pd.DataFrame,
    sooner: pd.DataFrame,
    steps: pd.DataFrame,
    bill: pd.DataFrame,
) -> pd.DataFrame:
    """A row a contestant and width, best loss first: what is in the figure and the table."""
    widths = sorted(runs["d_model"].unique())
    within = {width: f"width {width}" if len(widths) > 1 else "" for width in widths}
    found = []
    for (arm, width), group in runs.groupby(["arm", "d_model"], sort=False):
        own = points[(points["arm"] == arm) & (points["d_model"] == width)]
        losses = own.loc[own["judged"], "best_loss"]
        mean, low, high = mean_interval(losses)
        row = {"arm": arm, "d_model": width, "seeds": len(losses), "loss": mean, "loss_low": low, "loss_high": high}
        searched, judges = group[~group["judged"]], group[group["judged"]]
        row |= {"lr": own["best_lr"].iloc[0], "nuisance": judges["nuisance"].iloc[0] if len(judges) else ""}
        row |= {"sensitivity": own["sensitivity"].mean(), "octaves": np.log2(own["lr_high"] / own["lr_low"]).max()}
        row |= {"trials": len(searched[["lr", "nuisance"]].drop_duplicates())}
        row |= {"diverged": int((group["status"] == "diverged").sum())}
        place = (bill["label"] == group["label"].iloc[0]) & (bill["d_model"] == width)
        spent = bill.loc[place].iloc[0]
        row |= {"flops": float(spent["search_flops"]), "seconds": float(spent["search_seconds"])}
        for name, table, value, key in (
            ("difference", answered.rename(columns={"of": "arm"}), "difference", within[width]),
            ("speedup", sooner.rename(columns={"of": "arm"}), "speedup", within[width]),
            ("step", steps.assign(within=steps["d_model"].map(within)), "ratio", within[width]),
        ):
            here = table[(table["arm"] == arm) & (table["within"] == key)]
            values = here[[value, "low", "high"]].iloc[0] if len(here) else [math.nan] * 3
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))
        found.append(row)
    return pd.DataFrame(found).sort_values(["d_model", "loss"], ignore_index=True)


def _contestants_table(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "contestant": row.arm,
                "width": str(row.d_model),
                "seeds": str(row.seeds),
                "loss": number(row.loss),
                "95 % interval": interval(row.loss_low, row.loss_high, row.seeds),
                f"- {BASELINE}": signed(row.difference),
                "resolved": number((row.difference_high - row.difference_low) / 2),
                "speed-up": spanned(row.speedup, row.speedup_low, row.speedup_high),
                "step": spanned(row.step, row.step_low, row.step_high),
                "at": ", ".join(filter(None, (f"lr {power_of_two(row.lr)}", row.nuisance))),
                "sensitivity": number(row.sensitivity),
                "octaves": f"{row.octaves:.3g}",
                "trials": str(row.trials),
                "cost, FLOPs": scientific(row.flops),
                "diverged": str(row.diverged),
            }
            for row in rows(table)
        ]
    )


def _ranking(table: pd.DataFrame) -> Iterator[str]:
    for width, group in table.groupby("d_model"):
        ranked = ", ".join(f"{row.arm} {number(row.loss)}" for row in rows(group.dropna(subset="loss")))
        yield f"d = {width}, lowest loss first: {ranked}."


def _unjudged(points: pd.DataFrame) -> Iterator[str]:
    judges = points[points["judged"]].groupby("seed").size()
    for (arm, width), group in points.groupby(["arm", "d_model"], sort=False):
        if (found := int(group["judged"].sum())) < max(len(judges), 1):
            yield f"{arm}, d = {width}: {found} of {len(judges)} seeds have judged it"


def _verdicts(runs: pd.DataFrame, points: pd.DataFrame) -> Iterator[Verdict]:
    arms = set(runs["arm"])
    times = judging(runs[runs["arm"] == BASELINE])["decay_times_hidden_low"]
    is_balanced = bool((times >= BALANCED).all())
    for claim in _CLAIMS:
        if not {claim.of, claim.against} <= arms:
            continue
        tested = is_balanced or not claim.decays
        if claim.measure == "drift":
            yield from _drift(claim, points)
        elif claim.measure == "speedup":
            question = Question(of=claim.of, against=claim.against, over=[])
            measured = speedup.by_seed(runs, [question])
            by_seed = np.exp(measured.groupby("seed")["log"].mean())
            said = f"Speed-up of {claim.of} over {claim.against}, on {', '.join(measured['measured_on'].unique())}"
            found = judge(claim.text, said, by_seed, claim.within, tested=tested and len(by_seed) > 0)
            is_bound = "curves" in set(measured["measured_on"])  # from below: it can show a claim, and refute none
            yield replace(found, tested=found.tested and not (is_bound and found.outcome != "reproduced"))
        else:
            differences, is_doubtful = _differences(points, claim)
            said = f"Final loss of {claim.of} - {claim.against}, nats per token, mean over widths"
            yield judge(claim.text, said, differences, claim.within, tested=tested and not is_doubtful)


def _differences(points: pd.DataFrame, claim: _Claim) -> tuple[pd.Series, bool]:
    """Seed that judges -> difference of the best losses, mean over widths; and whether a best rate is doubtful.

    NaN for a seed that some width lacks, or where a run diverged.
    """
    judged = points[points["judged"]].assign(loss=points["best_loss"].where(points["trained"]))
    by_arm = dict(iter(judged.groupby("arm")))
    if not {claim.of, claim.against} <= by_arm.keys():
        return pd.Series(dtype=float), True
    of, against = (by_arm[name].set_index(["d_model", "seed"]) for name in (claim.of, claim.against))
    gaps = (of["loss"] - against["loss"]).unstack("d_model")
    ends = pd.concat([of["at_edge"], against["at_edge"], ~of["complete"], ~against["complete"]])
    return gaps.mean(axis="columns", skipna=False), bool(ends.any())


def _drift(claim: _Claim, points: pd.DataFrame) -> Iterator[Verdict]:
    """Octaves from the best rate at the least width to that at the largest, of each seed that has both."""
    is_usable = points["optimum_lr"].notna() & ~points["optimum_at_edge"]
    own = points[(points["arm"] == claim.of) & is_usable]
    by_width = own.pivot(index="seed", columns="d_model", values="optimum_lr").dropna()
    if len(by_width.columns) > 1 and len(by_width):
        octaves = np.log2(by_width.iloc[:, -1] / by_width.iloc[:, 0])
        ends = f"d = {by_width.columns[0]} to {by_width.columns[-1]}"
        yield judge(claim.text, f"Octaves by which the optimum moves, {ends}", octaves, claim.within)


@drawing.styled
def _forest(table: pd.DataFrame) -> drawing.Figure:
    order = table.groupby("arm")["loss"].mean().sort_values(ascending=False).index
    panels = (
        ("difference", f"loss - {BASELINE}'s\n(nats per token)", 0),
        ("speedup", "speed-up", 1),
        ("step", f"seconds of a step\n/ {BASELINE}'s", 1),
    )
    drawn = [panel for panel in panels if table[panel[0]].notna().any()] or panels[:1]  # of stacks no step is timed
    figure, axes = drawing.panel_grid(1, len(drawn), 0.8 + 0.24 * len(order), sharey=True, wide=True)
    widths = sorted(table["d_model"].unique())
    looks = {
        f"d = {width}": look for width, look in zip(widths, drawing.line_styles(map(str, widths)).values(), strict=True)
    }
    for ax, (name, label, neutral) in zip(axes.flat, drawn, strict=True):
        ax.axvline(neutral, color="0.4", lw=0.8)
        for place, (width, look) in enumerate(zip(widths, looks.values(), strict=True)):
            line = table[(table["d_model"] == width) & table[name].notna()]
            y = [list(order).index(arm) - 0.12 * (place - (len(widths) - 1) / 2) for arm in line["arm"]]
            ends = np.abs(line[[f"{name}_low", f"{name}_high"]].to_numpy(float).T - line[name].to_numpy(float))
            dots = {"color": look["color"], "marker": look["marker"], "ls": "none"}
            ax.errorbar(line[name], y, xerr=np.nan_to_num(ends), elinewidth=0.9, capsize=1.5, **dots)
        ax.set(xlabel=label)
        ax.set_yticks(range(len(order)), order)
    drawing.mark_legend(figure, [(label, look | {"ls": "none"}) for label, look in looks.items()])
    return figure


@drawing.styled
def _against_cost(table: pd.DataFrame) -> drawing.Figure:
    widths = sorted(table["d_model"].unique())
    figure, axes = drawing.panel_grid(
        1, len(widths), 3.4, xlabel="seconds, search included", ylabel=drawing.LOSS, wide=True
    )
    for ax, width in zip(axes.flat, widths, strict=True):
        here = table[(table["d_model"] == width) & table["loss"].notna()]
        drawing.against_compute(ax, here["seconds"].min(), here["seconds"].max())
        ends = np.abs(here[["loss_low", "loss_high"]].to_numpy(float).T - here["loss"].to_numpy(float))
        ax.errorbar(
            here["seconds"], here["loss"], yerr=np.nan_to_num(ends), fmt="o", color="0.35", elinewidth=0.7, ms=3
        )
        height, gap = -math.inf, 0.05 * (here["loss"].max() - here["loss"].min())
        for row in rows(here):
            height = max(row.loss, height + gap)  # from the lowest up, so that labels do not overlap
            line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "relpos": (0, 0.5)}
            place = {"xytext": (1.02, height), "textcoords": ("axes fraction", "data"), "va": "center"}
            ax.annotate(row.arm, (row.seconds, row.loss), fontsize=6 * scale(), arrowprops=line, **place)
        ax.set_title(f"$d$ = {width}")
    return figure

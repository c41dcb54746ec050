"""The part of a report that compares arms at their best learning rate: sensitivity, optima, differences, cost."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from lit_mult.analysis import cost, plots, questions, sensitivity, speedup, tables
from lit_mult.analysis.arms import arm_labels
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import rows
from lit_mult.schema import StudyPlan

_CAPTIONS = {
    "loss_vs_lr": "Final validation loss against learning rate. Bands are 95 % intervals (Student's t) of the mean "
    "over seeds, stars the interpolated optima (mean over seeds; hollow: one at the edge), crosses diverged runs. "
    "Shaded are rates at which lr * weight_decay * steps of hidden matrices stays below 2 in all arms: runs that end "
    "before noise and decay balance.",
    "sensitivity": "Learning-rate sensitivity (arXiv:2309.14322 sec. 2.2) and best loss against width.",
    "answers_along_factors": "The declared questions along the factors that they leave open: mean differences over "
    "seeds with 95 % intervals (Student's t); below 0 the first named is lower. In brackets: lr * weight_decay * steps "
    "of hidden matrices at the best rates of both sides.",
    "adam_vs_muon": "Best loss under AdamW and Muon, and the difference at equal arm, width and seed.",
    "optimum_drift": "Optimal learning rate against width. Slope 0: the optimum transfers across widths.",
    "loss_vs_compute": "Best loss (mean over seeds, 95 % intervals) against the training FLOPs that one seed took, "
    "6 x parameters x tokens: all runs of the search at that width and, at every width in full, the tuning of the "
    "preset. A thin line leads from the search alone to search and tuning; d is the width. An arm whose tuning is not "
    "on record is left out.",
}
_HOW_TO_READ = """\
- *Best loss* is that at the best learning rate (and values of the other nuisance factors): one for all seeds of a line
  and width, of lowest mean over them. Each seed is judged there, not at a minimum of its own.
- *Sensitivity* is the mean over the learning rates of min(loss, initial loss) - the lowest of the seed's losses; a
  diverged run counts as the initial loss. It depends on the range, so it is compared only over equal ranges. *Mean
  loss* is the mean of min(loss, initial loss) over the rates.
- Differences pair runs at equal seed and settings; below 0, the first named is lower. Over all widths, each seed has
  one value, its mean over the widths.
- Intervals are 95 % intervals of Student's t over the seeds: two seeds have one degree of freedom, one seed has no
  interval. Reports made before this rule had percentile bootstraps, which are too narrow (over three seeds they cover
  75 %), and took the minimum over rates of each seed by itself, which favours the flatter curve.
- Declared questions stand in the study file. Their p values are corrected together (Holm); *equivalent* means that the
  interval lies within the margin of the question. All else is exploratory: of twenty comparisons without a difference,
  one is expected to leave 0 out of its interval.
"""
_HOW_TO_READ_COST = """\
- Cost counts, for one seed, every run of the search over nuisance factors, whatever became of it, and the whole study
  that tuned the preset an arm uses. FLOPs are 6 x parameters x training tokens (arXiv:2001.08361); seconds depend on
  the machine.
"""
_EXPLORATORY = "What else the records show (exploratory)"


def comparison(study: StudyPlan | None, runs: pd.DataFrame) -> Findings:
    """Findings on losses and learning rates."""
    points = sensitivity.points(runs)
    summary, drift = sensitivity.summary(points), sensitivity.optimum_drift(points)
    differences, labels = sensitivity.paired_differences(points), arm_labels(runs)
    found = Findings(
        tables={"points": points, "summary": summary, "differences": differences, "drift": drift},
        display_tables={
            "summary": (shown := tables.summary_table(summary)),
            "differences": tables.differences_table(differences),
            "drift": tables.drift_table(drift),
        },
        figures={"loss_vs_lr": plots.loss_vs_lr(runs, points, labels)},
        warnings=list(warnings_of(runs, points)),
        how_to_read=_HOW_TO_READ,
        unit="Losses and differences in nats per token",
        text=tables.to_text(shown),
    )
    if points["sensitivity"].notna().any() or points["d_model"].nunique() > 1:
        found.figures["sensitivity"] = plots.sensitivity(points, labels)
    if not plots.optimizer_pairs(points, differences).empty:
        found.figures["adam_vs_muon"] = plots.adam_vs_muon(points, differences, labels)
    if not drift.empty:
        found.figures["optimum_drift"] = plots.optimum_drift(points, drift)
    if study and study.questions:
        found.tables["answers"] = answered = questions.answers(runs, study.questions)
        found.display_tables["answers"] = questions.answers_table(answered)
        found.answers = list(map(questions.statement, rows(answered)))
        found.warnings += questions.unanswered(answered, study.questions)
        sooner = speedup.speedups(runs, study.questions)
        if not sooner.empty:
            found.tables["speedups"] = sooner
            found.display_tables["speedups"] = tables.speedups_table(sooner)
            found.how_to_read += speedup.HOW_TO_READ
        along = questions.along_factors(runs, study.questions)
        if not along.empty:
            found.tables["answers_along_factors"] = along
            found.figures["answers_along_factors"] = plots.answers_along_factors(along)
    nothing = ["one arm and one optimizer: nothing to compare"]
    found.statements[_EXPLORATORY] = list(explored(differences)) or nothing
    if (runs["study"] != "").any():  # a lone run was no search
        found.tables["bill"] = bill = cost.bill(runs, points, study)
        found.display_tables["bill"] = tables.bill_table(bill)
        if statements := list(cost.statements(bill, points, study)):
            found.statements["Cost"] = statements
        found.how_to_read += _HOW_TO_READ_COST
        if ((bill["total_flops"] > bill["search_flops"]) & bill["best_loss"].notna()).any():  # a tuning to show
            found.figures["loss_vs_compute"] = plots.loss_vs_compute(bill, labels)
    found.captions = {name: _CAPTIONS[name] for name in found.figures}
    return found


def explored(differences: pd.DataFrame) -> Iterator[str]:
    """A sentence for each comparison over all widths (or at the only one), none of which was declared."""
    groups = differences.groupby(["between", "of", "against", "within", "measure"], sort=False)
    compared = [list(rows(group))[-1] for _, group in groups]  # the last row: all widths, where there are several
    for row in compared:
        if row.seeds < 2 or row.measure in sensitivity.WITHOUT_AN_END:  # those are in the table
            continue
        if row.doubtful:
            verdict = f"not compared, as {row.doubtful} of {row.pairs} pairs are doubtful"
        elif row.between == "optimizer" and row.measure != "best_loss":
            verdict = "not compared, as the optima of two optimizers lie at different places of the range"
        elif row.low <= 0 <= row.high:
            verdict = f"no difference shown, none larger than {tables.number(max(-row.low, row.high))}"
        else:
            verdict = f"{row.of} {'lower' if row.high < 0 else 'higher'}"
        width = "all widths" if row.d_model == sensitivity.ALL_WIDTHS else f"d = {row.d_model}"
        where = ", ".join(filter(None, (row.within, width, f"{row.seeds} seeds")))
        span = tables.interval(row.low, row.high, row.seeds)
        asked = f"{sensitivity.MEASURES[row.measure]}, {row.of} - {row.against} ({where})"
        yield f"{asked[0].upper()}{asked[1:]}: {tables.signed(row.difference)}, {span}: {verdict}."
    if single := sum(row.seeds < 2 and row.measure not in sensitivity.WITHOUT_AN_END for row in compared):
        yield f"{single} comparisons rest on {tables.NO_INTERVAL} can be given, so they rank nothing (see the table)."


def warnings_of(runs: pd.DataFrame, points: pd.DataFrame) -> Iterator[str]:
    """What stands against best losses and sensitivities."""
    if diverged := int((runs["status"] == "diverged").sum()):
        yield f"{diverged} of {len(runs)} runs diverged; they count as their initial loss in the sensitivity"
    for name in _names(points[points["at_edge"] & ~points["reference"]]):
        yield f"best rate at the edge of the learning rates, so a better one may lie outside: {name}"
    for (complete, note), group in points[points["note"] != ""].groupby(["complete", "note"]):
        for name in _names(group):
            yield f"{'doubtful or no sensitivity' if complete else 'incomplete, no sensitivity'} ({note}): {name}"
    if points["seed"].nunique() == 1:
        yield f"{tables.NO_INTERVAL} can be given"
    if len(points[["arm", "setting", "d_model"]].drop_duplicates()) * points["seed"].nunique() != len(points):
        yield "not every arm has every seed; differences use the seeds that both sides have"


def _names(points: pd.DataFrame) -> Iterator[str]:
    """The lines of points, with their widths and seeds; one for all widths of equal seeds."""
    for label, line in points.groupby("label", sort=False):
        seeds = line.groupby("d_model", sort=False)["seed"].agg(lambda seeds: ", ".join(map(str, seeds)))
        for those, widths in seeds.groupby(seeds, sort=False):
            yield f"{label}, d = {', '.join(map(str, widths.index))}, seed {those}"

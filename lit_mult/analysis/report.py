"""The report of a study: tables, figures and a page that says what the records show and what stands against it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lit_mult.analysis import cost, plots, sensitivity, style, tables
from lit_mult.analysis.bootstrap import ENOUGH_SEEDS
from lit_mult.analysis.downstream import READING, downstream
from lit_mult.analysis.frame import Study, load_records, read_study, rows
from lit_mult.config import flatten
from lit_mult.errors import UserError
from lit_mult.record import RunRecord

_CAPTIONS = {
    "loss_vs_lr": "Final validation loss against learning rate. Bands are 95 % bootstrap intervals of the mean over "
    "seeds, stars the interpolated optima (mean over seeds; hollow: one at the edge), crosses diverged runs.",
    "sensitivity": "Learning-rate sensitivity (arXiv:2309.14322 sec. 2.2) and best loss against width.",
    "adam_vs_muon": "Best loss under AdamW and Muon, and the difference at equal arm, width and seed.",
    "optimum_drift": "Optimal learning rate against width. Slope 0: the optimum transfers across widths.",
    "loss_vs_compute": "Best loss (mean over seeds, 95 % intervals) against the training FLOPs that one seed took, "
    "6 x parameters x tokens: all runs of the search at that width and, at every width in full, the tuning of the "
    "preset. A thin line leads from the search alone to search and tuning; d is the width. An arm whose tuning is not "
    "on record is left out.",
}
_READING = """\
- *Sensitivity* is the mean over the learning rates of min(loss, initial loss) - best loss; a diverged run counts as
  the initial loss. It depends on the range of learning rates, so it is compared only over equal ranges.
- Differences pair runs at equal seed and settings; below 0, the first named is better.
- Intervals are 95 % percentile bootstraps over seeds, not corrected for the number of comparisons. Over few seeds they
  are too narrow: over three, the interval of a difference spans the three values, so with no true difference it leaves
  out 0 in one comparison of four.
"""
_READING_COST = """\
- Cost counts, for one seed, every run of the search over nuisance factors, whatever became of it, and the whole study
  that tuned the preset an arm uses. FLOPs are 6 x parameters x training tokens (arXiv:2001.08361); seconds depend on
  the machine.
"""
_BY_ROLE = re.compile(r"(parametrization\.(?:forward|lr|weight_decay))(?:\.(\w+))?")
_MEASURES = {
    "best_loss": ("Best loss", "better"),
    "sensitivity": ("Sensitivity", "less sensitive to the learning rate"),
}


@dataclass(frozen=True)
class Report:
    """What `write_report` made."""

    paths: tuple[Path, ...]
    """The files written, report.md last."""
    text: str
    """The summary table, and those of downstream scores, as plain text for a terminal."""
    warnings: tuple[str, ...]
    """What stands against the results, a line each."""


def write_report(folder: Path | str) -> Report:
    """Write `tables/`, `figures/` and `report.md` into the folder of a study (or of a lone run).

    The same records give the same bytes. Files are replaced whole or not at all.

    Raises:
        UserError: there are no records, one is damaged, or the folder cannot be written.
    """
    folder = Path(folder)
    study, runs = read_study(folder), load_records(folder)
    points = sensitivity.points(runs)
    summary, drift = sensitivity.summary(points), sensitivity.optimum_drift(points)
    differences = sensitivity.paired_differences(points)
    csvs = {"points": points, "summary": summary, "differences": differences, "drift": drift}
    shown = {
        "summary": tables.summary_table(summary),
        "differences": tables.differences_table(differences),
        "drift": tables.drift_table(drift),
    }
    figures = {"loss_vs_lr": plots.loss_vs_lr(runs, points)}
    if points["sensitivity"].notna().any() or points["d_model"].nunique() > 1:
        figures["sensitivity"] = plots.sensitivity(points)
    if not plots.optimizer_pairs(points, differences).empty:
        figures["adam_vs_muon"] = plots.adam_vs_muon(points, differences)
    if not drift.empty:
        figures["optimum_drift"] = plots.optimum_drift(points, drift)
    statements: list[str] = []
    if (runs["study"] != "").any():  # a lone run was no search
        csvs["bill"] = bill = cost.bill(runs, points, study)
        shown["bill"], statements = tables.bill_table(bill), list(cost.statements(bill, points, study))
        if ((bill["total_flops"] > bill["search_flops"]) & bill["best_loss"].notna()).any():  # a tuning to show
            figures["loss_vs_compute"] = plots.loss_vs_compute(bill)
    scores = downstream(folder, runs)
    csvs, shown, figures = csvs | scores.csvs, shown | scores.shown, figures | scores.figures
    warnings = (*_warnings(study, runs, points), *scores.warnings)

    files = {f"tables/{name}.csv": tables.to_csv(table).encode() for name, table in csvs.items()}
    files |= {f"tables/{name}.md": tables.to_markdown(table).encode() for name, table in shown.items()}
    for name, figure in figures.items():
        files |= {f"figures/{name}.{ending}": content for ending, content in style.save(figure).items()}
    lists = {
        "What the records show": list(verdicts(differences)) or ["one arm and one optimizer: nothing to compare"],
        **({"Downstream": scores.statements} if scores.statements else {}),
        **({"Cost": statements} if statements else {}),
        "Warnings": list(warnings) or ["none"],
        "Provenance": list(_provenance(study, folder, runs)),
    }
    title = study.title if study else folder.resolve().name
    captions = {name: (_CAPTIONS | scores.captions)[name] for name in figures}
    files["report.md"] = _page(title, lists, captions, shown).encode()
    for name, content in files.items():
        _replace(folder / name, content)
    first = [tables.to_text(shown["summary"])]
    first += [f"{name.replace('_', ' ')} (per cent)\n{tables.to_text(table)}" for name, table in scores.shown.items()]
    return Report(tuple(folder / name for name in files), "\n".join(first), warnings)


def verdicts(differences: pd.DataFrame) -> Iterator[str]:
    """A sentence for each comparison over all widths (or at the only one); none is ranked without an interval."""
    groups = differences.groupby(["between", "of", "against", "within", "measure"], sort=False)
    compared = [list(rows(group))[-1] for _, group in groups]  # the last row: all widths, where there are several
    for row in compared:
        if row.seeds < 2:
            continue
        measure, better = _MEASURES[row.measure]
        if row.doubtful:
            verdict = f"no ranking, as {row.doubtful} of {row.pairs} pairs are doubtful"
        elif row.low <= 0 <= row.high:
            verdict = "no difference shown"
        else:
            verdict = f"**{row.of if row.high < 0 else row.against} is {better}**"
            verdict += " (weak evidence: few seeds)" if row.seeds < ENOUGH_SEEDS else ""
        width = "all widths" if row.d_model == sensitivity.ALL_WIDTHS else f"d = {row.d_model}"
        where = ", ".join(filter(None, (row.within, width, f"{row.seeds} seeds")))
        span = tables.interval(row.low, row.high, row.seeds)
        yield f"{measure}, {row.of} - {row.against} ({where}): {tables.signed(row.difference)}, {span}: {verdict}."
    if single := sum(row.seeds < 2 for row in compared):
        yield f"{single} comparisons rest on {tables.NO_INTERVAL} can be given, so they rank nothing (see the table)."


def _warnings(study: Study | None, runs: pd.DataFrame, points: pd.DataFrame) -> Iterator[str]:
    if study and (planned := int((~runs["added"]).sum())) < study.cells:
        yield f"{planned} of {study.cells} planned runs have a record"
    if runs["study"].nunique() > 1:
        yield f"records of several studies: {', '.join(sorted(runs['study'].unique()))}"
    if diverged := int((runs["status"] == "diverged").sum()):
        yield f"{diverged} of {len(runs)} runs diverged; they count as their initial loss in the sensitivity"
    for place in _places(points[points["at_edge"]]):
        yield f"optimum at the edge of the learning rates, so it may lie outside: {place}"
    for (complete, note), group in points[points["note"] != ""].groupby(["complete", "note"]):
        for place in _places(group):
            yield f"{'doubtful or no sensitivity' if complete else 'incomplete, no sensitivity'} ({note}): {place}"
    if (seeds := points["seed"].nunique()) == 1:
        yield f"{tables.NO_INTERVAL} can be given"
    elif seeds < ENOUGH_SEEDS:
        yield f"{seeds} seeds: intervals over fewer than {ENOUGH_SEEDS} are too narrow (see How to read it)"
    if len(points[["arm", "setting", "d_model"]].drop_duplicates()) * points["seed"].nunique() != len(points):
        yield "not every arm has every seed; differences use the seeds that both sides have"
    for column, name in (("corpus_hash", "corpora"), ("planned_tokens", "token budgets")):
        for setting, values in runs.groupby("setting")[column]:
            if values.nunique() > 1:
                yield f"unequal {name} between runs to compare{f' ({setting!s})' if setting else ''}: {_listed(values)}"
    commits = runs["git_commit"].fillna("none")
    if commits.nunique() > 1:
        yield f"runs of {commits.nunique()} git commits: {_listed(commits)}"
    if commits.str.endswith("+dirty").any() or (commits == "none").any():
        yield "some runs were made outside git or from a tree with changes, so their code is not on record"


def _page(title: str, points_of: dict[str, list[str]], captions: dict[str, str], shown: dict[str, pd.DataFrame]) -> str:
    scored = [name for name in shown if name.startswith("scores_")]
    *first, last = (f"## {head}\n\n" + "".join(f"- {line}\n" for line in lines) for head, lines in points_of.items())
    return "\n".join(
        [f"# {title}\n", *first, "## Figures\n"]
        + [f"![{name}](figures/{name}.png)\n\n{caption}\n" for name, caption in captions.items()]
        + ["## Tables\n\nLosses and differences in nats per token; `tables/*.csv` have every digit.\n"]
        + [
            f"### {name.capitalize().replace('_', ' ')}\n\n{tables.to_markdown(table)}"
            for name, table in shown.items()
            if len(table)
        ]
        + ["## How to read it\n", _READING + READING * bool(scored) + _READING_COST * ("bill" in shown), last]
    )


def _provenance(study: Study | None, folder: Path, runs: pd.DataFrame) -> Iterator[str]:
    place = folder.resolve()
    yield f"Study: {study.name if study else place.name}"
    added, pruned = int(runs["added"].sum()), int((runs["status"] == "pruned").sum())
    yield f"Records: {len(runs) - added}{f' of {study.cells} planned' if study else ''}"
    if added:
        yield f"{added} runs were added where an optimum lay at the edge of the grid"
    if pruned:
        yield f"{pruned} of {len(runs)} runs were pruned: ended early by the study's pruner, so they have no final loss"
    if differing := _arms_differ_in(runs):
        yield f"Arms differ in: {differing}; all else is the same at equal factors and seed"
    yield f"Git commits: {_listed(runs['git_commit'].fillna('none'))}"
    yield f"Corpus hash: {_listed(runs['corpus_hash'])}"
    yield f"Devices: {_listed(runs['device'])}"
    yield from (f"Versions: {versions}" for versions in sorted(runs["versions"].unique()))
    yield f"In total: {runs['tokens'].sum():,} training tokens, {runs['wall_seconds'].sum():,.0f} s of wall time"
    # The last part of the path alone: the report must not depend on where the folder lies.
    yield f"Made by: `lit-mult report {'results/' * (place.parent.name == 'results')}{place.name}`"


def _arms_differ_in(runs: pd.DataFrame) -> str:
    """Config fields that set the arms apart, with their values; factors, nuisance factors and the seed left out."""
    records = {str(arm): RunRecord.read(Path(group["path"].iloc[0])) for arm, group in runs.groupby("arm", sort=False)}
    configs = {arm: flatten(record.config) for arm, record in records.items()}
    cells = [record.cell for record in records.values() if record.cell]
    varied = {"seed", *(name for cell in cells for name in (cell.factors | cell.nuisance))}
    parts, roles = [], dict[str, list[str]]()
    for name in dict.fromkeys(name for config in configs.values() for name in config if name not in varied):
        values = {arm: config.get(name) for arm, config in configs.items()}
        if len(set(map(str, values.values()))) == 1:
            continue
        if by_role := _BY_ROLE.fullmatch(name):  # a preset written into the config: names, as the values are too many
            roles.setdefault(by_role[1], []).extend(filter(None, [by_role[2]]))
        else:
            parts.append(f"`{name}` ({', '.join(f'{arm}: {value}' for arm, value in values.items())})")
    parts += [f"`{field}` (of {', '.join(names)})" for field, names in roles.items() if names]
    return ", ".join(parts)


def _places(points: pd.DataFrame) -> Iterator[str]:
    for _, group in points.groupby(["label", "d_model"], sort=False):
        first = next(rows(group))
        yield f"{first.label}, d = {first.d_model}, seed {', '.join(map(str, group['seed']))}"


def _listed(values: pd.Series) -> str:
    return ", ".join(sorted(map(str, values.unique())))


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(content)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror})") from None

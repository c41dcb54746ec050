"""The report of a study: tables, figures, and a page with findings and caveats."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import get_args

import pandas as pd

from lit_mult import atomic
from lit_mult.analysis import styles, tables
from lit_mult.analysis.arms import differing_fields
from lit_mult.analysis.comparison import comparison
from lit_mult.analysis.downstream import downstream
from lit_mult.analysis.evidence import Evidence
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.gains import gains
from lit_mult.analysis.latex import to_latex
from lit_mult.analysis.page.document import document
from lit_mult.analysis.page.payload import Content, payload
from lit_mult.analysis.plane import plane
from lit_mult.analysis.regime import regime
from lit_mult.config import Experiment
from lit_mult.errors import UserError, one_of
from lit_mult.layout import StudyPaths
from lit_mult.schema import StudyPlan

_BY_ROLE = re.compile(r"(parametrization\.(?:forward|lr|weight_decay))(?:\.(\w+))?")


@dataclass(frozen=True)
class Report:
    """Result of `write_report`."""

    paths: tuple[Path, ...]
    """The files written, report.md last."""
    text: str
    """Tables or verdicts as plain text, for the terminal."""
    warnings: tuple[str, ...]
    """Caveats of the results, one line each."""
    answers: tuple[str, ...]
    """A sentence for each declared question."""


def write_report(folder: Path | str, style: styles.StyleName | None = "paper", width: styles.Width = "page") -> Report:
    """Write `tables/`, `figures/`, `report.html` and `report.md` into the folder of a study or a run.

    The output is deterministic. Files are replaced atomically. `style` and `width` are those of the figures, as
    `styles.figure_style` takes them.

    Raises:
        UserError: there are no records, one is damaged, or the folder cannot be written; no such style or width.
    """
    folder = Path(folder)
    with styles.figure_style(style, width):
        content = drawn(read_content(folder))
    parts = content.parts

    source = (_command(folder), f"Git commits of the runs: {_commits(content.runs)}")
    files = dict[str, bytes]()
    for part in parts:
        files |= {f"tables/{name}.csv": tables.to_csv(table).encode() for name, table in part.tables.items()}
        for name, table in part.display_tables.items():
            files[f"tables/{name}.md"] = tables.to_markdown(table).encode()
            files[f"tables/{name}.tex"] = to_latex(table, source).encode()
    for name, forms in content.figures.items():
        files |= {f"figures/{name}.{ending}": figure for ending, figure in forms.items()}
    files["report.html"] = document(payload(content)).encode()
    files["report.md"] = _page(content.title, parts, content.warnings, content.provenance).encode()
    for path, written in ((folder / name, written) for name, written in files.items()):
        try:
            with atomic.new_file(path, overwrite=True) as scratch:
                scratch.write_bytes(written)
        except OSError as error:
            raise UserError(f"{path}: cannot write it ({error.strerror})") from None
    text = "\n".join(part.text for part in parts if part.text)
    answers = tuple(line for part in parts for line in part.answers)
    return Report(tuple(folder / name for name in files), text, tuple(content.warnings), answers)


def read_content(folder: Path, damaged: Callable[[str], None] | None = None) -> Content:
    """All that the report of a folder says; its figures are not drawn yet.

    Args:
        folder: of a study or a run.
        damaged: called with what is wrong with a damaged record, which is left out then.

    Raises:
        UserError: there are no records, or one is damaged and `damaged` is None.
    """
    study, runs = StudyPlan.read(StudyPaths(folder).plan), load_records(folder, damaged)
    if study and study.experiment:
        main = _experiment(study.experiment, Evidence(folder, runs))
    else:
        main = comparison(study, runs)
    extra = (gains(runs),) if study and study.experiment else ()
    parts = (main, *extra, plane(runs), regime(folder, runs), downstream(folder, runs))
    return Content(
        title=(study.title or study.name) if study else folder.resolve().name,
        folder=folder,
        runs=runs,
        parts=parts,
        warnings=(*_warnings(study, runs), *(line for part in parts for line in part.warnings)),
        provenance=tuple(_provenance(study, folder, runs)),
        study=study.name if study else "",
    )


def drawn(content: Content, but: Collection[str] = ()) -> Content:
    """The content with its figures drawn, except those of these names."""
    figures = {name: figure for part in content.parts for name, figure in part.figures.items() if name not in but}
    return replace(content, figures={name: styles.save(figure) for name, figure in figures.items()})


def _experiment(name: str, evidence: Evidence) -> Findings:
    if name not in get_args(Experiment):
        raise UserError(f"{evidence.folder}: experiment {name}: must be one of {one_of(name, get_args(Experiment))}")
    found: Findings = import_module(f"lit_mult.analysis.experiments.{name}").findings(evidence)
    return found


def _warnings(study: StudyPlan | None, runs: pd.DataFrame) -> Iterator[str]:
    if study and (planned := int(_is_planned(runs).sum())) < (wanted := _wanted(study, runs)):
        yield f"{planned} of {wanted} planned runs have a record"
    if runs["study"].nunique() > 1:
        yield f"records of several studies: {', '.join(sorted(runs['study'].unique()))}"
    yield from unequal(runs)


def unequal(runs: pd.DataFrame) -> Iterator[str]:
    """Warnings of what differs between runs that are compared: data, budget, code."""
    for column, name in (("corpus_hash", "corpora"), ("planned_tokens", "token budgets")):
        for setting, values in runs.groupby("setting")[column]:
            if values.nunique() > 1:
                yield f"unequal {name} between runs to compare{f' ({setting!s})' if setting else ''}: {_listed(values)}"
    commits = runs["git_commit"].fillna("none")
    if commits.nunique() > 1:
        yield f"runs of {commits.nunique()} git commits: {_listed(commits)}"
    if commits.str.endswith("+dirty").any() or (commits == "none").any():
        yield "some runs were made outside git or from a tree with changes, so their code is not on record"


def _is_planned(runs: pd.DataFrame) -> pd.Series:
    return ~(runs["added"] | runs["refines"] | runs["judged"])


def _wanted(study: StudyPlan, runs: pd.DataFrame) -> int:
    """Runs of the plan but for the further seeds of pruned trials, which do not run."""
    pruned = (runs["status"] == "pruned") & ~runs["seed"].isin(study.fresh_seeds)
    return study.cells - int(pruned.sum()) * (study.seeds_per_trial - 1)


def _page(title: str, parts: Sequence[Findings], warnings: Sequence[str], provenance: Sequence[str]) -> str:
    answers = [line for part in parts for line in part.answers]
    lists = {"Answers to the declared questions": answers} if answers else {}
    lists |= {heading: lines for part in parts for heading, lines in part.statements.items()}
    lists["Warnings"] = list(warnings) or ["none"]
    captions = {name: text for part in parts for name, text in part.captions.items()}
    shown = {name: table for part in parts for name, table in part.display_tables.items() if len(table)}
    units = "; ".join(part.unit for part in parts if part.unit)
    return "\n".join(
        [f"# {title}\n", *(_list(heading, lines) for heading, lines in lists.items()), "## Figures\n"]
        + [f"![{name}](figures/{name}.png)\n\n{caption}\n" for name, caption in captions.items()]
        + [f"## Tables\n\n{units}; `tables/*.csv` have every digit.\n"]
        + [f"### {name.capitalize().replace('_', ' ')}\n\n{tables.to_markdown(table)}" for name, table in shown.items()]
        + ["## How to read it\n", "".join(part.how_to_read for part in parts), _list("Provenance", provenance)]
    )


def _list(heading: str, lines: Sequence[str]) -> str:
    return f"## {heading}\n\n" + "".join(f"- {line}\n" for line in lines)


def _provenance(study: StudyPlan | None, folder: Path, runs: pd.DataFrame) -> Iterator[str]:
    yield f"Study: {study.name if study else folder.resolve().name}"
    added, pruned = int(runs["added"].sum()), int((runs["status"] == "pruned").sum())
    refines = int(runs["refines"].sum())
    yield f"Records: {_is_planned(runs).sum()}{f' of {study.cells} planned' if study else ''}"
    if judged := int(runs["judged"].sum()):
        yield f"{judged} runs are of seeds that judge the best values, which other seeds have chosen"
    if refines:
        yield f"{refines} runs are of seeds that were added for the precision of the declared questions"
    if added:
        yield f"{added} runs are at learning rates that were added beyond an edge of the grid, or around an optimum"
    if pruned:
        yield f"{pruned} of {len(runs)} runs were pruned: ended early by the study's pruner, so they have no final loss"
    if differing := _arms_differ_in(runs):
        yield f"Arms differ in: {differing}; all else is the same at equal factors and seed"
    yield f"Git commits: {_commits(runs)}"
    yield f"Corpus hash: {_listed(runs['corpus_hash'])}"
    yield f"Devices: {_listed(runs['device'])}"
    yield from (f"Versions: {versions}" for versions in sorted(runs["versions"].unique()))
    yield f"In total: {runs['tokens'].sum():,} training tokens, {runs['wall_seconds'].sum():,.0f} s of wall time"
    yield f"Made by: `{_command(folder)}`"


def _command(folder: Path) -> str:
    """The command that makes the report, with the last part of the path alone: it must not depend on the place."""
    place = folder.resolve()
    return f"lit-mult report {'results/' * (place.parent.name == 'results')}{place.name}"


def _commits(runs: pd.DataFrame) -> str:
    return _listed(runs["git_commit"].fillna("none"))


def _arms_differ_in(runs: pd.DataFrame) -> str:
    """Config fields in which the arms differ, with their values."""
    parts, roles = [], dict[str, list[str]]()
    for name, values in differing_fields(runs).items():
        if by_role := _BY_ROLE.fullmatch(name):  # a preset written into the config: names, as the values are too many
            roles.setdefault(by_role[1], []).extend(filter(None, [by_role[2]]))
        else:
            parts.append(f"`{name}` ({', '.join(f'{arm}: {value}' for arm, value in values.items())})")
    parts += [f"`{field}` (of {', '.join(names)})" for field, names in roles.items() if names]
    return ", ".join(parts)


def _listed(values: pd.Series) -> str:
    return ", ".join(sorted(map(str, values.unique())))

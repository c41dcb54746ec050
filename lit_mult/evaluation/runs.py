"""Trained models on disk: a run, a cell of a study, or a study's best, and where their evaluations go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_mult.analysis.frame import best_rates, load_records, rows
from lit_mult.errors import UserError
from lit_mult.layout import RunPaths
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.training.folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    folder: RunFolder
    record: RunRecord
    evaluations: Path
    """Folder for what is found out about it."""

    @property
    def name(self) -> str:
        return self.record.cell.cell if self.record.cell else self.folder.path.name

    def checkpoints(self, *, along: bool) -> dict[int, Path]:
        """Optimizer steps -> checkpoint: the last one, there or not, and with `along` those kept on the way."""
        kept = {step: self.folder.kept_checkpoint(step) for step in self.folder.kept_steps()} if along else {}
        return kept | {self.record.steps: self.folder.final_checkpoint}


def find_runs(path: Path, *, best: bool) -> list[TrainedRun]:
    """The run in a folder or, in the folder of a study, its completed runs.

    With `best`, of a study only every seed of the best rate of each arm, setting and width (`frame.best_rates`).

    Raises:
        UserError: there is no completed run.
    """
    study = StudyFolder(path)
    if not study.plan.is_file():
        if best:
            raise UserError(f"--best: {path} holds no study; leave it out, or give a study's results folder")
        return [_run(path)]
    runs = load_records(path)
    runs = best_rates(runs) if best else runs[runs["status"] == "completed"]
    if runs.empty:
        raise UserError(f"{path}: no {'rate with all its seeds' if best else 'run of the study'} has completed")
    found = []
    for row in rows(runs):
        evaluations = study.cell(row.cell).evaluations
        found.append(TrainedRun(RunFolder(study.cell(row.cell).path), RunRecord.read(Path(row.path)), evaluations))
    return found


def home(path: Path) -> Path:
    """The folder whose report has the run in: a study's for one of its cells."""
    study = RunPaths(path).study
    return path if study is None else study.path


def _run(path: Path) -> TrainedRun:
    folder = RunFolder(path)
    record = folder.find_record()
    if record is None:
        raise UserError(f"{path}: holds no finished run; give the folder of a run, or of a study")
    if record.status != "completed":
        raise UserError(f"{path}: the run was {record.status}, so it has no final model to evaluate")
    return TrainedRun(folder, record, folder.evaluations)

"""Trained models on disk: a run, a cell of a study, or a study's best, and where their evaluations go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_mult.analysis.frame import load_records, rows
from lit_mult.errors import UserError
from lit_mult.record import EVALUATIONS, RECORD_NAME, RunRecord
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
        """Optimizer steps -> checkpoint: the last one and, with `along`, those kept on the way.

        Raises:
            UserError: there is no checkpoint.
        """
        if not self.folder.final_checkpoint.is_file():
            how = "a study keeps them with keep_checkpoints: true" if self.record.cell else "train it anew"
            raise UserError(f"{self.folder.path}: has no checkpoint, so nothing to evaluate; {how}")
        kept = {step: self.folder.kept(step) for step in self.folder.kept_steps()} if along else {}
        return kept | {self.record.steps: self.folder.final_checkpoint}


def find_runs(path: Path, *, best: bool) -> list[TrainedRun]:
    """The run in a folder or, in the folder of a study, its completed runs.

    With `best`, of a study only those at the learning rate (and other nuisance values) of each arm, setting and width
    with the lowest mean final loss over seeds: every seed of it, so that no seed is chosen for its luck.

    Raises:
        UserError: there is no finished run.
    """
    study = StudyFolder(path)
    if not study.plan.is_file():
        if best:
            raise UserError(f"--best: {path} holds no study; leave it out, or give a study's results folder")
        return [_run(path)]
    runs = load_records(path)
    runs = runs[(runs["status"] == "completed") & runs["final_loss"].notna()]
    if runs.empty:
        raise UserError(f"{path}: no run of the study has completed")
    if best:
        of_a_point = ["arm", "setting", "d_model"]
        means = runs.groupby([*of_a_point, "lr", "nuisance"], as_index=False)["final_loss"].mean()
        chosen = means.loc[means.groupby(of_a_point)["final_loss"].idxmin(), [*of_a_point, "lr", "nuisance"]]
        runs = runs.merge(chosen, on=list(chosen.columns))
    found = []
    for row in rows(runs):
        evaluations = path / EVALUATIONS / row.cell
        found.append(TrainedRun(RunFolder(study.work(row.cell)), RunRecord.read(Path(row.path)), evaluations))
    return found


def home(path: Path) -> Path:
    """The folder whose report has the run in: a study's for one of its cells."""
    return path.parent.parent if path.parent.name == "cells" and not (path / RECORD_NAME).is_file() else path


def _run(path: Path) -> TrainedRun:
    folder = RunFolder(path)
    record = folder.find_record()
    if record is None:
        raise UserError(f"{path}: holds no finished run; give the folder of a run, or of a study")
    evaluations = home(path) / EVALUATIONS
    return TrainedRun(folder, record, evaluations if home(path) == path else evaluations / path.name)

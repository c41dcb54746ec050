"""Paths of all files of runs and studies.

RUN/config.json               config and corpus hash
RUN/checkpoints/              step=N.ckpt to resume from, final.ckpt, kept/step=N.ckpt
RUN/record.json               result
RUN/diagnostics.parquet       readings of train.diagnostics
RUN/evaluations/              one JSON file per downstream evaluation
RUN/tensorboard/

STUDY/study.json              plan
STUDY/records/CELL.json       one record per finished cell, from which everything else can be rebuilt
STUDY/diagnostics/CELL.parquet
STUDY/evaluations/CELL/       one JSON file per downstream evaluation
STUDY/cells/CELL/             run folders of unfinished cells, and of cells whose checkpoints are kept
STUDY/attempts/CELL.N.json    leases of the attempts at unfinished cells
STUDY/trials/POINT.N.json     parameters of sampled cells
STUDY/sweeps/NAME.json        leases of running sweeps, on any machine
STUDY/optuna.journal          Optuna's trials, unless another storage is used
STUDY/tables, figures, report.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_RECORD, _RECORDS = "record.json", "records"
_DIAGNOSTICS_FILE, _DIAGNOSTICS = "diagnostics.parquet", "diagnostics"
_EVALUATIONS, _CELLS = "evaluations", "cells"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def record(self) -> Path:
        return self.path / _RECORD

    @property
    def diagnostics(self) -> Path:
        return self.path / _DIAGNOSTICS_FILE

    @property
    def evaluations(self) -> Path:
        """Folder of the run's evaluations: its own, or the study's for a cell."""
        study = self.study
        return self.path / _EVALUATIONS if study is None else study.path / _EVALUATIONS / self.path.name

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_checkpoint(self) -> Path:
        return self.checkpoints / "final.ckpt"

    def checkpoint(self, step: int) -> Path:
        """Checkpoint to resume from."""
        return self.checkpoints / f"step={step}.ckpt"

    def kept_checkpoint(self, step: int) -> Path:
        """Weights at a step (`train.keep_every`)."""
        return self.checkpoints / "kept" / f"step={step}.ckpt"

    def kept_steps(self) -> list[int]:
        """Optimizer steps at which weights were kept, in order."""
        return sorted(step_of(path) for path in self.kept_checkpoint(0).parent.glob("step=*.ckpt"))

    @property
    def study(self) -> StudyPaths | None:
        """The study of a cell; None for a single run."""
        is_cell = self.path.absolute().parent.name == _CELLS and not self.record.is_file()
        return StudyPaths(self.path.absolute().parents[1]) if is_cell else None


@dataclass(frozen=True)
class StudyPaths:
    """The files of a study."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "study.json"

    @property
    def journal(self) -> Path:
        return self.path / "optuna.journal"

    @property
    def attempts_folder(self) -> Path:
        return self.path / "attempts"

    @property
    def sweeps_folder(self) -> Path:
        return self.path / "sweeps"

    @property
    def trials_folder(self) -> Path:
        return self.path / "trials"

    def trial(self, point: str, number: int) -> Path:
        return self.trials_folder / f"{point}.{number}.json"

    def record(self, cell: str) -> Path:
        return self.path / _RECORDS / f"{cell}.json"

    def records(self) -> list[Path]:
        """The records of its cells, in order."""
        return sorted((self.path / _RECORDS).glob("*.json"))

    def diagnostics(self, cell: str) -> Path:
        return self.path / _DIAGNOSTICS / f"{cell}.parquet"

    def cell(self, cell: str) -> RunPaths:
        """The run folder of a cell."""
        return RunPaths(self.path / _CELLS / cell)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(checkpoint.stem.partition("=")[2])


def find_records(folder: Path) -> list[Path]:
    """Paths of all records below a folder (a run's or a study's), in a fixed order."""
    return sorted(path for path in folder.rglob("*.json") if path.name == _RECORD or path.parent.name == _RECORDS)


def find_evaluations(folder: Path) -> list[Path]:
    """Paths of all evaluation records below a folder (a run's or a study's), in a fixed order."""
    return sorted(path for path in folder.rglob("*.json") if _EVALUATIONS in path.relative_to(folder).parts[:-1])


def find_diagnostics(folder: Path) -> list[Path]:
    """Paths of the diagnostics of all runs below a folder (a run's or a study's), in a fixed order."""
    found = folder.rglob("*.parquet")
    return sorted(path for path in found if path.name == _DIAGNOSTICS_FILE or path.parent.name == _DIAGNOSTICS)


def cell_name(path: Path, folder: Path) -> str:
    """The cell of a record or diagnostics file below `folder`; for a single run, its relative path."""
    is_single = path.name in (_RECORD, _DIAGNOSTICS_FILE)
    return path.relative_to(folder).parent.as_posix() if is_single else path.stem

"""What the tests of sweeps share: what a results folder and a storage hold, and the processes of workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna

from lit_mult.config import RunConfig
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.study.folder import StudyFolder
from lit_mult.study.job import Job
from lit_mult.study.queue import CellQueue
from lit_mult.study.spec import StudySpec
from lit_mult.study.storage import open_storage
from lit_mult.study.sweep import check_cells, sweep


def job_of(config: RunConfig, folder: Path, name: str) -> Job:
    """A cell of a study, with all that it leaves in the folder."""
    cell = {"study": "s", "cell": name, "arm": "a", "sampler": "grid", "factors": {}, "nuisance": {}}
    records = {"record": folder / f"{name}.json", "diagnostics": folder / f"{name}.parquet"}
    places = {"attempts": folder / "attempts", "work": folder / name, **records}
    return Job(config.to_dict(), cell, **places, keep_checkpoint=False, prune=False)


def losses(folder: Path) -> dict[str, float | None]:
    return {path.stem: RunRecord.read(path).final_loss for path in find_records(folder)}


def outcomes(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that training decides, by the record's name."""
    records = {path.name: RunRecord.read(path) for path in find_records(folder)}
    return {
        name: (one.status, one.steps, one.initial_loss, one.final_loss, one.train_curve, one.val_curve)
        for name, one in records.items()
    }


def assert_undisturbed(spec: StudySpec, folder: Path) -> None:
    """The records are those of a sweep in one process that nothing disturbs, which is made here beside the folder."""
    whole = folder.with_name("whole")
    sweep(spec, whole, workers=0)
    assert outcomes(folder) == outcomes(whole)


def states(storage: str | Path) -> Counter[str]:
    """How many trials are in which state."""
    opened = open_storage(storage)
    studies = [opened.get_all_trials(study._study_id) for study in opened.get_all_studies()]
    return Counter(trial.state.name for trials in studies for trial in trials)


def trials(folder: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "optuna.journal")).trials


def queues(spec: StudySpec, folder: StudyFolder, *names: str) -> list[CellQueue]:
    """Queues of as many sweeps of the folder, which is claimed for the study."""
    with folder.locked():
        identity = folder.claim(spec, check_cells(spec))
    return [CellQueue(spec, folder, open_storage(folder.journal), identity, name, retries=3) for name in names]


def workers_of(parent: int) -> list[int]:
    """Processes below `parent` that run multiprocessing's spawned main."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and "spawn_main" in command:
            found.append(int(path.name))
    return found

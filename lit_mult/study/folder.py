"""The results folder of a study: its plan, its finished cells, and the sweeps that run on it."""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_mult import atomic
from lit_mult.config import differences
from lit_mult.errors import ConfigError, UserError
from lit_mult.layout import StudyPaths
from lit_mult.schema import RunRecord
from lit_mult.study.attempts import Attempts
from lit_mult.study.lease import Lease, is_alive
from lit_mult.study.spec import StudySpec, canonical


class StudyFolder(StudyPaths):
    """The files of a study and the leases on them. Sweeps on several machines may share a folder."""

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.attempts_folder)

    def finished(self, cell_id: str) -> RunRecord | None:
        """The record of a cell; None if it has none. A damaged record is renamed to *.damaged."""
        path = self.record(cell_id)
        if not path.is_file():
            return None
        try:
            return RunRecord.read(path)
        except UserError:
            path.replace(path.with_name(f"{path.name}.damaged"))
            return None

    def clear(self, cell_id: str) -> None:
        """Remove the work files of a finished cell, which a process killed after writing the record leaves."""
        run = self.cell(cell_id)
        if not (run.final_checkpoint.exists() or run.tensorboard.exists()):
            shutil.rmtree(run.path, ignore_errors=True)
        self.attempts.clear(cell_id)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other sweeps for a short time. Not reentrant. Raises: UserError when the folder cannot be written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def check(self, spec: StudySpec, corpora: list[str]) -> None:
        """Check that the folder is free or holds this study on corpora of these hashes; nothing is written.

        Raises:
            UserError: the folder holds another study, another version of this one, or other files.
        """
        held = self._held()
        if held is not None:
            wanted = {"spec": canonical(spec), "corpora": corpora}
            if changes := differences({"spec": _canonical(held["spec"]), "corpora": held.get("corpora")}, wanted):
                raise UserError(f"{self.path}: holds another version of this study ({changes}); name a new --out")
        # A sweep that was killed while it claimed the folder leaves only hidden files.
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path}: is not empty and holds no study; name a new --out")

    def claim(self, spec: StudySpec, corpora: list[str]) -> str:
        """Write the plan, unless it is there. Call while `locked`.

        Returns:
            The folder's id, which ties a storage to it.

        Raises:
            UserError: as `check`; or the folder cannot be written.
        """
        self.check(spec, corpora)
        held = self._held() or {}
        plan = {
            "name": spec.name,
            "title": spec.title,
            "experiment": spec.experiment,
            "cells": spec.n_cells,
            "spec": canonical(spec),
            "corpora": corpora,
            "id": held.get("id") or secrets.token_hex(6),
        }
        if plan != held:
            with writing(self.plan):
                atomic.write_text(self.plan, json.dumps(plan, indent=1))
        return str(plan["id"])

    def join(self) -> Lease:
        """A lease for a new sweep. Raises: UserError when the folder cannot be written."""
        with writing(self.sweeps_folder):
            return Lease(self.sweep(secrets.token_hex(4)), {})

    def sweep(self, name: str) -> Path:
        return self.sweeps_folder / f"{name}.json"

    def running_sweeps(self) -> list[Path]:
        """Leases of running sweeps."""
        return [path for path in sorted(self.sweeps_folder.glob("[!.]*.json")) if is_alive(path)]

    def remove_dead_sweeps(self) -> None:
        """Remove the leases of killed sweeps."""
        for path in set(self.sweeps_folder.glob("[!.]*.json")) - set(self.running_sweeps()):
            path.unlink(missing_ok=True)

    def spec(self) -> StudySpec:
        """The study in the folder. Raises: UserError when there is none, or its plan is damaged."""
        held = self._held()
        if held is None:
            raise UserError(f"{self.path}: holds no study")
        return StudySpec.from_dict(held["spec"])

    def _held(self) -> dict[str, Any] | None:
        try:
            held = json.loads(self.plan.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.plan}: cannot be read ({error})") from None
        if not isinstance(held, dict) or not isinstance(held.get("spec"), dict):
            raise UserError(f"{self.plan}: damaged, not the plan of a study; name a new --out")
        return held


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _canonical(held: dict[str, Any]) -> dict[str, Any]:
    """A plan as this version would write it: newer fields have their defaults."""
    try:
        return canonical(StudySpec.from_dict(held))
    except ConfigError:
        return held

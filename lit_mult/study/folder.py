"""The results folder of a study: whose it is, its finished cells, and the sweeps that are running on it."""

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
    """The files of a study, and who works on them. Sweeps on several machines may share it."""

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.attempts_folder)

    def finished(self, cell_id: str) -> RunRecord | None:
        """The record of a cell, if it has one; a damaged one is renamed to *.damaged, and the cell has none then."""
        path = self.record(cell_id)
        if not path.is_file():
            return None
        try:
            return RunRecord.read(path)
        except UserError:
            path.replace(path.with_name(f"{path.name}.damaged"))
            return None

    def clear(self, cell_id: str) -> None:
        """Remove what a finished cell has left, if its process was killed right after it had written the record."""
        run = self.cell(cell_id)
        if not (run.final_checkpoint.exists() or run.tensorboard.exists()):
            shutil.rmtree(run.path, ignore_errors=True)
        self.attempts.clear(cell_id)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for a moment, against other sweeps. Not reentrant.

        Raises:
            UserError: the folder cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def check(self, spec: StudySpec, corpora: list[str]) -> None:
        """Check that the folder is free or holds this very study, on corpora of these hashes; nothing is written.

        Raises:
            UserError: the folder holds another study, another version of this one, or other files.
        """
        held = self._held()
        if held is not None:
            wanted = {"spec": canonical(spec), "corpora": corpora}
            if changes := differences({"spec": _canonical(held["spec"]), "corpora": held.get("corpora")}, wanted):
                raise UserError(f"{self.path}: holds another version of this study ({changes}); name a new --out")
        # A sweep that was killed while it claimed the folder leaves hidden files and nothing else.
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path}: is not empty and holds no study; name a new --out")

    def claim(self, spec: StudySpec, corpora: list[str]) -> str:
        """Write the plan, unless it is there; to be called while `locked`.

        Returns:
            The identity of the folder, which ties a storage to it.

        Raises:
            UserError: see `check`; or the folder cannot be written.
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
        """A lease for a new sweep.

        Raises:
            UserError: the folder cannot be written.
        """
        with writing(self.sweeps_folder):
            return Lease(self.sweep(secrets.token_hex(4)), {})

    def sweep(self, name: str) -> Path:
        """The lease of a sweep."""
        return self.sweeps_folder / f"{name}.json"

    def running_sweeps(self) -> list[Path]:
        """Leases of the sweeps that are running."""
        return [path for path in sorted(self.sweeps_folder.glob("[!.]*.json")) if is_alive(path)]

    def remove_dead_sweeps(self) -> None:
        """Remove the leases that killed sweeps have left."""
        for path in set(self.sweeps_folder.glob("[!.]*.json")) - set(self.running_sweeps()):
            path.unlink(missing_ok=True)

    def spec(self) -> StudySpec:
        """The study that the folder holds.

        Raises:
            UserError: it holds none, or the plan is damaged.
        """
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
    """A plan as this version would have written it: fields that have come since have their defaults."""
    try:
        return canonical(StudySpec.from_dict(held))
    except ConfigError:
        return held

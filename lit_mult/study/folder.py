"""The results folder of a study: study.json, records/, the Optuna journal, and cells/ for work under way."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_mult.config import differences
from lit_mult.errors import UserError
from lit_mult.study.spec import Cell, StudySpec, canonical


@dataclass(frozen=True)
class StudyFolder:
    """Where a study keeps what it has found; records are the truth, the rest can be rebuilt from them."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "study.json"

    @property
    def journal(self) -> Path:
        return self.path / "optuna.journal"

    def record(self, cell_id: str) -> Path:
        return self.path / "records" / f"{cell_id}.json"

    def work(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.id

    @contextmanager
    def claim(self, spec: StudySpec, corpora: list[str]) -> Iterator[None]:
        """Hold the folder for this study, on corpora of these hashes, while it runs.

        Raises:
            UserError: the folder holds another study or another version of this one, is in use, or cannot be written.
        """
        wanted = json.loads(json.dumps({"spec": canonical(spec), "corpora": corpora}))
        held = self._held()
        if held is not None:
            if changes := differences({name: held.get(name) for name in wanted}, wanted):
                raise UserError(f"{self.path}: holds another version of this study ({changes}); name a new --out")
        # A sweep that was killed while it claimed the folder leaves these and nothing else.
        elif self.path.is_dir() and {path.name for path in self.path.iterdir()} - {".lock", ".study.json"}:
            raise UserError(f"{self.path}: is not empty and holds no study; name a new --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path}: another sweep is running on this folder") from None
            scratch = self.spec.with_name(".study.json")
            data = {"name": spec.name, "title": spec.title, "cells": spec.n_cells}
            scratch.write_text(json.dumps(data | wanted, indent=1))
            scratch.rename(self.spec)
            yield

    def _held(self) -> dict[str, Any] | None:
        try:
            held = json.loads(self.spec.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.spec}: cannot be read ({error})") from None
        if not isinstance(held, dict) or not isinstance(held.get("spec"), dict):
            raise UserError(f"{self.spec}: damaged, not the plan of a study; name a new --out")
        return held

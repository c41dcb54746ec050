"""The folder of one run: its config, its record if it has finished, and the checkpoint to resume from."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path

from lit_mult import atomic
from lit_mult.config import RunConfig, differences
from lit_mult.errors import ConfigError, UserError
from lit_mult.layout import RunPaths, step_of
from lit_mult.schema import RunRecord


class RunFolder(RunPaths):
    """The files of a run, and which run they belong to."""

    def find_record(self) -> RunRecord | None:
        """The record of the run (a cell's is in its study's folder), or None. Raises: UserError when it is damaged."""
        path = self.record if self.study is None else self.study.record(self.path.name)
        return RunRecord.read(path) if path.is_file() else None

    def finished(self, config: RunConfig, corpus_hash: str) -> RunRecord | None:
        """The record of this run, or None if it has not finished, perhaps on other devices; nothing is written.

        Raises:
            UserError: the folder holds another run or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file; name a folder")
        if self.config.is_file():
            try:
                held, held_corpus = self.held()
            except UserError as error:
                raise UserError(f"{error}; name a new folder") from None
            same = config if self.record.is_file() else config.on_devices_of(held)
            if held.hash != same.hash or held_corpus != corpus_hash:
                changes = differences(
                    held.hashed_fields() | {"corpus_hash": held_corpus},
                    config.hashed_fields() | {"corpus_hash": corpus_hash},
                )
                raise UserError(f"--out {self.path}: holds another run ({changes}); name a new folder")
            return RunRecord.read(self.record) if self.record.is_file() else None
        # A run that was killed while it claimed the folder leaves only a hidden file.
        if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"--out {self.path}: is not empty and holds no run; name a new folder")
        return None

    def held(self) -> tuple[RunConfig, str]:
        """The config of the run in this folder, and the hash of its corpus.

        Raises:
            UserError: the folder holds no run, or its config file is damaged or not valid here.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path}: not the folder of a run, there is no {self.config.name} in it")
        try:
            held = json.loads(self.config.read_text())
            return RunConfig.from_dict(held["config"]), str(held["corpus_hash"])
        except ConfigError as error:
            perhaps = "it may be of a package that is not installed, or of a newer version"
            raise UserError(f"{self.config}: not valid here, {perhaps} ({error})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config}: damaged, not the config of a run ({error})") from None

    def claim(self, config: RunConfig, corpus_hash: str) -> None:
        """Write the run's config; rename damaged checkpoints to *.damaged, with a warning.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            held = {"config": config.to_dict(), "corpus_hash": corpus_hash}
            atomic.remove_scratch(self.config)
            atomic.write_text(self.config, json.dumps(held, indent=1))
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        for path in [path for path in self._step_checkpoints() if not _is_whole(path)]:
            path.replace(path.with_suffix(".ckpt.damaged"))
            warnings.warn(f"{path}: damaged, renamed; resuming from the previous one or from the start", stacklevel=3)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from."""
        return max(self.resumable(), key=step_of, default=None)

    def resumable(self) -> list[Path]:
        """Checkpoints of an unfinished run, without truncated ones, whose zip archive has no end."""
        return [path for path in self._step_checkpoints() if _has_an_end(path)]

    def other_checkpoints(self, step: int) -> list[Path]:
        """Checkpoints to resume from at other steps: earlier ones, or later ones of a previous attempt."""
        return [path for path in self.resumable() if path != self.checkpoint(step)]

    def clear_checkpoints(self, *, keep_final: bool) -> None:
        """Remove the checkpoints that a finished run no longer needs."""
        for checkpoint in self._step_checkpoints():
            checkpoint.unlink(missing_ok=True)
        if not keep_final:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _step_checkpoints(self) -> list[Path]:
        return list(self.checkpoints.glob("step=*.ckpt"))


def _has_an_end(archive: Path) -> bool:
    try:
        return zipfile.is_zipfile(archive)
    except zipfile.BadZipFile:
        return False


def _is_whole(archive: Path) -> bool:
    import torch

    try:
        with zipfile.ZipFile(archive) as parts:
            # Checksums must match, and no part may be marked as a folder, which torch would silently read as empty.
            if parts.testzip() is not None or any(part.external_attr for part in parts.infolist()):
                return False
        torch.load(archive, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # zipfile and torch raise many types on damaged files
        return False
    return True

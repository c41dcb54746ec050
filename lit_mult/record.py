"""What a run leaves behind: one JSON file, written whole or not at all, never rewritten. Needs no torch."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lit_mult.errors import UserError

SCHEMA_VERSION: Final = 1
RECORD_NAME = "record.json"


class CellInfo(BaseModel):
    """Where a run stands in the study that asked for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    study: str
    """Name of the study."""
    cell: str
    """Identifier of the cell, unique within the study."""
    arm: str
    """Name of the arm, such as muP or vectors."""
    sampler: str
    """How the nuisance factors are searched: grid, or an Optuna sampler."""
    factors: dict[str, Any]
    """Value of each scientific factor, by dotted config field (`model.d_model: 64`)."""
    nuisance: dict[str, Any]
    """Value of each nuisance factor, by dotted config field (`optim.lr: 0.01`)."""
    added: bool = False
    """Not of the planned grid: added because the optimum lay at an edge of it."""


class RunRecord(BaseModel):
    """One finished run, complete enough to be repeated and to be analysed without its checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["completed", "diverged", "pruned"]
    """diverged: the loss became non-finite or rose far above its start; a data point, not a failure. pruned: ended
    early by the study's pruner, for want of promise."""
    config: dict[str, Any]
    """The full `RunConfig` as plain values."""
    config_hash: str
    seed: int
    cell: CellInfo | None = None
    """None for a run outside a study."""
    git_commit: str | None
    """Commit of the working tree the run was started in, with `+dirty` when it had changes; None outside git."""
    versions: dict[str, str]
    """Versions of Python and of the packages that computed the run."""
    device: str
    started_at: str
    """UTC, ISO 8601."""
    corpus_hash: str
    """Hash of the documents, their split and the tokenizer."""
    train_tokens_available: int
    """Tokens in the training split."""
    parameters: dict[str, int]
    """Number of trainable parameters: total, non_embedding, multipliers."""
    steps: int
    """Optimizer steps done; fewer than asked for when diverged or pruned."""
    tokens: int
    """Tokens trained on."""
    wall_seconds: float
    """Seconds in training and validation, over all parts of a resumed run."""
    tokens_per_second: float
    """Training tokens per second of training time (validation left out)."""
    initial_loss: float | None
    """Validation loss before the first step, nats per token; None when it is not finite."""
    final_loss: float | None
    """Validation loss after the last step, nats per token; None when diverged or pruned."""
    best_loss: float | None
    """Lowest validation loss seen, nats per token (the initial one included); None when none is finite."""
    final_bits_per_byte: float | None
    """Final validation loss in bits per byte of text; None when diverged or pruned."""
    train_curve: list[tuple[int, float]]
    """(step, mean training loss of the log_every steps up to it), nats per token, z-loss left out."""
    val_curve: list[tuple[int, float]]
    """(step, validation loss), nats per token, from step 0."""

    def write(self, path: Path) -> None:
        """Write the record; the file appears complete or not at all.

        Raises:
            UserError: a record is there already, or the place cannot be written.
        """
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("w") as file:
                json.dump(self.model_dump(mode="json"), file, allow_nan=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, path)  # unlike a rename, refuses to replace a record
        except FileExistsError:
            raise UserError(f"{path}: a record is there already; records are never rewritten") from None
        except OSError as error:
            raise UserError(f"{path}: cannot write the record ({error.strerror})") from None
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read one record.

        Raises:
            UserError: the file is missing, damaged, or of another schema version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot read the record ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise UserError(f"{path}: not a version-{SCHEMA_VERSION} run record ({where}: {first['msg']})") from None


def find_records(folder: Path) -> list[Path]:
    """Paths of all records below a folder (a run's or a study's), in a fixed order."""
    return sorted(path for path in folder.rglob("*.json") if path.name == RECORD_NAME or path.parent.name == "records")

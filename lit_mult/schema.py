"""What a run, and an evaluation of it, leave behind: JSON files, written whole, never rewritten. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lit_mult import atomic
from lit_mult.errors import UserError

SCHEMA_VERSION: Final = 1


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


class _Written(BaseModel):
    """A record on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    _indent: ClassVar[int | None] = 1

    def write(self, path: Path) -> None:
        """Write the record; the file appears complete or not at all.

        Raises:
            UserError: a record is there already, or the place cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), allow_nan=False, indent=self._indent)
        try:
            atomic.write_text(path, text, overwrite=False)
        except FileExistsError:
            raise UserError(f"{path}: a record is there already; records are never rewritten") from None
        except OSError as error:
            raise UserError(f"{path}: cannot write the record ({error.strerror})") from None

    @classmethod
    def read(cls, path: Path) -> Self:
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
            kind = "run record" if cls is RunRecord else "evaluation record"
            raise UserError(f"{path}: not a version-{SCHEMA_VERSION} {kind} ({where}: {first['msg']})") from None


class RunRecord(_Written):
    """One finished run, complete enough to be repeated and to be analysed without its checkpoints."""

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
    members: int = 1
    """Runs that were trained together with this one, as a stack, itself among them."""
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
    """Seconds in training and validation, over all parts of a resumed run; of a stack, the run's share."""
    tokens_per_second: float
    """Training tokens per second of training time (validation left out); of a stack, of the run's share of it."""
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


class Score(BaseModel):
    """The score of one task."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: str
    metric: str
    """lm-eval's name, as in acc_norm."""
    higher_is_better: bool
    value: float
    """Between 0 and 1 for the metrics of accuracy."""
    stderr: float | None
    """lm-eval's standard error over items; None where it gives none."""
    items: list[float]
    """Score of each item, whose mean is the value; empty where the value is no mean over items."""
    items_hash: str
    """Of the items in their order: the scores of two models pair item by item where it is equal."""
    side: Literal["knowledge", "reasoning"] | None = None
    chance: float | None = None
    """Score of guessing, where it is known."""
    num_fewshot: int | None = None
    """Examples that were in the prompt."""


class EvaluationRecord(_Written):
    """Downstream scores of one checkpoint."""

    _indent: ClassVar[int | None] = None  # thousands of items, of which each would have a line

    suite: str
    """mini, paper, or the names of tasks."""
    label: str
    """The suite with the options that were given, such as "mini, 2 shots": scores of equal label compare."""
    config_hash: str
    """Of the run."""
    seed: int
    cell: CellInfo | None = None
    step: int
    """Optimizer steps of the checkpoint."""
    last: bool
    """The checkpoint is the run's last."""
    tokens: int
    """Tokens trained on up to the checkpoint."""
    corpus_hash: str
    num_fewshot: int | None
    """Examples in the prompt, where it was asked for; None: what each task says."""
    limit: int | None
    """Items of each task, where it was asked for; None: all."""
    max_length: int
    """Tokens that the model saw at once."""
    truncated: int
    """Requests that were longer than the model's context and lost their beginning."""
    git_commit: str | None
    versions: dict[str, str]
    device: str
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: float
    scores: list[Score]
    """Of the tasks of the suite, in its order."""
    results: dict[str, dict[str, Any]]
    """All that lm-eval reports, subtasks and groups included."""

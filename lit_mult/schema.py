"""What is on disk of studies, runs and evaluations, as models: JSON files, written whole. Needs no torch.

Records are never rewritten. `analysis.frame` reads run records as plain JSON instead, thousands at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import (
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lit_mult import atomic
from lit_mult.config import ParametrizationConfig, Tier
from lit_mult.errors import UserError

SCHEMA_VERSION: Final = 1
NEUTRAL: Final = ParametrizationConfig().preset
"""The preset in which every multiplier is 1: nothing of it was tuned."""
PRESET: Final = "parametrization.preset"
_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CellInfo(_Section):
    """Where a run stands in the study that asked for it."""

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


class _Record(_Section):
    schema_version: Literal[1] = SCHEMA_VERSION
    _kind: ClassVar[str]
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
        """Read one record. Raises: UserError when the file is missing, damaged, or of another schema version."""
        return _read(cls, path, f"not a version-{SCHEMA_VERSION} {cls._kind}")


class RunRecord(_Record):
    """One finished run, complete enough to be repeated and to be analysed without its checkpoints."""

    _kind: ClassVar[str] = "run record"

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


class Score(_Section):
    """The score of one task."""

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


class EvaluationRecord(_Record):
    """Downstream scores of one checkpoint."""

    _kind: ClassVar[str] = "evaluation record"
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


class Tuning(_Section):
    """What it cost to find a preset's multipliers and what they brought, for a fair comparison with learned ones."""

    model_config = ConfigDict(allow_inf_nan=False)

    study: str
    """Name of the tuning study."""
    trials: int
    """Runs, the pruned and the diverged ones included; so for tokens, flops and seconds."""
    completed: int
    """Runs that came to their last step."""
    pruned: int
    """Runs that the study's pruner ended early."""
    diverged: int
    """Runs whose loss became non-finite or rose far above its start."""
    tokens: int
    """Tokens trained on, summed over the trials."""
    flops: float
    """Floating-point operations of training: 6 * parameters * tokens, summed over the trials."""
    seconds: float
    """Wall time in training and validation, summed over the trials."""
    d_model: int
    """Width at which the trials ran."""
    base_d_model: int
    """Width against which the trials were scaled (`parametrization.base_d_model`)."""
    steps: int
    """Optimizer steps of a trial."""
    batch_size: int
    """Sequences in one step."""
    seq_len: int
    """Tokens in one sequence."""
    lr: float
    """Base learning rate (`optim.lr`) of the best trial."""
    best_loss: float
    """Final validation loss of the best trial (mean over its seeds), nats per token."""
    default_loss: float | None = None
    """The same of the best trial whose multipliers were all 1; None when none of them completed."""
    seeds: list[int]
    """Seeds of the trials; on these the preset was chosen, so they do not judge it."""
    tier: Tier
    """What was tuned."""
    git_commit: str | list[str] | None = None
    """Commit, or commits, that the trials ran at; None outside git."""
    corpus_hash: str
    """Hash of the documents, their split and the tokenizer."""

    @model_validator(mode="before")
    @classmethod
    def _default_width(cls, data: Any) -> Any:
        """Older files have no d_model: their trials ran at the base width."""
        return {"d_model": data["base_d_model"], **data} if isinstance(data, dict) and "base_d_model" in data else data


_Overrides = Annotated[dict[str, Any], BeforeValidator(lambda fields: {} if fields is None else fields)]


class _PlanPart(BaseModel):
    """A part of a plan; its other fields are `study.spec`'s."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class _Tuned(_PlanPart):
    tuning: Tuning | None = None


class _TunedPreset(_PlanPart):
    optimizers: dict[str, _Tuned] = {}


class StudyPlan(_PlanPart):
    """What a report needs of study.json."""

    name: str
    title: str = ""
    cells: int
    """Number of runs planned."""
    experiment: str | None = None
    """Experiment that the study is, `config.Experiment`; None: a comparison of arms over learning rates."""
    preset: str = Field(NEUTRAL, validation_alias=AliasPath("spec", "base", "parametrization", "preset"))
    """That of arms which set none."""
    arms: dict[str, _Overrides] = Field({}, validation_alias=AliasPath("spec", "arms"))
    """Arm -> dotted config field -> value; the preset is always among them, whoever sets it."""
    presets: dict[str, _TunedPreset] = Field({}, validation_alias=AliasPath("spec", "presets"))

    @field_validator("arms")
    @classmethod
    def _name_presets(cls, arms: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        return {arm: {PRESET: info.data.get("preset"), **fields} for arm, fields in arms.items()}

    @property
    def tuning(self) -> dict[str, dict[str, Tuning]]:
        """Preset -> optimizer -> how it was tuned, where that is on record."""
        return {
            name: {optimizer: part.tuning for optimizer, part in preset.optimizers.items() if part.tuning}
            for name, preset in self.presets.items()
        }

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a plan; None where there is none (a lone run). Raises: UserError when the file is damaged."""
        return _read(cls, path, "damaged study file") if path.exists() else None


def _read(model: type[_Model], path: Path, complaint: str) -> _Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(f"{path}: {complaint} ({where}: {first['msg']})") from None

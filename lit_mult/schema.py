"""Schemas of the JSON files of studies, runs and evaluations. Needs no torch.

Records are written atomically and never rewritten. `analysis.frame` reads run records as plain JSON, for speed.
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
"""The preset in which every multiplier is 1: untuned."""
NEGLIGIBLE: Final = 0.01
"""Nats per token, 1 % of the perplexity: two losses that differ by no more are called equal, and this is the margin of
questions that name none. It must not exceed the effects in question, which are 0.01 to 0.06 nats."""
PRESET: Final = "parametrization.preset"
WIDTH: Final = "model.d_model"
Measure = Literal["best_loss", "sensitivity", "mean_loss"]
_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Question(_Section):
    """A comparison that a study declares before it runs; the p values of all of its questions are corrected together.

    A factor that neither side fixes and `over` does not name makes a question of each of its values.
    """

    of: dict[str, Any]
    """What is asked about: factor -> value, with `arm` for the arm; a bare name is an arm."""
    against: dict[str, Any]
    """What it is compared with, at equal values of all other factors, and equal seeds."""
    measure: Measure = "best_loss"
    """best_loss: at the best rate. sensitivity: to the learning rate. mean_loss: over the learning rates."""
    over: list[str] = [WIDTH]
    """Factors over whose values a seed's difference is averaged."""
    margin: float = Field(NEGLIGIBLE, gt=0)
    """Nats per token: an interval within -margin to margin shows that the sides are equivalent."""

    @field_validator("of", "against", mode="before")
    @classmethod
    def _from_arm(cls, side: Any) -> Any:
        return {"arm": side} if isinstance(side, str) else side


class CellInfo(_Section):
    """Place of a run in its study."""

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
    """Not of the planned grid: at a learning rate that was added beyond an edge, or around the optimum."""
    refines: bool = False
    """A further seed at the rates around the optimum, to narrow the interval of a declared question."""
    judged: bool = False
    """Of a fresh seed, at the values that other seeds chose: best losses are judged on such seeds alone."""


class _Record(_Section):
    schema_version: Literal[1] = SCHEMA_VERSION
    _kind: ClassVar[str]
    _indent: ClassVar[int | None] = 1

    def write(self, path: Path) -> None:
        """Write the record atomically. Raises: UserError when it exists, or cannot be written."""
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


class MatrixRegime(_Section):
    """How far a run takes a matrix towards the balance of noise and weight decay (arXiv:2601.04890 eq. 1)."""

    equilibrium_time: float | None
    """Steps at the peak lr that the balance takes, 1 / (lr * weight_decay); None without decay."""
    decay_times: float | None
    """lr * weight_decay * steps, of the steps between warmup and final decay: the length of the run in equilibrium
    times. 0 at weight decay 0; None under an optimizer that does not decay (hyperball): there is no such balance."""


class RunRecord(_Record):
    """One finished run, with everything needed to repeat it, or to analyse it without checkpoints."""

    _kind: ClassVar[str] = "run record"

    status: Literal["completed", "diverged", "pruned"]
    """diverged: the loss became non-finite or rose far above its start; a data point, not a failure. pruned: stopped
    early by the study's pruner."""
    config: dict[str, Any]
    """The full `RunConfig` as plain values."""
    config_hash: str
    seed: int
    cell: CellInfo | None = None
    """None for a run outside a study."""
    git_commit: str | None
    """Commit of the code, with `+dirty` for uncommitted changes; None outside git."""
    versions: dict[str, str]
    """Versions of Python and of the packages that computed the run."""
    device: str
    members: int = 1
    """Number of runs in its stack, itself included."""
    started_at: str
    """UTC, ISO 8601."""
    corpus_hash: str
    """Hash of the documents, their split and the tokenizer."""
    train_tokens_available: int
    """Tokens in the training split."""
    parameters: dict[str, int]
    """Number of trainable parameters: total, non_embedding, multipliers."""
    regime: dict[str, MatrixRegime] = {}
    """Role of a matrix -> how far the planned steps take it towards the balance (`method.regime`); empty in older
    records."""
    steps: int
    """Optimizer steps done; fewer than train.steps when diverged or pruned."""
    tokens: int
    """Tokens trained on."""
    wall_seconds: float
    """Seconds in training and validation, summed over resumed parts; in a stack, the run's share."""
    tokens_per_second: float
    """Training tokens per second of training time, without validation; in a stack, of the run's share."""
    initial_loss: float | None
    """Validation loss before the first step, nats per token; None when it is not finite."""
    final_loss: float | None
    """Validation loss after the last step, nats per token; None when diverged or pruned."""
    best_loss: float | None
    """Lowest validation loss, nats per token, including the initial one; None when none is finite."""
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
    """Score of each item, whose mean is the value; empty if the value is not a mean over items."""
    items_hash: str
    """Hash of the items in their order: scores with equal hash pair item by item."""
    side: Literal["knowledge", "reasoning"] | None = None
    chance: float | None = None
    """Score of guessing, where it is known."""
    num_fewshot: int | None = None
    """Examples in the prompt."""


class EvaluationRecord(_Record):
    """Downstream scores of one checkpoint."""

    _kind: ClassVar[str] = "evaluation record"
    _indent: ClassVar[int | None] = None  # thousands of items, of which each would have a line

    suite: str
    """mini, paper, or the names of tasks."""
    label: str
    """The suite with its options, such as "mini, 2 shots": scores of equal label are comparable."""
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
    """Examples in the prompt; None: as each task sets them."""
    limit: int | None
    """Items of each task; None: all."""
    max_length: int
    """Context length in tokens."""
    truncated: int
    """Requests that were longer than the context and lost their beginning."""
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
    """Cost and gain of tuning a preset's multipliers, for a fair comparison with learned ones."""

    model_config = ConfigDict(allow_inf_nan=False)

    study: str
    """Name of the tuning study."""
    trials: int
    """Settings of the nuisance factors that were tried."""
    runs: int
    """Runs of all trials on all seeds, including pruned and diverged ones; also in tokens, flops and seconds."""
    completed: int
    """Runs that reached their last step."""
    pruned: int
    """Runs that the study's pruner stopped early."""
    diverged: int
    """Runs whose loss became non-finite or rose far above its start."""
    tokens: int
    """Tokens trained on, summed over the runs."""
    flops: float
    """Floating-point operations of training: 6 * parameters * tokens, summed over the runs."""
    seconds: float
    """Wall time in training and validation, summed over the runs."""
    d_model: int
    """Width of the trials."""
    base_d_model: int
    """Their `parametrization.base_d_model`."""
    steps: int
    """Optimizer steps of a trial."""
    batch_size: int
    """Sequences in one step."""
    seq_len: int
    """Tokens in one sequence."""
    lr: float
    """Base learning rate (`optim.lr`) of the best trial."""
    best_loss: float
    """Final validation loss of the best trial, nats per token: mean over the fresh seeds or, without them, its own."""
    default_loss: float | None = None
    """The same for the best trial with all multipliers 1; None when none completed."""
    seeds: list[int]
    """Seeds of the trials."""
    fresh_seeds: list[int] = []
    """Seeds on which the best trials ran again, and the best of them was chosen; none without a re-ranking."""
    tier: Tier
    """Tier that was tuned."""
    git_commit: str | list[str] | None = None
    """Commit, or commits, of the trials; None outside git."""
    corpus_hash: str
    """Hash of the documents, their split and the tokenizer."""

    @property
    def selected_on(self) -> list[int]:
        """All seeds on which the preset was selected, so that they cannot evaluate it."""
        return sorted({*self.seeds, *self.fresh_seeds})

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Older files have no d_model, as their trials ran at the base width, nor runs, of which a trial had one."""
        if not isinstance(data, dict):
            return data
        older = {"d_model": "base_d_model", "runs": "trials"}
        return {name: data[source] for name, source in older.items() if source in data} | data


_Overrides = Annotated[dict[str, Any], BeforeValidator(lambda fields: {} if fields is None else fields)]


class _PlanPart(BaseModel):
    """A part of a plan; its other fields are `study.spec`'s."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class _Tuned(_PlanPart):
    tuning: Tuning | None = None


class _TunedPreset(_PlanPart):
    optimizers: dict[str, _Tuned] = {}


class StudyPlan(_PlanPart):
    """The part of study.json that a report needs."""

    name: str
    title: str = ""
    cells: int
    """Number of runs planned."""
    experiment: str | None = None
    """Name of its experiment (`config.Experiment`); None: a comparison of arms over learning rates."""
    preset: str = Field(NEUTRAL, validation_alias=AliasPath("spec", "base", "parametrization", "preset"))
    """Preset of arms that set none."""
    arms: dict[str, _Overrides] = Field({}, validation_alias=AliasPath("spec", "arms"))
    """Arm -> dotted config field -> value, always including the preset."""
    presets: dict[str, _TunedPreset] = Field({}, validation_alias=AliasPath("spec", "presets"))
    questions: list[Question] = Field([], validation_alias=AliasPath("spec", "questions"))
    seeds_per_trial: int = Field(1, validation_alias=AliasPath("spec", "budget", "seeds_per_trial"))
    """Seeds of a trial of a sampled search."""
    fresh_seeds: list[int] = Field([], validation_alias=AliasPath("spec", "rerank", "seeds"))
    """Seeds on which the best trials of a search run again."""
    judge_seeds: list[int] = Field([], validation_alias=AliasPath("spec", "judge_seeds"))
    """Seeds on which alone best losses are judged; none where they are judged on all."""

    @field_validator("arms")
    @classmethod
    def _name_presets(cls, arms: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        return {arm: {PRESET: info.data.get("preset"), **fields} for arm, fields in arms.items()}

    @property
    def tuning(self) -> dict[str, dict[str, Tuning]]:
        """Preset -> optimizer -> its tuning, if recorded."""
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

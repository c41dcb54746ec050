"""From the records of a tuning study to a preset: the best multipliers, their gain and their cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_mult.config import OptimizerName, RunConfig, differences
from lit_mult.errors import UserError
from lit_mult.layout import find_records
from lit_mult.method.presets import Preset, RoleMultipliers, run_multipliers
from lit_mult.schema import CellInfo, RunRecord, Tuning

_FIELDS = ("parametrization.forward", "parametrization.lr", "parametrization.weight_decay")


@dataclass(frozen=True)
class _Trial:
    """One run of the study."""

    cell: CellInfo
    config: RunConfig
    record: RunRecord
    multipliers: RoleMultipliers
    """As used by the run."""

    @property
    def setting(self) -> str:
        """Hash of the config without its seed."""
        return self.config.model_copy(update={"seed": 0}).hash

    @property
    def conditions(self) -> dict[str, Any]:
        """Must be equal in all trials of an optimizer, or their losses are not comparable."""
        return self.cell.factors | {"model.d_model": self.config.model.d_model, "corpus": self.record.corpus_hash}


@dataclass(frozen=True)
class _Result:
    """Completed trials that differ only in their seed."""

    trials: Sequence[_Trial]

    @property
    def loss(self) -> float:
        """Mean final validation loss, nats per token."""
        return fmean(trial.record.final_loss for trial in self.trials if trial.record.final_loss is not None)

    @property
    def is_default(self) -> bool:
        used = self.trials[0].multipliers
        return all(value == 1 for part in (used.forward, used.lr, used.weight_decay) for value in part.values())


def tuned_preset(folder: Path, arm: str | None = None) -> Preset:
    """The best multipliers that a tuning study has found so far, for each of its optimizers.

    The best trial is the completed one with the lowest final validation loss: the mean over its seeds; of equal means,
    that over more seeds. The preset has the multipliers that the trial used: its preset's too, and none that its tier
    leaves out. Numbers are rounded to six significant digits.

    Args:
        folder: results folder of the study, finished or not.
        arm: needed when the study tuned several arms.

    Raises:
        UserError: there are no records of one study, no such arm, or no completed trial of an optimizer, or the trials
            differ in width or data.
    """
    trials = _read(folder)
    study = trials[0].cell.study
    arm = _choose_arm(folder, trials, arm)
    by_optimizer: dict[OptimizerName, list[_Trial]] = defaultdict(list)
    for trial in trials:
        if trial.cell.arm == arm:
            by_optimizer[trial.config.optimizer].append(trial)
    optimizers = {name: _tuned(folder, name, by_optimizer[name]) for name in sorted(by_optimizer)}
    tunings = [tuned.tuning for tuned in optimizers.values() if tuned.tuning is not None]
    counts = " and ".join(f"{tuning.trials} trials of {name}" for name, tuning in zip(optimizers, tunings, strict=True))
    corpora = ", ".join(sorted({tuning.corpus_hash for tuning in tunings}))
    commits = ", ".join(_commits(trial for group in by_optimizer.values() for trial in group)) or "unknown"
    source = f"Best of {counts} in the tuning study {study}, arm {arm}, on corpus {corpora} at commit {commits}."
    return Preset(name=study, source=source, optimizers=optimizers)


def _read(folder: Path) -> list[_Trial]:
    trials = []
    for path in find_records(folder):
        record = RunRecord.read(path)
        if record.cell is None:
            continue
        try:
            config = RunConfig.from_dict(record.config)
            trials.append(_Trial(record.cell, config, record, run_multipliers(config)))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if not trials:
        raise UserError(f"{folder}: no records of a study here; give the results folder of a tuning study")
    if len(studies := sorted({trial.cell.study for trial in trials})) > 1:
        raise UserError(f"{folder}: holds several studies ({', '.join(studies)}); give the folder of one")
    return trials


def _choose_arm(folder: Path, trials: Iterable[_Trial], arm: str | None) -> str:
    tuned = sorted({trial.cell.arm for trial in trials if any(map(_is_multiplier, trial.cell.nuisance))})
    if not tuned:
        raise UserError(f"{folder}: is not a tuning study: no trial set any of {', '.join(_FIELDS)}")
    if arm is None and len(tuned) > 1:
        raise UserError(f"{folder}: several arms were tuned; choose one with --arm: {', '.join(tuned)}")
    if arm is not None and arm not in tuned:
        raise UserError(f"{folder}: no multipliers were tuned in an arm {arm}; --arm must be one of {', '.join(tuned)}")
    return arm or tuned[0]


def _is_multiplier(field: str) -> bool:
    return any(field == part or field.startswith(f"{part}.") for part in _FIELDS)


def _tuned(folder: Path, optimizer: OptimizerName, trials: Sequence[_Trial]) -> RoleMultipliers:
    for trial in trials[1:]:
        if change := differences(trials[0].conditions, trial.conditions):
            need = "a tuning study has one width and one corpus"
            raise UserError(f"{folder}: losses of {optimizer} trials do not compare ({change}); {need}")
    by_setting = defaultdict(list)
    for trial in trials:
        if trial.record.final_loss is not None:  # neither diverged nor pruned
            by_setting[trial.setting].append(trial)
    results = [_Result(same) for same in by_setting.values()]
    if not results:
        raise UserError(f"{folder}: no trial of {optimizer} has completed; resume the study")
    best = min(results, key=lambda result: (result.loss, -len(result.trials)))
    config, used = best.trials[0].config, best.trials[0].multipliers
    status = Counter(trial.record.status for trial in trials)
    commits = _commits(trials)
    default_losses = [_rounded(result.loss) for result in results if result.is_default]
    tuning = Tuning(
        study=trials[0].cell.study,
        trials=len(trials),
        completed=status["completed"],
        pruned=status["pruned"],
        diverged=status["diverged"],
        tokens=sum(trial.record.tokens for trial in trials),
        flops=_rounded(sum(6.0 * trial.record.parameters["total"] * trial.record.tokens for trial in trials)),
        seconds=_rounded(sum(trial.record.wall_seconds for trial in trials)),
        d_model=config.model.d_model,
        base_d_model=config.parametrization.base_d_model,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        seq_len=config.data.seq_len,
        lr=_rounded(config.optim.lr),
        best_loss=_rounded(best.loss),
        default_loss=min(default_losses, default=None),
        seeds=sorted({trial.record.seed for trial in trials}),
        tier=config.parametrization.tier,
        git_commit=commits if len(commits) > 1 else next(iter(commits), None),
        corpus_hash=trials[0].record.corpus_hash,
    )
    return RoleMultipliers(
        forward={role: _rounded(value) for role, value in used.forward.items()},
        lr={role: _rounded(value) for role, value in used.lr.items()},
        weight_decay={role: _rounded(value) for role, value in used.weight_decay.items()},
        tuning=tuning,
    )


def _commits(trials: Iterable[_Trial]) -> list[str]:
    return sorted({trial.record.git_commit for trial in trials if trial.record.git_commit is not None})


def _rounded(value: float) -> float:
    """Round to six significant digits, far below the noise of a loss."""
    return float(f"{value:.6g}")

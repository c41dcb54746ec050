"""From the records of a tuning study to a preset: the best multipliers, their gain and their cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_mult.config import RunConfig, differences
from lit_mult.errors import UserError, one_of
from lit_mult.layout import StudyPaths, find_records
from lit_mult.method.presets import Preset, RoleMultipliers, run_multipliers
from lit_mult.schema import CellInfo, RunRecord, StudyPlan, Tuning

_FIELDS = ("parametrization.forward", "parametrization.lr", "parametrization.weight_decay")


@dataclass(frozen=True)
class _Run:
    """One run of the study: a trial on one seed."""

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
    """Completed runs that differ only in their seed."""

    runs: Sequence[_Run]

    @property
    def loss(self) -> float:
        """Mean final validation loss, nats per token."""
        return fmean(run.record.final_loss for run in self.runs if run.record.final_loss is not None)

    @property
    def is_default(self) -> bool:
        used = self.runs[0].multipliers
        return all(value == 1 for part in (used.forward, used.lr, used.weight_decay) for value in part.values())


def tuned_preset(folder: Path, arm: str | None = None) -> Preset:
    """The best multipliers that a tuning study has found so far, for each of its optimizers.

    The best trial is the one with the lowest final validation loss, of those that completed on all of their seeds: the
    mean over its seeds; of equal means, that over more seeds. In a study with a re-ranking it is the mean over fresh
    seeds alone, of the trials that completed on all of those. The preset has the multipliers that the trial used: its
    preset's too, and none that its tier leaves out. Numbers are rounded to six significant digits.

    Args:
        folder: results folder of the study, finished or not.
        arm: needed when the study tuned several arms.

    Raises:
        UserError: there are no records of one study, no such arm, or no completed trial of an optimizer, or the trials
            differ in width or data.
    """
    runs = _read(folder)
    study = runs[0].cell.study
    arm = _choose_arm(folder, runs, arm)
    by_optimizer: dict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        if run.cell.arm == arm:
            by_optimizer[run.config.optimizer].append(run)
    plan = StudyPlan.read(StudyPaths(folder).plan)
    optimizers = {name: _tuned(folder, name, by_optimizer[name], plan) for name in sorted(by_optimizer)}
    tunings = [tuned.tuning for tuned in optimizers.values() if tuned.tuning is not None]
    counts = " and ".join(f"{tuning.trials} trials of {name}" for name, tuning in zip(optimizers, tunings, strict=True))
    corpora = ", ".join(sorted({tuning.corpus_hash for tuning in tunings}))
    commits = ", ".join(_commits(run for group in by_optimizer.values() for run in group)) or "unknown"
    fresh = ", ".join(map(str, plan.fresh_seeds)) if plan else ""
    ranked = f", re-ranked on seeds {fresh}," if fresh else ""
    source = (
        f"Best of {counts}{ranked} in the tuning study {study}, arm {arm}, on corpus {corpora} at commit {commits}."
    )
    return Preset(name=study, source=source, optimizers=optimizers)


def _read(folder: Path) -> list[_Run]:
    runs = []
    for path in find_records(folder):
        record = RunRecord.read(path)
        if record.cell is None:
            continue
        try:
            config = RunConfig.from_dict(record.config)
            runs.append(_Run(record.cell, config, record, run_multipliers(config)))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if not runs:
        raise UserError(f"{folder}: no records of a study here; give the results folder of a tuning study")
    if len(studies := sorted({run.cell.study for run in runs})) > 1:
        raise UserError(f"{folder}: holds several studies ({', '.join(studies)}); give the folder of one")
    return runs


def _choose_arm(folder: Path, runs: Iterable[_Run], arm: str | None) -> str:
    tuned = sorted({run.cell.arm for run in runs if any(map(_is_multiplier, run.cell.nuisance))})
    if not tuned:
        raise UserError(f"{folder}: is not a tuning study: no trial set any of {', '.join(_FIELDS)}")
    if arm is None and len(tuned) > 1:
        raise UserError(f"{folder}: several arms were tuned; choose one with --arm: {', '.join(tuned)}")
    if arm is not None and arm not in tuned:
        raise UserError(
            f"{folder}: no multipliers were tuned in an arm {arm}; --arm must be one of {one_of(arm, tuned)}"
        )
    return arm or tuned[0]


def _is_multiplier(field: str) -> bool:
    return any(field == part or field.startswith(f"{part}.") for part in _FIELDS)


def _tuned(folder: Path, optimizer: str, runs: Sequence[_Run], plan: StudyPlan | None) -> RoleMultipliers:
    for run in runs[1:]:
        if change := differences(runs[0].conditions, run.conditions):
            need = "a tuning study has one width and one corpus"
            raise UserError(f"{folder}: losses of {optimizer} trials do not compare ({change}); {need}")
    fresh = set(plan.fresh_seeds) if plan else set()
    selecting = [run for run in runs if run.record.seed in fresh] if fresh else runs
    results = _results(selecting, len(fresh) or (plan.seeds_per_trial if plan else 1))
    if not results:
        on_all = " on all fresh seeds" if fresh else ""
        raise UserError(f"{folder}: no trial of {optimizer} has completed{on_all}; resume the study")
    best = min(results, key=lambda result: (result.loss, -len(result.runs)))
    config, used = best.runs[0].config, best.runs[0].multipliers
    status = Counter(run.record.status for run in runs)
    commits = _commits(runs)
    default_losses = [_rounded(result.loss) for result in results if result.is_default]
    tuning = Tuning(
        study=runs[0].cell.study,
        trials=len({run.setting for run in runs}),
        runs=len(runs),
        completed=status["completed"],
        pruned=status["pruned"],
        diverged=status["diverged"],
        tokens=sum(run.record.tokens for run in runs),
        flops=_rounded(sum(6.0 * run.record.parameters["total"] * run.record.tokens for run in runs)),
        seconds=_rounded(sum(run.record.wall_seconds for run in runs)),
        d_model=config.model.d_model,
        base_d_model=config.parametrization.base_d_model,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        seq_len=config.data.seq_len,
        lr=_rounded(config.optim.lr),
        best_loss=_rounded(best.loss),
        default_loss=min(default_losses, default=None),
        seeds=sorted({run.record.seed for run in runs} - fresh),
        fresh_seeds=sorted(fresh),
        tier=config.parametrization.tier,
        git_commit=commits if len(commits) > 1 else next(iter(commits), None),
        corpus_hash=runs[0].record.corpus_hash,
    )
    return RoleMultipliers(
        forward={role: _rounded(value) for role, value in used.forward.items()},
        lr={role: _rounded(value) for role, value in used.lr.items()},
        weight_decay={role: _rounded(value) for role, value in used.weight_decay.items()},
        tuning=tuning,
    )


def _results(runs: Iterable[_Run], seeds: int) -> list[_Result]:
    """The trials that completed on so many seeds or more, and neither diverged nor were pruned on any."""
    by_setting = defaultdict(list)
    for run in runs:
        by_setting[run.setting].append(run)
    ended = [_Result(same) for same in by_setting.values() if len(same) >= seeds]
    return [result for result in ended if all(run.record.final_loss is not None for run in result.runs)]


def _commits(runs: Iterable[_Run]) -> list[str]:
    return sorted({run.record.git_commit for run in runs if run.record.git_commit is not None})


def _rounded(value: float) -> float:
    """Round to six significant digits, far below the noise of a loss."""
    return float(f"{value:.6g}")

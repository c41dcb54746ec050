"""Trains a stack, from configs to records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from lit_mult.config import RunConfig
from lit_mult.data.cache import TokenizedCorpus, prepare
from lit_mult.errors import ConfigError
from lit_mult.layout import step_of
from lit_mult.registry.optimizers import check_stacked_form
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.stacked.callbacks import StackCheckpoints, StackHistory
from lit_mult.stacked.key import stack_key
from lit_mult.stacked.module import LitStack, StackDataModule
from lit_mult.training.checkpoints import RngState
from lit_mult.training.fitting import check_trainer_arguments, fit, make_trainer, quiet_lightning
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import Curve, History
from lit_mult.training.module import make_module
from lit_mult.training.recording import make_record


@dataclass(frozen=True)
class Member:
    """A run of a stack."""

    config: RunConfig
    out: Path
    """Its folder; new, or holding this same run, to resume."""
    cell: CellInfo | None = None
    record_path: Path | None = None
    """Where to write the record; by default `out/record.json`."""
    keep_checkpoint: bool = True
    """Write `out/checkpoints/final.ckpt`."""


def run_stack(
    members: Sequence[Member],
    *,
    on_progress: Callable[[int, int, float], None] | None = None,
    prune: Callable[[int, Curve], bool] | None = None,
    on_record: Callable[[int, RunRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[RunRecord]:
    """Train runs of equal shapes as one stack; the records are those of `run` up to rounding.

    A run resumes from its newest checkpoint, written by a stack or by `run`; runs with checkpoints of different steps
    train in a stack per step. Finished runs return their records at once. A member that diverges or is pruned gets its
    record at once, and the others continue.

    Args:
        members: runs with equal `stack_key`.
        on_progress: called with (member, step, training loss) every `train.log_every` steps.
        prune: called with (member, validation curve), see `run`; True ends the member.
        on_record: called with (member, record) for every record that is written.
        should_stop: called after every step; True writes checkpoints and raises `Interrupted`, like a signal.

    Returns:
        The records in the order of the members.

    Raises:
        ValueError: the members cannot be stacked.
        ConfigError: an optimizer or the precision has no stacked form.
        UserError: the data, a folder or a Trainer flag is not usable.
        Interrupted: on SIGINT, SIGTERM or `should_stop`; checkpoints were written first.
    """
    for member in members:
        check_stacked_form(member.config.optimizer)
        if member.config.trainer.precision == "bf16-true":
            allowed = "has parameters of two types, which a stack cannot hold; use bf16-mixed, or runs by themselves"
            raise ConfigError("trainer.precision", "bf16-true", allowed)
    keys = {stack_key(member.config) for member in members}
    if len(keys) != 1 or None in keys:
        raise ValueError("only runs of equal shapes, data and budget can be stacked")
    config = members[0].config
    check_trainer_arguments(config)
    corpus = prepare(config.data)
    records: dict[int, RunRecord] = {}
    folders: dict[int, RunFolder] = {}
    for index, member in enumerate(members):
        folder = RunFolder(member.out)
        finished = folder.finished(member.config, corpus.hash)
        if finished is not None:
            records[index] = finished
            continue
        folder.claim(member.config, corpus.hash)
        folders[index] = folder
    histories = [
        History(
            member.config.train,
            None if on_progress is None else partial(on_progress, index),
            None if prune is None else partial(prune, index),
        )
        for index, member in enumerate(members)
    ]

    def finish(index: int, record: RunRecord) -> None:
        records[index] = record
        if on_record is not None:
            on_record(index, record)

    with quiet_lightning():
        for checkpoints in _by_step(folders):
            runs = [
                _Run(members[index], folders[index], histories[index], path, partial(finish, index))
                for index, path in checkpoints.items()
            ]
            _train(runs, corpus, should_stop)
    return [records[index] for index in range(len(members))]


def _by_step(folders: dict[int, RunFolder]) -> list[dict[int, Path | None]]:
    """Group members by the step of the checkpoint to resume from, a step that all members have if there is one.

    A stack that was killed while it saved leaves the newest checkpoint of some members, and the previous one of all.
    """
    by_member = {index: {step_of(path): path for path in folder.resumable()} for index, folder in folders.items()}
    common = set.intersection(*(set(steps) for steps in by_member.values())) if by_member else set()
    groups: defaultdict[int, dict[int, Path | None]] = defaultdict(dict)
    for index, steps in by_member.items():
        step = max(common or steps, default=0)
        groups[step][index] = steps.get(step)
    return list(groups.values())


@dataclass(frozen=True)
class _Run:
    """A member that trains."""

    member: Member
    folder: RunFolder
    history: History
    checkpoint: Path | None
    """To resume from; all members of a stack have one of the same step, or all have none."""
    on_record: Callable[[RunRecord], None]


def _train(runs: Sequence[_Run], corpus: TokenizedCorpus, should_stop: Callable[[], bool] | None) -> None:
    """Train members whose checkpoints have the same step, and write their records."""
    config, folders = runs[0].member.config, [run.folder for run in runs]
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    unfinished = list(range(len(runs)))

    def finish(index: int) -> None:
        run, member = runs[index], runs[index].member
        if member.keep_checkpoint:
            module.save_member(index, run.folder.final_checkpoint)
        record = make_record(
            member.config,
            corpus,
            module.members[index].plan,
            module.members[index].plan_parameters(),
            run.history,
            trainer,
            started_at=started_at,
            cell=member.cell,
            members=len(runs),
        )
        record.write(member.record_path or run.folder.record)
        run.folder.clear_checkpoints(keep_final=member.keep_checkpoint)
        unfinished.remove(index)
        run.on_record(record)

    models = [make_module(run.member.config, corpus.vocab_size) for run in runs]
    module = LitStack(models, [run.checkpoint for run in runs if run.checkpoint is not None])
    history = StackHistory([run.history for run in runs], on_leave=finish)
    checkpoints = StackCheckpoints(module, history, folders, should_stop)
    trainer = make_trainer(config, folders[0], history, [RngState(config), checkpoints])
    data = StackDataModule(config, corpus, module.seeds)
    fit(trainer, module, data, history, runs[0].checkpoint)
    for index in list(unfinished):
        finish(index)

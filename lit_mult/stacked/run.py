"""Runs of equal shapes, trained together, from configs to records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lit_mult.config import RunConfig
from lit_mult.data.cache import TokenizedCorpus, prepare
from lit_mult.data.module import StackDataModule
from lit_mult.layout import step_of
from lit_mult.registry.optimizers import check_stacked_form
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.stacked.key import stack_key
from lit_mult.stacked.module import LitStack, StackCheckpoints, StackHistory
from lit_mult.training.checkpoints import RngState, save_checkpoint
from lit_mult.training.curves import Curve, Curves
from lit_mult.training.fitting import (
    check_trainer_arguments,
    fit,
    make_module,
    make_trainer,
    quiet_lightning,
    take_folder,
)
from lit_mult.training.folder import RunFolder
from lit_mult.training.recording import make_record


@dataclass(frozen=True)
class Member:
    """A run of a stack."""

    config: RunConfig
    out: Path
    """Its folder; new, or holding this same run, to go on with."""
    cell: CellInfo | None = None
    record_path: Path | None = None
    """Where to write the record; by default `out/record.json`."""
    keep_checkpoint: bool = True
    """Leave `out/checkpoints/final.ckpt` behind."""


@dataclass(frozen=True)
class _Calls:
    """Whom to tell what, by the member's index."""

    on_progress: Callable[[int, int, float], None] | None
    prune: Callable[[int, Curve], bool] | None
    on_record: Callable[[int, RunRecord], None] | None
    should_stop: Callable[[], bool] | None


def run_stack(
    members: Sequence[Member],
    *,
    on_progress: Callable[[int, int, float], None] | None = None,
    prune: Callable[[int, Curve], bool] | None = None,
    on_record: Callable[[int, RunRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[RunRecord]:
    """Train runs of equal shapes as one stack, and leave a record of each, the same as `run` would up to rounding.

    A run goes on from its newest checkpoint, whether a stack wrote it or `run`; those that have come to different steps
    make a stack for each. One that has finished gives its record at once. A member that diverges, or is pruned, has its
    record at once, too, and the others train on.

    Args:
        members: runs with equal `parametrization.stacking.stack_key`.
        on_progress: called with (member, step, training loss) every `train.log_every` steps.
        prune: called with (member, validation curve) after every validation on the way; True ends the member there.
        on_record: called with (member, record) for every record that is written.
        should_stop: asked after every step; True writes checkpoints and raises `Interrupted`, as a signal does.

    Returns:
        The records in the order of the members.

    Raises:
        ValueError: the members cannot be stacked.
        ConfigError: an optimizer has no stacked form.
        UserError: the data, a folder or a Trainer flag is not usable.
        Interrupted: SIGINT or SIGTERM came, or `should_stop` said so; checkpoints were written first.
    """
    for member in members:
        check_stacked_form(member.config.optimizer)
    keys = {stack_key(member.config) for member in members}
    if len(keys) != 1 or None in keys:
        raise ValueError("only runs of equal shapes, data and budget can be stacked")
    calls = _Calls(on_progress, prune, on_record, should_stop)
    config = members[0].config
    check_trainer_arguments(config)
    corpus = prepare(config.data)
    records: dict[int, RunRecord] = {}
    to_run = []
    for index, member in enumerate(members):
        folder = RunFolder(member.out)
        finished = folder.finished(member.config, corpus.hash)
        if finished is not None:
            records[index] = finished
            continue
        take_folder(folder, member.config, corpus.hash)
        to_run.append(index)
    for checkpoints in _by_step({index: RunFolder(members[index].out) for index in to_run}):
        records |= _Stack(members, checkpoints, corpus, calls).run()
    return [records[index] for index in range(len(members))]


def _by_step(folders: dict[int, RunFolder]) -> list[dict[int, Path | None]]:
    """Members that can train together, each with the checkpoint to go on from: those that have one of the same step.

    A stack that was killed while it wrote has left the newest checkpoint of some members alone, and the one before of
    all of them.
    """
    steps = {index: {step_of(path): path for path in folder.resumable()} for index, folder in folders.items()}
    common = set.intersection(*(set(found) for found in steps.values())) if steps else set()
    groups: defaultdict[int, dict[int, Path | None]] = defaultdict(dict)
    for index, found in steps.items():
        step = max(common or found, default=0)
        groups[step][index] = found.get(step)
    return list(groups.values())


class _Stack:
    """Members at one step, from there to their records."""

    def __init__(
        self,
        members: Sequence[Member],
        checkpoints: dict[int, Path | None],
        corpus: TokenizedCorpus,
        calls: _Calls,
    ) -> None:
        self.indices = list(checkpoints)
        """Of the members in the order of the stack."""
        self.members = [members[index] for index in self.indices]
        self.calls = calls
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.corpus = corpus
        self.runs = [Curves(member.config.train) for member in self.members]
        on_progress, prune = calls.on_progress, calls.prune
        self.history = StackHistory(
            self.runs,
            None if on_progress is None else lambda member, *point: on_progress(self.indices[member], *point),
            None if prune is None else lambda member, curve: prune(self.indices[member], curve),
            on_end=self._finish,
        )
        self.folders = [RunFolder(member.out) for member in self.members]
        self.saving = StackCheckpoints(self.folders, self.history, self.members[0].config.train, calls.should_stop)
        self.paths = [path for path in checkpoints.values() if path is not None]
        self.records: dict[int, RunRecord] = {}

    def run(self) -> dict[int, RunRecord]:
        """Train to the end; the records by index of the member."""
        config = self.members[0].config
        with quiet_lightning():
            models = [make_module(member.config, self.corpus.vocab_size) for member in self.members]
            self.module = LitStack(models, self.paths)
            self.trainer = make_trainer(config, self.folders[0], [self.history, RngState(), self.saving])
            data = StackDataModule(config, self.corpus, self.module.seeds)
            data.check(self.trainer.world_size)
            fit(self.trainer, self.module, data, self.history, self.paths[0] if self.paths else None)
            for member in range(len(self.members)):
                if self.indices[member] not in self.records:
                    self._finish(member)
        return self.records

    def _finish(self, member: int) -> None:
        """Write the record of a member that has come to its end, and tell of it."""
        one, folder = self.members[member], self.saving.of(member, self.trainer)
        if one.keep_checkpoint:
            save_checkpoint(self.trainer, folder.final_checkpoint)
        record = make_record(
            one.config,
            self.corpus,
            self.module.members[member].plan_parameters(),
            self.runs[member],
            steps=self.trainer.global_step,
            device=self.trainer.strategy.root_device,
            started_at=self.started_at,
            cell=one.cell,
            members=len(self.members),
        )
        record.write(one.record_path or folder.record)
        folder.clear_checkpoints(keep_final=one.keep_checkpoint)
        self.records[self.indices[member]] = record
        if self.calls.on_record is not None:
            self.calls.on_record(self.indices[member], record)

"""One training run from config to record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_mult.config import RunConfig, flatten
from lit_mult.data.cache import prepare
from lit_mult.data.module import TextDataModule
from lit_mult.diagnostics.recorder import Diagnostics
from lit_mult.errors import UserError
from lit_mult.optim import imported
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.training.checkpoints import Checkpoints, RngState, save_checkpoint
from lit_mult.training.fitting import check_trainer_arguments, fit, make_trainer, quiet_lightning
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import Curve, History
from lit_mult.training.module import make_module
from lit_mult.training.recording import make_record


def run(
    config: RunConfig,
    out: Path | str,
    *,
    cell: CellInfo | None = None,
    record_path: Path | None = None,
    diagnostics_path: Path | None = None,
    keep_checkpoint: bool = True,
    on_progress: Callable[[int, float], None] | None = None,
    prune: Callable[[Curve], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunRecord:
    """Train one model and write its record.

    A stopped run resumes from its newest checkpoint, with the result of an uninterrupted run (bit-identical on CPU). A
    finished run returns its record at once.

    Args:
        config: of the run.
        out: folder of the run; new, or holding this same run.
        cell: place in a study, for the record.
        record_path: where to write the record; by default `out/record.json`.
        diagnostics_path: where to write the readings of `train.diagnostics`; by default `out/diagnostics.parquet`.
        keep_checkpoint: write `out/checkpoints/final.ckpt`.
        on_progress: called with (step, training loss) every `train.log_every` steps.
        prune: called after every validation except the first and the last, with the validation curve [(step, loss)]
            without its first point; True ends the run with a record of status pruned.
        should_stop: called after every step; True writes a checkpoint and raises `Interrupted`, like a signal.
        callbacks: further Lightning callbacks.

    Raises:
        UserError: the data, the output folder or a Trainer flag is not usable.
        Interrupted: on SIGINT, SIGTERM or `should_stop`; a checkpoint was written first.
    """
    folder = RunFolder(Path(out))
    corpus = prepare(config.data)
    data = TextDataModule(config, corpus)
    check_trainer_arguments(config)
    imported.check(config.optimizer, config.optim)
    finished = folder.finished(config, corpus.hash)
    diagnostics_path = diagnostics_path or folder.diagnostics
    if finished is not None:
        if config.train.diagnostics and not diagnostics_path.is_file():
            raise UserError(f"--out {out}: the run in it has finished without train.diagnostics; name a new folder")
        return finished
    recorder = Diagnostics.of_run(config, corpus) if config.train.diagnostics else None

    history = History(config.train, on_progress, prune)
    torch.manual_seed(config.seed)  # for dropout, see RngState; initialization and data have separate generators
    with quiet_lightning():
        module = make_module(config, corpus.vocab_size)
        recorders = [] if recorder is None else [recorder]
        checkpoints = Checkpoints(folder, config.train, should_stop)
        trainer = make_trainer(config, folder, history, [RngState(config), *recorders, *callbacks, checkpoints])
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        data.check(trainer.world_size)
        if recorder is not None:
            recorder.check(trainer.world_size)
        if trainer.is_global_zero:
            folder.claim(config, corpus.hash)
        fit(trainer, module, data, history, folder.newest_checkpoint())
        if keep_checkpoint:
            save_checkpoint(trainer, folder.final_checkpoint)

    rows = module.plan_parameters()
    record = make_record(config, corpus, module.plan, rows, history, trainer, started_at=started_at, cell=cell)
    if trainer.is_global_zero:
        if isinstance(trainer.logger, TensorBoardLogger):
            final = record.final_loss if record.final_loss is not None else math.nan
            metrics = {"final_loss": final, "best_loss": record.best_loss if record.best_loss is not None else math.nan}
            trainer.logger.log_hyperparams(flatten(config.to_dict()), metrics)
            trainer.logger.finalize("success")
        if recorder is not None:
            # Before the record, which marks the run as finished.
            recorder.write(
                diagnostics_path, module, trainer.global_step, lambda: make_module(config, corpus.vocab_size).model
            )
        record.write(record_path or folder.record)
        folder.clear_checkpoints(keep_final=keep_checkpoint)
    return record

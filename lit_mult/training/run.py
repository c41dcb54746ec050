"""One training run from config to record."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_mult.config import RunConfig, flatten
from lit_mult.data.batches import validation_windows
from lit_mult.data.cache import TokenizedCorpus, prepare
from lit_mult.data.module import TextDataModule
from lit_mult.errors import ConfigError, Interrupted, UserError
from lit_mult.record import CellInfo, RunRecord
from lit_mult.training import trapped
from lit_mult.training.checkpoints import Checkpoints, RngState, save_checkpoint
from lit_mult.training.curves import Curve, Curves
from lit_mult.training.diagnostics import PROBE_WINDOWS, Diagnostics
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import History
from lit_mult.training.module import LitLlama
from lit_mult.training.readings import require_pyarrow
from lit_mult.training.recording import make_record

# Trainer arguments that follow from other fields of the config or carry the run's own machinery.
_OWN_TRAINER_ARGUMENTS = {
    "callbacks",
    "logger",
    "max_steps",
    "max_epochs",
    "max_time",
    "min_steps",
    "min_epochs",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "default_root_dir",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "use_distributed_sampler",
    "log_every_n_steps",
    "fast_dev_run",
    "overfit_batches",
    "limit_train_batches",
    "limit_val_batches",
    "reload_dataloaders_every_n_epochs",
}


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
    """Train one model and leave its record.

    A run that was stopped goes on from its newest checkpoint, with the result of a run never stopped (bit-identical
    on CPU); one that has finished returns its record at once.

    Args:
        config: everything that decides the outcome.
        out: folder of the run; new, or holding this same run.
        cell: place in a study, for the record.
        record_path: where to write the record; by default `out/record.json`.
        diagnostics_path: where to write the readings of `train.diagnostics`; by default `out/diagnostics.parquet`.
        keep_checkpoint: leave `out/checkpoints/final.ckpt` behind.
        on_progress: called with (step, training loss) every `train.log_every` steps.
        prune: called after every validation on the way with the validation curve by optimizer step, [(step, loss)];
            True ends the run there, with a record of status pruned.
        should_stop: asked after every step; True writes a checkpoint and raises `Interrupted`, as a signal does.
        callbacks: further Lightning callbacks.

    Raises:
        UserError: the data, the output folder or a Trainer flag is not usable.
        Interrupted: SIGINT or SIGTERM came, or `should_stop` said so; a checkpoint was written first.
    """
    folder = RunFolder(Path(out))
    corpus = prepare(config.data)
    data = TextDataModule(config, corpus)
    _check_trainer_arguments(config)
    finished = folder.finished(config, corpus.hash)
    diagnostics_path = diagnostics_path or folder.diagnostics
    if finished is not None:
        if config.train.diagnostics and not diagnostics_path.is_file():
            raise UserError(f"--out {out}: the run in it has finished without train.diagnostics; name a new folder")
        return finished
    watch = _diagnostics(config, corpus)

    curves = Curves(config.train)
    history = History(
        [curves],
        None if on_progress is None else lambda _, step, loss: on_progress(step, loss),
        None if prune is None else lambda _, curve: prune(curve),
    )
    torch.manual_seed(config.seed)  # dropout; initialization and data have generators of their own
    with _quiet_lightning():
        module = LitLlama(config.to_dict(), corpus.vocab_size)
        if config.model.pretrained is not None:
            from lit_mult.hf.pretrained import start_from_pretrained

            # A run that goes on, too: a damaged checkpoint sends it back to its start.
            start_from_pretrained(module.model, module.plan, config)
        watching = [] if watch is None else [watch]
        own = [history, RngState(), *watching, *callbacks, Checkpoints(folder, config.train, should_stop)]
        trainer = _trainer(config, folder, own)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        data.check(trainer.world_size)
        if watch is not None:
            watch.check(trainer.world_size)
        if trainer.is_global_zero:
            folder.claim(config, corpus.hash)
            for path in folder.set_aside_damaged():
                warnings.warn(f"{path}: damaged, set aside; going on from the one before, or the start", stacklevel=2)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=folder.newest_checkpoint(), weights_only=True)
            if curves.ended_at is None and curves.val[-1][0] != trainer.global_step:
                trainer.validate(module, datamodule=data, verbose=False)
        except SIGTERMException:  # it came where only Lightning was listening: before the first step or in validation
            raise Interrupted("stopped; the same command goes on from the last checkpoint") from None
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning makes an exit of
                raise KeyboardInterrupt from None
            raise
        if keep_checkpoint:
            save_checkpoint(trainer, folder.final_checkpoint)

    record = make_record(
        config,
        corpus,
        module.plan_parameters(),
        curves,
        steps=trainer.global_step,
        device=trainer.strategy.root_device,
        started_at=started_at,
        cell=cell,
    )
    if trainer.is_global_zero:
        if isinstance(trainer.logger, TensorBoardLogger):
            final = record.final_loss if record.final_loss is not None else math.nan
            metrics = {"final_loss": final, "best_loss": record.best_loss if record.best_loss is not None else math.nan}
            trainer.logger.log_hyperparams(flatten(config.to_dict()), metrics)
            trainer.logger.finalize("success")
        if watch is not None:
            if "brownian" in config.train.diagnostics:
                for step, reading in trapped.readings(module.model, config, corpus.vocab_size, trainer.global_step):
                    watch.readings.add(step, [reading])
            watch.write(diagnostics_path)  # before the record, with which the run counts as finished
        record.write(record_path or folder.record)
        for checkpoint in folder.checkpoints.glob("step=*.ckpt"):
            checkpoint.unlink(missing_ok=True)
        if not keep_checkpoint:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return record


def _diagnostics(config: RunConfig, corpus: TokenizedCorpus) -> Diagnostics | None:
    """What records `train.diagnostics`; None where nothing is to be recorded.

    Raises:
        UserError: pyarrow is not installed.
    """
    if not config.train.diagnostics:
        return None
    require_pyarrow()
    windows = min(PROBE_WINDOWS, config.train.batch_size // config.trainer.accumulate_grad_batches)
    probe_BT1 = torch.from_numpy(validation_windows(corpus.val, config.data.seq_len, windows))
    return Diagnostics(config.train, probe_BT1[:, :-1])


def _check_trainer_arguments(config: RunConfig) -> None:
    if any(start in config.trainer.strategy for start in ("spawn", "fork", "notebook")):
        allowed = "starts processes whose history this one would not see; use ddp"
        raise ConfigError("trainer.strategy", config.trainer.strategy, allowed)
    known = set(inspect.signature(Trainer).parameters)
    for name, value in config.trainer.extra.items():
        if name not in known:
            raise ConfigError(f"trainer.extra.{name}", value, "not an argument of lightning.Trainer")
        if name in _OWN_TRAINER_ARGUMENTS or name in type(config.trainer).model_fields:
            raise ConfigError(f"trainer.extra.{name}", value, "is set through other fields of the config")


def _trainer(config: RunConfig, folder: RunFolder, callbacks: list[Callback]) -> Trainer:
    train, flags = config.train, config.trainer
    logger: TensorBoardLogger | bool = False
    if flags.tensorboard:
        logger = TensorBoardLogger(folder.path, name="tensorboard", version="", default_hp_metric=False)
        callbacks = [LearningRateMonitor(logging_interval="step"), *callbacks]
    if flags.progress_bar:
        callbacks = [TQDMProgressBar(refresh_rate=train.log_every), *callbacks]
    try:
        return Trainer(
            accelerator=flags.accelerator,
            devices=flags.devices,
            num_nodes=flags.num_nodes,
            strategy=flags.strategy,
            precision=flags.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=flags.accumulate_grad_batches,
            callbacks=callbacks,
            logger=logger,
            max_steps=train.steps,
            max_epochs=-1,
            val_check_interval=(train.eval_every or train.steps) * flags.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # the whole validation set: the loss at initialization
            log_every_n_steps=train.log_every,
            enable_checkpointing=False,
            enable_progress_bar=flags.progress_bar,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
            **flags.extra,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:  # a flag it refuses
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's tips and start-up lines, which say nothing about this run, off the terminal."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", message=".*num_sanity_val_steps.*")
            warnings.filterwarnings("ignore", message=".*IterableDataset.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Builds Lightning's Trainer from a config, and fits with it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_mult.config import RunConfig, TrainerConfig
from lit_mult.errors import ConfigError, Interrupted, UserError, did_you_mean
from lit_mult.training import fsdp2
from lit_mult.training.folder import RunFolder
from lit_mult.training.history import History
from lit_mult.training.progress import RunProgress

_SET_BY: dict[str, str | None] = {
    **dict.fromkeys(("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs"), "train.steps"),
    **dict.fromkeys(("fast_dev_run", "limit_train_batches"), "train.steps"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "train.eval_every"),
    "log_every_n_steps": "train.log_every",
    "enable_checkpointing": "train.checkpoint_every",
    "overfit_batches": "data.max_documents",
    "limit_val_batches": "data.val_windows",
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"), "optim.clip"),
    "logger": "trainer.tensorboard",
    "enable_progress_bar": "trainer.progress_bar",
    "default_root_dir": "--out",
    **dict.fromkeys(("callbacks", "num_sanity_val_steps", "use_distributed_sampler"), None),
    "reload_dataloaders_every_n_epochs": None,
}
"""Arguments of Trainer that are not given by their names: the field that decides, or None where `make_trainer` does."""

_IGNORED_WARNINGS = (
    "LeafSpec",
    "does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "num_sanity_val_steps",
    "IterableDataset",
)


def check_trainer_arguments(config: RunConfig) -> None:
    """Raises: ConfigError when a Trainer argument is unknown, set by another field, or not supported."""
    if any(start in config.trainer.strategy for start in ("spawn", "fork", "notebook")):
        allowed = "starts processes whose losses this one cannot read; use ddp"
        raise ConfigError("trainer.strategy", config.trainer.strategy, allowed)
    if config.trainer.strategy.startswith("fsdp") and config.trainer.strategy != fsdp2.NAME:
        raise ConfigError("trainer.strategy", config.trainer.strategy, f"is not supported; use {fsdp2.NAME}")
    if config.trainer.strategy == fsdp2.NAME:
        fsdp2.check(config)
    known = trainer_arguments()
    for name, value in config.trainer.extra.items():
        field = f"trainer.extra.{name}"
        if name not in known:
            raise ConfigError(field, value, f"not an argument of lightning.Trainer{did_you_mean(name, known)}")
        if known[name] is None:
            raise ConfigError(field, value, "is set by lit_mult, and no field changes it")
        if known[name] != field:
            raise ConfigError(field, value, f"is set by {known[name]}")


def trainer_arguments() -> dict[str, str | None]:
    """Argument of Lightning's Trainer -> the field or option by which it is given here; None: it is not a choice."""
    names = inspect.signature(Trainer).parameters
    own = {name: f"trainer.{name}" for name in TrainerConfig.model_fields}
    return {name: f"trainer.extra.{name}" for name in names} | own | _SET_BY


def make_trainer(config: RunConfig, folder: RunFolder, history: History, callbacks: list[Callback]) -> Trainer:
    """The Trainer of a run in `folder`; the history comes first. Raises: UserError when Lightning refuses a flag."""
    train, flags = config.train, config.trainer
    callbacks = [history, *[RunProgress(history)] * flags.progress_bar, *callbacks]
    logger: TensorBoardLogger | bool = False
    if flags.tensorboard:
        logger = TensorBoardLogger(folder.path, name="tensorboard", version="", default_hp_metric=False)
        callbacks = [LearningRateMonitor(logging_interval="step"), *callbacks]
    try:
        return Trainer(
            accelerator=flags.accelerator,
            devices=flags.devices,
            num_nodes=flags.num_nodes,
            strategy=fsdp2.ShardedStrategy() if flags.strategy == fsdp2.NAME else flags.strategy,
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
            enable_progress_bar=False,  # `RunProgress` knows the steps, their rate and the time left
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
            # Gathered parameters that were made in inference mode could not be trained.
            **({"inference_mode": False} if flags.strategy == fsdp2.NAME else {}) | flags.extra,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None


def fit(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, history: History, checkpoint: Path | None
) -> None:
    """Train, from a checkpoint or from the start, and validate at the end. Raises: Interrupted on a stop request."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if history.lacks_validation(trainer.global_step):
            trainer.validate(module, datamodule=data, verbose=False)
    except SIGTERMException:  # Lightning handled the signal: before the first step or in validation
        raise Interrupted("stopped; to resume from the last checkpoint, give the same command again") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning converts it
            raise KeyboardInterrupt from None
        raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips and start-up messages."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=f".*{message}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""The LightningDataModule: batches as a function of (seed, step), the same on any number of devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows, Windows, validation_windows
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.errors import ConfigError


class _MicroBatches(IterableDataset[Tensor]):
    """This rank's share (B / world / accumulate, T+1) of every batch from a step on; infinite."""

    def __init__(
        self, batch: Callable[[int], Windows], first_step: int, accumulate: int, rank: int, world: int
    ) -> None:
        self.batch, self.first_step = batch, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __iter__(self) -> Iterator[Tensor]:
        step = self.first_step
        while True:
            batch = torch.from_numpy(self.batch(step))
            for micro_batch in batch.chunk(self.accumulate):
                yield micro_batch.chunk(self.world)[self.rank]
            step += 1


class TextDataModule(LightningDataModule):
    """Serves windows of T+1 tokens: x = window[:-1], y = window[1:].

    Training batches depend on (seed, step) alone, so that runs compare step by step and a run that is resumed at
    `trainer.global_step` sees what it would have seen.
    """

    def __init__(self, config: RunConfig, corpus: TokenizedCorpus) -> None:
        """Raises: UserError when a split of the corpus is shorter than one window."""
        super().__init__()
        self.config = config
        self.train_windows = TrainWindows(
            corpus.train, seq_len=config.data.seq_len, batch_size=config.train.batch_size, seed=config.seed
        )
        self.val_windows = torch.from_numpy(
            validation_windows(
                corpus.val, seq_len=config.data.seq_len, n=config.data.val_windows, offset=config.data.val_offset
            )
        )

    def train_batch(self, step: int) -> Windows:
        return self.train_windows.batch(step)

    def check(self, world: int) -> None:
        """Raises: ConfigError when a batch does not split evenly over processes, or one has no validation window."""
        accumulate = self.config.trainer.accumulate_grad_batches
        if self.config.train.batch_size % (world * accumulate):
            allowed = f"must be a multiple of devices * accumulate_grad_batches = {world} * {accumulate}"
            raise ConfigError("train.batch_size", self.config.train.batch_size, allowed)
        if len(self.val_windows) < world:
            allowed = f"give {len(self.val_windows)} windows of this corpus to {world} devices; each needs one"
            raise ConfigError("data.val_windows", self.config.data.val_windows, allowed)

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        batches = _MicroBatches(
            self.train_batch,
            first_step=self.trainer.global_step,
            accumulate=self.config.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        mine, first = (self.val_windows[rank :: self.trainer.world_size] for rank in (self.trainer.global_rank, 0))
        batches: Sequence[Tensor] = mine.split(self.config.train.batch_size)
        wanted = math.ceil(len(first) / self.config.train.batch_size)
        if len(batches) < wanted:  # rank 0 has one more window: sharded ranks need equal numbers of batches
            batches = mine.tensor_split(wanted)
        return DataLoader(cast(Dataset[Tensor], batches), batch_size=None)

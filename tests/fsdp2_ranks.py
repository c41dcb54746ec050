"""What two processes do in `test_fsdp2`: runs under FSDP2, and Lightning training of a model that is not ours.

Imported by those processes, hence without pytest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import sharded_training as several
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted
from lit_mult.inject.groups import build_param_groups
from lit_mult.inject.lightning import MultiplierCallback
from lit_mult.inject.model import add_multipliers
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.training.run import run

FOREIGN_STEPS = 10


def begin(config: RunConfig, out: Path) -> None:
    """Begin a run, which is stopped at once: one process stops after a step, several after `train.log_every`."""
    with suppress(Interrupted):
        run(config, out, should_stop=lambda: True)


class Windows(IterableDataset[Tensor]):
    """This rank's share of batches of 8 windows."""

    def __init__(self, trainer: lightning.Trainer, batches: int) -> None:
        self.rank, self.ranks, self.batches = trainer.global_rank, trainer.world_size, batches

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        text = torch.arange(6 * 8 * self.batches).square() % 11
        for batch in text.view(self.batches, 8, 6):
            yield batch[torch.randperm(8, generator=generator)][self.rank :: self.ranks]


class Lit(lightning.LightningModule):
    """Somebody's module."""

    def __init__(self) -> None:
        super().__init__()
        foreign = several.Foreign()
        self.model: nn.Module = add_multipliers(foreign, table="minimal", roles=several.ROLES, verbose=False)
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            several.shard_blocks(self.model)  # type: ignore[arg-type]

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, ids: Tensor, index: int) -> None:
        self.model(ids)

    def train_dataloader(self) -> Any:
        return DataLoader(Windows(self.trainer, FOREIGN_STEPS), batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(Windows(self.trainer, 1), batch_size=None)

    def configure_optimizers(self) -> Any:
        return HybridOptimizer(build_param_groups(self, lr=2e-2, optimizer="muon"))


def foreign_losses(folder: Path, strategy: Any, devices: int) -> list[float]:
    """Of every step, over the whole batch."""
    module = Lit()
    flags = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        val_check_interval=4,
        callbacks=[MultiplierCallback(max_norm=0.1)],
        use_distributed_sampler=False,
        default_root_dir=folder,
        **dict.fromkeys(flags, False),  # type: ignore[arg-type]
    )
    trainer.fit(module)
    return [float(trainer.strategy.reduce(loss, reduce_op="mean")) for loss in module.losses]


def work(rank: int, port: int, folder: Path, configs: dict[str, dict[str, Any]], stopped: str) -> None:
    """A process; `folder` has `from_one`, the run `stopped`, which one device has begun."""
    torch.set_num_threads(1)
    own = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    for name, config in configs.items():
        run(RunConfig.from_dict(config), folder / "two" / name)
    config = RunConfig.from_dict(configs[stopped])
    for out in ("stopped", "for_one"):
        begin(config, folder / out)
    for out in ("stopped", "from_one"):
        run(config, folder / out)
    strategies = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    found = {name: foreign_losses(folder, strategy, 2) for name, strategy in strategies.items()}
    torch.save(found, folder / f"foreign.{rank}.pt")
    torch.distributed.destroy_process_group()

"""FSDP2 for `trainer.strategy: fsdp2`: parameters, gradients and optimizer states sharded over the devices of a run.

`torch.distributed.fsdp.fully_shard` under Lightning's `ModelParallelStrategy`, with gloo on CPUs and nccl on GPUs. A
checkpoint is the file that one device writes, so that a run goes on on any number of devices, and whatever reads a
checkpoint reads these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError
from lit_mult.nn.llama import Llama
from lit_mult.optim.sharding import as_dtensor
from lit_mult.registry.optimizers import OPTIMIZERS, optimizers_of, unsupported

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAME = "fsdp2"
"""Value of `trainer.strategy`."""
PRECISIONS = ("32-true", "bf16-mixed")
"""Those in which all parameters have one type, which FSDP2 requires, and gradients are not scaled."""


def check(config: RunConfig) -> None:
    """Raises: ConfigError when a run does not support `fsdp2`."""
    if config.trainer.precision not in PRECISIONS:
        allowed = f"must be {' or '.join(PRECISIONS)} with trainer.strategy = {NAME}"
        raise ConfigError("trainer.precision", config.trainer.precision, allowed)
    if config.trainer.compile:
        raise ConfigError(
            "trainer.compile", True, f"does not compile sharded models; leave out trainer.strategy {NAME}"
        )
    if config.train.diagnostics:
        allowed = (
            f"read whole parameters, which no device has with trainer.strategy = {NAME}; use ddp, or leave them out"
        )
        raise ConfigError("train.diagnostics", ",".join(config.train.diagnostics), allowed)
    for name in optimizers_of(config.optimizer):
        if not OPTIMIZERS[name].sharded:
            raise unsupported(name, "sharded form", f"trainer.strategy = {NAME}")


def shard(model: Llama, mesh: DeviceMesh) -> None:
    """Shard every block, and the rest of the model, over a mesh of one dimension; nothing, if it is sharded.

    Parameters () remain whole, as FSDP2 does not take them: see `average_whole`.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):  # Lightning asks again before it validates
        return
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=scalars)


def average_whole(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients () of parameters that are not sharded over the ranks, as FSDP2 does the others."""
    gradients = [one.grad for one in parameters if one.grad is not None and as_dtensor(one) is None]
    if gradients:
        sums = torch.stack(gradients)
        dist.all_reduce(sums, group=mesh.get_group())
        torch._foreach_copy_(gradients, list(sums / mesh.size()))


class ShardedStrategy(ModelParallelStrategy):
    """Shards over all devices, and gathers a checkpoint on rank 0.

    Lightning's own is a folder of shards, or has optimizer states in an order that one device's has not.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes  # `auto` is the number of nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU of rank 0; one for a tied head and the embedding."""
        whole: dict[int, Tensor] = {}
        state = self._module.state_dict(keep_vars=True)
        for value in state.values():
            if id(value) not in whole:
                whole[id(value)] = self._whole(value)
        return {name: whole[id(value)] for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state_dict with whole tensors, on the CPU of rank 0."""
        state = optimizer.state_dict()
        states = {
            index: {name: self._whole(value) for name, value in own.items()} for index, own in state["state"].items()
        }
        return {**state, "state": states}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Mapped, as each rank keeps its shards alone.
        held: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)
        return held

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._module.state_dict()
        state = {
            name: _placed_as(own[name], value) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            indices = [index for group in state["param_groups"] for index in group["params"]]
            states = {
                index: {name: _placed_as(parameter, value) for name, value in state["state"][index].items()}
                for index, parameter in zip(indices, parameters, strict=True)
                if index in state["state"]
            }
            optimizer.load_state_dict({**state, "state": states})

    @property
    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    @torch.no_grad()
    def _whole(self, value: Any) -> Any:
        """A tensor, gathered if it is sharded; of use on rank 0. All ranks must ask for the same ones."""
        if not isinstance(value, Tensor):
            return value
        sharded = as_dtensor(value)
        whole = value if sharded is None else sharded.full_tensor()
        return whole.detach().cpu() if self.is_global_zero else whole.new_empty(0)


def _placed_as(like: Tensor, value: Any) -> Any:
    """A whole tensor of a checkpoint, in memory of its own, and this rank's shard of it if `like` has one."""
    if not isinstance(value, Tensor):
        return value
    sharded = as_dtensor(like)
    if sharded is None or value.shape != like.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the file: nothing is sent.
    whole = value.to(like.device)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()

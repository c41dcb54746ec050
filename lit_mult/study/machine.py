"""CPU cores and GPUs of this machine, shared out among workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lit_mult.config import TrainerConfig
from lit_mult.errors import UserError


@dataclass(frozen=True)
class Slot:
    """A worker's share of the machine."""

    threads: int
    gpus: str | None = None
    """Value of CUDA_VISIBLE_DEVICES; None: unchanged."""


def slots(workers: int | None, cells: int, trainer: TrainerConfig) -> list[Slot]:
    """A slot per worker; by default one worker per GPU (or group of GPUs that a cell uses) or CPU core.

    On CPUs, several single-threaded workers beat one with all threads, more so for smaller models (1.1 to 1.25 times on
    two cores). More workers than GPUs share them.

    Args:
        workers: number of workers; None chooses.
        cells: waiting cells, an upper limit to the workers.
        trainer: accelerator and devices of the cells.

    Raises:
        UserError: a cell needs more GPUs than there are.
    """
    gpus = gpus_for(trainer)
    groups: list[str | None] = [None]
    if gpus:
        size = gpus_per_cell(trainer.devices, len(gpus))
        if size > len(gpus):
            raise UserError(f"trainer.devices = {trainer.devices}: this machine has {len(gpus)} GPUs")
        starts = range(0, len(gpus) - size + 1, size)
        groups = [",".join(gpus[start : start + size]) for start in starts]
    available = cores()
    count = max(1, min(workers or (len(groups) if gpus else available), cells))
    return [Slot(max(1, available // count), groups[index % len(groups)]) for index in range(count)]


def gpus_for(trainer: TrainerConfig) -> list[str]:
    """The GPUs that cells may use, in the format of CUDA_VISIBLE_DEVICES."""
    return _gpus() if trainer.accelerator in ("auto", "gpu", "cuda") else []


def memory_of(gpus: Sequence[str], *, sharing: int) -> int | None:
    """Free bytes of GPU memory for each of `sharing` workers on a GPU; None without a GPU."""
    free = free_gpu_memory() if gpus else None
    return None if free is None else free // sharing


def free_gpu_memory() -> int | None:
    """Fewest free bytes of any visible GPU; None without a GPU."""
    import torch

    return min((torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())), default=None)


def gpus_per_cell(devices: int | str, available: int) -> int:
    """Number of GPUs in Lightning's `devices`: a number, a list such as "0,1", -1 or auto for all."""
    listed = [name for name in str(devices).split(",") if name.strip()]
    if len(listed) > 1:
        return len(listed)
    return available if str(devices) in ("-1", "auto") else int(listed[0])


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """The visible CUDA devices, in the format of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if visible else [str(index) for index in range(count)]

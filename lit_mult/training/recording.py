"""Makes the record of a run: its result, code versions and device."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning import Trainer

from lit_mult.config import RunConfig
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.method.plan import RunPlan
from lit_mult.method.regime import matrix_regimes
from lit_mult.optim.groups import ParameterPlan
from lit_mult.registry.roles import Role
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.training.history import History

_PACKAGES = ("lit-mult", "torch", "lightning", "numpy")


def make_record(
    config: RunConfig,
    corpus: TokenizedCorpus,
    plan: RunPlan,
    rows: Sequence[ParameterPlan],
    history: History,
    trainer: Trainer,
    *,
    started_at: str,
    cell: CellInfo | None,
    members: int = 1,
) -> RunRecord:
    """The record of a run that has ended.

    Args:
        config: of the run.
        corpus: its data.
        plan: its plan.
        rows: its trainable parameters.
        history: of the run.
        trainer: its Trainer, for the steps done and the device.
        started_at: UTC, ISO 8601.
        cell: its place in a study.
        members: runs in its stack, itself included.
    """
    sizes = {
        "total": sum(row.parameter.numel() for row in rows),
        "non_embedding": sum(row.parameter.numel() for row in rows if row.role not in (Role.EMBEDDING, Role.LM_HEAD)),
        "multipliers": sum(row.parameter.numel() for row in rows if row.role is Role.MULTIPLIER),
    }
    steps = trainer.global_step
    tokens = steps * config.train.batch_size * config.data.seq_len
    initial_loss = history.val_curve[0][1]
    finite_val = [(step, loss) for step, loss in history.val_curve if math.isfinite(loss)]
    final_loss = None if history.ended_at is not None else history.val_curve[-1][1]
    return RunRecord(
        status="diverged" if history.diverged else "pruned" if history.pruned else "completed",
        config=config.to_dict(),
        config_hash=config.hash,
        seed=config.seed,
        cell=cell,
        git_commit=git_commit(),
        versions=versions(),
        device=describe_device(trainer.strategy.root_device),
        members=members,
        started_at=started_at,
        corpus_hash=corpus.hash,
        train_tokens_available=len(corpus.train),
        parameters=sizes,
        regime={role.value: regime for role, regime in matrix_regimes(config, plan).items()},
        steps=steps,
        tokens=tokens,
        wall_seconds=history.train_seconds + history.val_seconds,
        tokens_per_second=tokens / history.train_seconds if history.train_seconds else 0.0,
        initial_loss=initial_loss if math.isfinite(initial_loss) else None,
        final_loss=final_loss,
        best_loss=min((loss for _, loss in finite_val), default=None),
        final_bits_per_byte=None if final_loss is None else final_loss / math.log(2) / corpus.val_bytes_per_token,
        train_curve=[(step, loss) for step, loss in history.train_curve if math.isfinite(loss)],
        val_curve=finite_val,
    )


@cache
def git_commit() -> str | None:
    """Commit of the checkout that contains this package, `+dirty` when tracked files differ; None outside git."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    # An installed package may be inside an unrelated checkout, which does not track its files.
    if git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = git("rev-parse", "HEAD")
    # Only the package: a new results file does not change the code.
    return f"{commit}+dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else commit


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    by_name = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_name[package] = version(package)
        except PackageNotFoundError:  # not installed, run from its folder
            by_name[package] = "unknown"
    return by_name


def describe_device(device: torch.device) -> str:
    """Name of a device and, for a CPU, its number of threads."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {_cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


@cache
def _cpu_name() -> str:
    with suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

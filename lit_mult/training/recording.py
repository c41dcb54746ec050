"""The record of a run from what it has shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lit_mult.config import RunConfig
from lit_mult.data.cache import TokenizedCorpus
from lit_mult.optim.groups import ParameterPlan
from lit_mult.registry.roles import Role
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.training import provenance
from lit_mult.training.curves import Curves


def make_record(
    config: RunConfig,
    corpus: TokenizedCorpus,
    rows: Sequence[ParameterPlan],
    curves: Curves,
    *,
    steps: int,
    device: torch.device,
    started_at: str,
    cell: CellInfo | None,
    members: int = 1,
) -> RunRecord:
    """The record of a run that has come to its end.

    Args:
        config: of the run.
        corpus: that it was trained on.
        rows: its parameters, each with a numel of the run's own.
        curves: its history.
        steps: optimizer steps done.
        device: where it was trained.
        started_at: UTC, ISO 8601.
        cell: its place in a study.
        members: runs of the stack that it was trained in.
    """
    sizes = {
        "total": sum(row.parameter.numel() for row in rows),
        "non_embedding": sum(row.parameter.numel() for row in rows if row.role not in (Role.EMBEDDING, Role.LM_HEAD)),
        "multipliers": sum(row.parameter.numel() for row in rows if row.role is Role.MULTIPLIER),
    }
    tokens = steps * config.train.batch_size * config.data.seq_len
    finite_val = [(step, loss) for step, loss in curves.val if math.isfinite(loss)]
    final_loss = None if curves.ended_at is not None else curves.val[-1][1]
    return RunRecord(
        status="diverged" if curves.diverged else "pruned" if curves.pruned else "completed",
        config=config.to_dict(),
        config_hash=config.hash,
        seed=config.seed,
        cell=cell,
        git_commit=provenance.git_commit(),
        versions=provenance.versions(),
        device=provenance.describe_device(device),
        members=members,
        started_at=started_at,
        corpus_hash=corpus.hash,
        train_tokens_available=len(corpus.train),
        parameters=sizes,
        steps=steps,
        tokens=tokens,
        wall_seconds=curves.train_seconds + curves.val_seconds,
        tokens_per_second=tokens / curves.train_seconds if curves.train_seconds else 0.0,
        initial_loss=curves.initial_loss if math.isfinite(curves.initial_loss) else None,
        final_loss=final_loss,
        best_loss=min((loss for _, loss in finite_val), default=None),
        final_bits_per_byte=None if final_loss is None else final_loss / math.log(2) / corpus.val_bytes_per_token,
        train_curve=[(step, loss) for step, loss in curves.train if math.isfinite(loss)],
        val_curve=finite_val,
    )

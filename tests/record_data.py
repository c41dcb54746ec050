"""Records of runs that were never made."""

from __future__ import annotations

from typing import Any

from lit_mult.config import RunConfig
from lit_mult.schema import RunRecord

INITIAL_LOSS = 5.5


def make_record(config: RunConfig, loss: float | None, **changes: Any) -> RunRecord:
    """A run of 200 steps with this final loss; None: it diverged."""
    return RunRecord(
        **{
            "status": "completed" if loss is not None else "diverged",
            "config": config.to_dict(),
            "config_hash": config.hash,
            "seed": config.seed,
            "git_commit": "c0ffee",
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            "device": "cpu",
            "started_at": "2026-01-01T00:00:00+00:00",
            "corpus_hash": "abc",
            "train_tokens_available": 1_000_000,
            "parameters": {"total": 1000, "non_embedding": 800, "multipliers": 10},
            "steps": 200,
            "tokens": 4096,
            "wall_seconds": 2.0,
            "tokens_per_second": 2048.0,
            "initial_loss": INITIAL_LOSS,
            "final_loss": loss,
            "best_loss": INITIAL_LOSS if loss is None else loss,
            "final_bits_per_byte": None if loss is None else loss / 0.6931,
            "train_curve": [(10, 5.0), (20, 4.0)],
            "val_curve": [(0, INITIAL_LOSS), (20, INITIAL_LOSS if loss is None else loss)],
            **changes,
        }
    )

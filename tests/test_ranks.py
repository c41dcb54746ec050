"""Dropout in runs of several processes: each rank draws masks of its own, the same ones when the run resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_runs import Tiny, weights

from lit_mult.config import RunConfig
from lit_mult.schema import RunRecord
from lit_mult.training.checkpoints import RngState


def mask(config: RunConfig, *, world: int = 2, rank: int = 0, step: int = 0, micro_batch: int = 0) -> torch.Tensor:
    """The dropout mask of a micro-batch on one rank, whatever the generator's state before."""
    trainer: Any = SimpleNamespace(world_size=world, global_rank=rank, global_step=step, accumulate_grad_batches=2)
    RngState(config).on_train_batch_start(trainer, SimpleNamespace(), None, 2 * step + micro_batch)
    return F.dropout(torch.ones(200), config.model.dropout)


def test_masks_differ_by_rank_step_micro_batch_and_seed_and_by_nothing_else(tiny: Tiny) -> None:
    config = tiny({"model.dropout": 0.5})
    torch.manual_seed(0)
    first = mask(config)
    torch.manual_seed(1)
    assert torch.equal(mask(config), first)

    others = [mask(config, rank=1), mask(config, step=1), mask(config, micro_batch=1)]
    others.append(mask(tiny({"model.dropout": 0.5, "seed": 1})))
    # of 200 entries half are kept; that two masks agree by chance has a probability of 2^-200
    assert not any(torch.equal(a, b) for a, b in combinations([first, *others], 2))


@pytest.mark.parametrize(("dropout", "world"), [(0.5, 1), (0.0, 2)])
def test_one_process_goes_on_with_its_generator_and_so_do_ranks_without_dropout(
    tiny: Tiny, dropout: float, world: int
) -> None:
    before = torch.get_rng_state()
    trainer: Any = SimpleNamespace(world_size=world, global_rank=0, global_step=3, accumulate_grad_batches=1)
    RngState(tiny({"model.dropout": dropout})).on_train_batch_start(trainer, SimpleNamespace(), None, 3)
    assert torch.equal(torch.get_rng_state(), before)


# Writes the kept share of every mask, one file a rank; `stop` is the step at which both ranks fail, or -1.
_RANKS = """
import json, sys
from pathlib import Path
import torch, yaml
from lightning import Callback
from lit_mult.config import RunConfig
from lit_mult.nn import llama
from lit_mult.training.run import run

config, out, log, stop = sys.argv[1:]
masks, drop = [], llama.F.dropout

def watched(x, p, training):
    dropped = drop(x, p, training)
    if training:
        masks.append((dropped != 0).flatten()[:64].int().tolist())
    return dropped

class Watch(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Path(f"{log}.{trainer.global_rank}.json").write_text(json.dumps(masks))
        if trainer.global_step == int(stop):
            raise KeyError("as if the processes had died")

llama.F.dropout = watched
run(RunConfig.from_dict(yaml.safe_load(Path(config).read_text())), out, callbacks=[Watch()])
"""


@pytest.mark.slow
def test_two_processes_draw_different_masks_and_resume_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    flags = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.accumulate_grad_batches": 2}
    config = tiny({"model.dropout": 0.5, "train.checkpoint_every": 4, **flags})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "ranks.py").write_text(_RANKS)

    def go(out: str, log: str, stop: int = -1) -> list[list[Any]]:
        """The masks of both ranks, in the order of the forward passes."""
        command = [sys.executable, "ranks.py", "run.yaml", out, log, str(stop)]
        done = subprocess.run(command, cwd=tmp_path, timeout=300, capture_output=True, text=True)
        assert (done.returncode == 0) == (stop == -1), done.stderr
        return [json.loads((tmp_path / f"{log}.{rank}.json").read_text()) for rank in (0, 1)]

    whole = go("whole", "whole")
    go("parts", "first", stop=6)
    rest = go("parts", "rest")

    assert len(whole[0]) == 12 * 2 * 2  # steps, micro-batches, branches of the one block
    drawn = [tuple(drawn) for rank in whole for drawn in rank]
    assert len(set(drawn)) == len(drawn)
    assert [masks[4 * 2 * 2 :] for masks in whole] == rest  # resumed from step 4
    records = [RunRecord.read(tmp_path / out / "record.json") for out in ("whole", "parts")]
    assert records[0].train_curve == records[1].train_curve
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())

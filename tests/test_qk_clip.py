"""QK-clip: logits of a batch end at the limit, other heads keep their bits, and runs resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.errors import ConfigError, Interrupted
from lit_mult.nn.llama import Attention
from lit_mult.training import qk_clip
from lit_mult.training.module import LitLlama, make_module
from lit_mult.training.run import run

SMALL: dict[str, Any] = {
    "model": {"d_model": 16, "n_layers": 1, "head_dim": 4, "num_key_value_groups": 2},
    "parametrization": {"base_d_model": 16},
    "multipliers": "vector",
}


def clipping(limit: float) -> LitLlama:
    module = make_module(RunConfig.from_dict(SMALL | {"optim": {"qk_clip": limit}}), vocab_size=11)
    attention = module.model.layers[0].self_attn
    assert isinstance(attention, Attention)
    with torch.no_grad():
        attention.q_proj.row.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        attention.q_proj.weight[:4] *= 60  # head 0, whose key head is shared with head 1
        attention.q_proj.weight[4:8] *= 20
    return module


@torch.no_grad()
def logits_by_hand(module: LitLlama, ids_BT: Tensor) -> Tensor:
    """(H,): softmax's arguments, largest over batch and allowed pairs, from projections of every head."""
    found: list[Tensor] = []

    def look(attention: Attention, q_BTHK: Tensor, k_BSGK: Tensor) -> None:
        for head in range(4):
            q, k = q_BTHK[:, :, head].double(), k_BSGK[:, :, head // 2].double()
            allowed = torch.ones(q.shape[1], q.shape[1]).tril().bool()
            found.append((attention.scale * q @ k.mT)[:, allowed].max())

    attention = module.model.layers[0].self_attn
    observe, attention.observe = attention.observe, look
    module(ids_BT)
    attention.observe = observe
    return torch.stack(found)


def test_logits_of_the_batch_end_at_the_limit() -> None:
    module = clipping(4.0)
    ids_BT = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    before = logits_by_hand(module, ids_BT)
    assert before[0] > before[1] > 4 > before[2:].max()
    attention = module.model.layers[0].self_attn
    q, k = attention.q_proj.weight.detach().clone(), attention.k_proj.weight.detach().clone()
    row = attention.q_proj.row.detach().clone()

    module(ids_BT)
    qk_clip.clip(module._logits, 4.0)

    torch.testing.assert_close(logits_by_hand(module, ids_BT)[:2], torch.tensor([4.0, 4.0]).double(), rtol=1e-5, atol=0)
    # The key head shrinks by the worse factor's root; the query heads by what is left of theirs.
    worst = 4 / float(before[0])
    torch.testing.assert_close(attention.k_proj.weight[:4], k[:4] * worst**0.5)
    torch.testing.assert_close(attention.q_proj.weight[:4], q[:4] * worst**0.5)
    torch.testing.assert_close(attention.q_proj.weight[4:8], q[4:8] * (4 / float(before[1])) / worst**0.5)
    assert torch.equal(attention.q_proj.weight[8:], q[8:])
    assert torch.equal(attention.k_proj.weight[4:], k[4:])
    assert torch.equal(attention.q_proj.row, row)
    assert not module._logits


def test_evaluation_records_nothing() -> None:
    module = clipping(4.0).eval()
    module(torch.zeros(1, 4, dtype=torch.long))
    assert not module._logits


def config_of(text_file: Path, **fields: Any) -> RunConfig:
    return RunConfig.from_dict(SMALL).with_overrides(
        {
            "data.corpus": str(text_file), "data.seq_len": 16, "data.val_windows": 4, "train.batch_size": 4,
            "train.steps": 6, "train.checkpoint_every": 3, "trainer.progress_bar": False, "trainer.tensorboard": False,
        }
        | fields
    )  # fmt: skip


def test_a_limit_that_nothing_reaches_changes_no_bit_and_a_low_one_does(text_file: Path, tmp_path: Path) -> None:
    losses = {
        limit: run(config_of(text_file, **{"optim.qk_clip": limit}), tmp_path / str(limit)).final_loss
        for limit in (None, 1e6, 0.05)
    }
    assert losses[None] == losses[1e6] != losses[0.05]


def test_a_stopped_run_goes_on_exactly(text_file: Path, tmp_path: Path) -> None:
    config = config_of(text_file, **{"optim.qk_clip": 0.05, "trainer.accumulate_grad_batches": 2})
    whole = run(config, tmp_path / "whole")
    stops = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped", should_stop=lambda: next(stops, True))
    assert run(config, tmp_path / "stopped").final_loss == whole.final_loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.qk_norm": True}, "cannot go with model.qk_norm = True, whose norms bound the logits"),
        ({"trainer.compile": True}, "cannot go with trainer.compile = True"),
        ({"trainer.strategy": "fsdp2"}, "cannot go with trainer.strategy = fsdp2"),
        ({"multipliers": "weight_norm"}, "cannot go with multipliers = weight_norm, which are no plain product"),
        ({"optimizer": "hyperball"}, "cannot go with optimizer = hyperball, which settles norms"),
        ({"optimizer": "muown"}, "cannot go with optimizer = muown, which settles norms"),
        ({"optimizer": "import:heavyball.SOAP"}, "cannot go with optimizer = import:heavyball.SOAP"),
        ({"optim.qk_clip": 0.0}, "optim.qk_clip"),
    ],
)
def test_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with refusal(message, kind=ConfigError):
        RunConfig.from_dict(SMALL).with_overrides({"optim.qk_clip": 100.0} | fields)

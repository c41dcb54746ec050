"""Reading with a cache gives what reading all at once gives.

Shapes in names: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import initialized
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged

VOCAB = 31


@pytest.fixture(params=[(1, False), (2, False), (4, False), (2, True)], ids=["mha", "gqa", "mqa", "qk_norm"])
def model(request: pytest.FixtureRequest) -> Llama:
    groups, qk_norm = request.param
    shape = {"d_model": 32, "n_layers": 2, "head_dim": 8, "num_key_value_groups": groups, "qk_norm": qk_norm}
    config = RunConfig.from_dict({"model": shape, "multipliers": "vector"})
    model = initialized(config, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(parameter)))
    return model.requires_grad_(False)


def tokens(*size: int) -> Tensor:
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(5))


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("borders", [[0, 12], [0, *range(1, 13)], [0, 5, 6, 10, 12]], ids=["all", "singly", "chunks"])
def test_reading_in_parts_gives_the_logits_of_reading_at_once(model: Llama, borders: list[int]) -> None:
    ids_BT = tokens(3, 12)
    cache = model.empty_cache(3, 12)
    parts = [model(ids_BT[:, start:end], cache) for start, end in pairwise(borders)]
    same(torch.cat(parts, dim=1), model(ids_BT))


def test_rows_of_different_lengths_do_not_see_their_padding(model: Llama) -> None:
    ids_BT, lengths = tokens(3, 12), [7, 2, 5]
    wanted_BTV = model(ids_BT)
    prompts_BT = ids_BT[:, : max(lengths)].clone()
    for row, length in enumerate(lengths):
        prompts_BT[row, length:] = VOCAB - 1
    cache = model.empty_cache(3, 12)
    prompt_logits_BTV = model(prompts_BT, cache)
    cache.truncate(lengths)
    rows = torch.arange(3)
    for steps in (1, 2, 1):  # token by token, and two at once
        position_BT = torch.tensor(cache.lengths)[:, None] + torch.arange(steps)
        got_BTV = model(ids_BT[rows[:, None], position_BT], cache)
        same(got_BTV, wanted_BTV[rows[:, None], position_BT])
    for row, length in enumerate(lengths):
        same(prompt_logits_BTV[row, :length], wanted_BTV[row, :length])


def test_selected_rows_go_on_each_for_itself(model: Llama) -> None:
    ids_BT = tokens(2, 9)
    cache = model.empty_cache(2, 9)
    model(ids_BT[:, :6], cache)
    cache.truncate([6, 4])
    copies = cache.select([1, 0, 1])
    other = 3 - ids_BT[1:, 4:6].clamp(max=3)  # a branch of row 1 that goes its own way
    got_BTV = model(torch.cat([ids_BT[1:, 4:6], ids_BT[:1, 6:8], other]), copies)
    same(got_BTV[0], model(ids_BT[1:])[0, 4:6])
    same(got_BTV[1], model(ids_BT[:1])[0, 6:8])
    same(got_BTV[2], model(torch.cat([ids_BT[1:, :4], other], dim=1))[0, 4:6])


def test_joined_weights_change_nothing_and_are_not_merged_twice(model: Llama) -> None:
    ids_BT = tokens(2, 7)
    plain = merged(model)
    wanted_BTV, names = plain(ids_BT), plain.state_dict().keys()
    plain.join_weights()
    assert torch.equal(plain(ids_BT), wanted_BTV)
    assert plain.state_dict().keys() == names
    model.join_weights()
    same(merged(model)(ids_BT), wanted_BTV)


def test_the_head_can_be_applied_where_it_is_needed(model: Llama) -> None:
    ids_BT = tokens(2, 7)
    same(model.lm_head(model.hidden(ids_BT)[:, -1]), model(ids_BT)[:, -1])


def test_a_full_cache_says_so(model: Llama) -> None:
    cache = model.empty_cache(1, 3)
    model(tokens(1, 2), cache)
    with pytest.raises(ValueError, match="2 \\+ 2 tokens do not fit into 3 slots"):
        model(tokens(1, 2), cache)
    with pytest.raises(ValueError, match="cannot be truncated"):
        cache.truncate([3])

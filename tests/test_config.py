"""The config tree: defaults, validation in one line, dotted overrides, the hash."""

from __future__ import annotations

import pytest
from refusals import refusal

from lit_mult.config import RunConfig, differences
from lit_mult.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.d_model": 100}, "model.d_model = 100: must be a multiple of model.head_dim = 32"),
        ({"model.head_dim": 31}, "model.head_dim = 31: must be even"),
        ({"model.d_model": 96, "model.num_key_value_groups": 2}, "must divide the 3 heads"),
        ({"model.mlp_ratio": 2.7}, "times model.d_model = 64 must be a whole number"),
        ({"model.width": 3}, "model.width = 3: unknown field"),
        ({"optim.lr": -1}, "optim.lr = -1: input should be greater than 0"),
        ({"optim.betas": (0.9, 1.0)}, "both must lie in"),
        ({"multipliers": "matrix"}, "multipliers = 'matrix': input should be 'none', 'fixed', 'scalar', 'vector'"),
        ({"schedule.final_ratio": 0}, "must be above 0 for wsd"),
        ({"schedule.warmup_fraction": 0.9}, "must not exceed 1"),
        ({"parametrization.base_d_model": 48}, "parametrization.base_d_model = 48: must be a multiple"),
        ({"trainer.accumulate_grad_batches": 3}, "must divide train.batch_size = 16"),
        ({"seed.x": 1}, "unknown field"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(overrides: dict[str, object], said: str) -> None:
    with refusal(said, kind=ConfigError):
        RunConfig().with_overrides(overrides)


def test_plain_values_give_the_config_back() -> None:
    config = RunConfig().with_overrides({"multipliers": "vector", "placement.overrides": {"lm_head": "scalar"}})

    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(config.to_dict()).hash == config.hash


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ({"trainer.progress_bar": False}, True),
        ({"trainer.tensorboard": False}, True),
        ({"data.cache_dir": "elsewhere"}, True),
        ({"seed": 1}, False),
        ({"optim.lr": 0.5}, False),
        ({"trainer.precision": "bf16-mixed"}, False),
    ],
)
def test_the_hash_covers_what_can_change_a_loss(override: dict[str, object], same: bool) -> None:
    assert (RunConfig().with_overrides(override).hash == RunConfig().hash) is same


def test_differences_name_the_fields() -> None:
    held, wanted = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 3, "c": [1]}, "e": 2}

    assert differences(held, wanted) == "a.b: 1 -> 3; d: 2 -> None; e: None -> 2"
    assert differences(held, held) == ""
    assert differences(held, wanted, limit=1) == "a.b: 1 -> 3; and 2 more"


def test_the_order_of_overrides_is_part_of_a_run() -> None:
    # The last match wins, so these are two different models.
    one = RunConfig().with_overrides({"placement.overrides": {"layers.*": "row", "layers.0.*": "none"}})
    other = RunConfig().with_overrides({"placement.overrides": {"layers.0.*": "none", "layers.*": "row"}})

    assert one.hash != other.hash


def test_what_follows_an_open_field_is_one_key() -> None:
    config = RunConfig().with_overrides({"placement.overrides.layers.0.*": "none", "trainer.extra.benchmark": True})

    assert config.placement.overrides == {"layers.0.*": "none"}
    assert config.trainer.extra == {"benchmark": True}

"""Which runs may be trained together in one stack, and how many fit on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import Tiny

from lit_mult.config import flatten
from lit_mult.stacked.key import MEMBER_FIELDS, always_stackable, stack_key
from lit_mult.stacked.size import members_that_fit

_OF_A_MEMBER: dict[str, list[Any]] = {
    "seed": [7],
    "multipliers": ["fixed"],
    "placement.table": ["minimal"],
    "placement.overrides": [{"lm_head": "row"}],
    "parametrization.rule": ["standard"],
    "parametrization.depth_rule": ["completep"],
    "parametrization.lr.k_proj": [2.0],
    "optim.lr": [0.1, 0.2],
    "optim.weight_decay": [0.0],
    "optim.weight_decay_mode": ["independent"],
    "optim.vector_lr": [0.1],
    "optim.vector_lr_mode": ["relative"],
    "optim.multiplier_lr": [0.1],
    "optim.multiplier_weight_decay": [0.1],
    "optim.clip": [None, 0.5],
    "optim.clip_multipliers": [True],
    "schedule.name": ["cosine"],
    "train.divergence_factor": [3.0],
    "model.z_loss": [1e-4],
}

_SHARED: dict[str, Any] = {
    "optimizer": "muon",
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.head_dim": 4,
    "model.num_key_value_groups": 2,
    "model.mlp_ratio": 3.0,
    "model.rope_theta": 500.0,
    "model.norm_eps": 1e-6,
    "model.block_norms": "frozen",
    "model.final_norm": "scalar",
    "model.qk_norm": True,
    "model.tie_embeddings": True,
    "model.dropout": 0.1,
    "model.pretrained": "folder@0123456789abcdef",
    "optim.betas": [0.9, 0.99],
    "optim.eps": 1e-6,
    "optim.muon_momentum": 0.9,
    "optim.muon_ns_steps": 4,
    "optim.muon_coefficients": "polar_express",
    "optim.scion_radius": 5.0,
    "optim.scion_sign_radius": 300.0,
    "optim.scion_momentum": 0.8,
    "optim.muown_norm_lr": 0.1,
    "optim.sphere": "row",
    "data.corpus": "other.txt",
    "data.hf_config": "en",
    "data.hf_split": "test",
    "data.streaming": True,
    "data.text_field": "content",
    "data.max_documents": 3,
    "data.tokenizer": "bpe:300",
    "data.seq_len": 32,
    "data.val_fraction": 0.1,
    "data.val_windows": 8,
    "train.steps": 13,
    "train.batch_size": 8,
    "train.eval_every": 3,
    "train.checkpoint_every": 4,
    "train.log_every": 3,
    "trainer.accelerator": "auto",
    "trainer.devices": 2,
    "trainer.num_nodes": 2,
    "trainer.strategy": "ddp",
    "trainer.precision": "bf16-mixed",
    "trainer.accumulate_grad_batches": 2,
    "trainer.compile": True,
    "trainer.extra": {"deterministic": True},
    "parametrization.attention_scale": "1/head_dim",
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.sets(st.sampled_from(sorted(_OF_A_MEMBER))), data=st.data())
def test_members_differ_in_their_own_fields_alone(tiny: Tiny, fields: set[str], data: st.DataObject) -> None:
    changed = tiny({field: data.draw(st.sampled_from(_OF_A_MEMBER[field])) for field in fields})

    assert stack_key(changed) == stack_key(tiny()) is not None


def test_every_other_field_that_decides_keeps_runs_apart(tiny: Tiny) -> None:
    hashed_fields = set(
        flatten(tiny({"model.pretrained": "x", "model.final_norm": "frozen", "model.qk_norm": True}).hashed_fields())
    )
    own = {field for field in hashed_fields if field.startswith(MEMBER_FIELDS)}
    assert hashed_fields - own - {"model.block_norms"} <= _SHARED.keys()  # a new field is to be decided upon

    for field, value in _SHARED.items():
        assert stack_key(tiny({"parametrization.base_d_model": 16, field: value})) != stack_key(tiny()), field


def test_the_multipliers_of_every_matrix_keep_runs_apart(tiny: Tiny) -> None:
    def key(**placement: Any) -> str | None:
        fields = {f"placement.{name}": value for name, value in placement.items()}
        return stack_key(tiny({"multipliers": "vector", **fields}))

    assert stack_key(tiny({"multipliers": "vector"})) != stack_key(tiny({"multipliers": "scalar"}))
    assert key(table="full") != key(table="minimal")
    assert key(overrides={"lm_head": "row"}) != key()
    assert key(overrides={"lm_head": "none", "*.k_proj": "row"}) == key(init="preset") == key()  # as the table has it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.dropout", 0.1),
        ("train.diagnostics", ["norms"]),
        ("trainer.accumulate_grad_batches", 2),
        ("trainer.devices", 2),
        ("trainer.num_nodes", 2),
        ("trainer.strategy", "ddp"),
        ("trainer.tensorboard", True),
        ("trainer.extra", {"deterministic": True}),
        ("trainer.precision", "16-mixed"),
        ("trainer.precision", "16-true"),
        ("trainer.precision", "bf16-true"),
    ],
)
def test_some_runs_train_by_themselves(tiny: Tiny, field: str, value: Any) -> None:
    assert stack_key(tiny({field: value})) is None


def test_whether_a_search_keeps_one_key_is_known_beforehand() -> None:
    assert always_stackable(["optim.lr", "seed", "parametrization.forward.k_proj", "schedule.name", "model.z_loss"])
    for field in ("train.batch_size", "optim.eps", "multipliers", "placement.table", "parametrization.attention_scale"):
        assert not always_stackable(["optim.lr", field])


def test_the_members_that_fit_on_a_gpu(tiny: Tiny) -> None:
    # Embedding and head 256 x 16 each, attention 4 x 16 x 16, MLP 3 x 44 x 16: 11,328 parameters of 28 bytes. A step
    # has 4 x 16 = 64 tokens with 10 x 16 + 5 x 44 = 380 activations and 4 x 256 = 1,024 numbers of logits each, all of
    # 4 bytes: 317,184 + 97,280 + 262,144 = 676,608 bytes.
    assert members_that_fit(tiny(), 256, 8_460_000) == 10  # 80 % are 10.003 members
    assert members_that_fit(tiny(), 256, 8_450_000) == 9
    assert members_that_fit(tiny({"trainer.precision": "bf16-mixed"}), 256, 8_460_000) == 10  # 627,968 bytes each: 10.8
    assert members_that_fit(tiny({"trainer.precision": "bf16-mixed"}), 256, 8_640_000) == 11
    assert members_that_fit(tiny({"model.tie_embeddings": True}), 256, 8_460_000) == 12  # 561,920
    assert members_that_fit(tiny(), 256, 10**12) == 64
    assert members_that_fit(tiny(), 256, 0) == 1
    # 6 x 11,328 x 16 FLOP for each sequence of the batch: 2e11 is reached with the 183,911th.
    assert members_that_fit(tiny({"train.batch_size": 183_910}), 256, 10**15) == 64
    assert members_that_fit(tiny({"train.batch_size": 183_911}), 256, 10**15) == 1

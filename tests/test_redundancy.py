"""Redundancies of placements: every reported direction keeps the logits, and there are no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import initialized
from torch import Tensor, nn

from lit_mult.cli import main
from lit_mult.config import RunConfig
from lit_mult.method.redundancy import Kind, Redundancy, redundancies
from lit_mult.nn.llama import Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.registry.contracts import Axis

VOCAB = 5


def config_of(
    table: str = "full",
    kind: str = "vector",
    layers: int = 1,
    groups: int = 2,
    qk_norm: bool = False,
    **changes: Any,
) -> RunConfig:
    return RunConfig.from_dict(
        {
            "multipliers": kind,
            "placement": {"table": table, "overrides": changes.pop("overrides", {})},
            "optim": changes,
            "model": {
                "d_model": 16,
                "n_layers": layers,
                "head_dim": 4,
                "num_key_value_groups": groups,
                "mlp_ratio": 0.375,
                "norm_eps": 1e-30,  # of which scale invariance is up to
                "qk_norm": qk_norm,
            },
            "parametrization": {"base_d_model": 16},
        }
    )


def model_of(config: RunConfig, seed: int) -> tuple[Llama, dict[str, nn.Parameter]]:
    """A random model in float64, and its multipliers and norm weights, none of them near 1."""
    model = initialized(config, VOCAB, seed).double()
    generator = torch.Generator().manual_seed(seed)
    movable = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            movable[f"{name}.weight"] = module.weight
        elif isinstance(module, MultipliedMatrix):
            axes = {axis: getattr(module, axis) for axis in Axis}
            movable |= {f"{name}.{axis}": parameter for axis, parameter in axes.items() if parameter is not None}
    for parameter in movable.values():
        log = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.4 * log.exp() * torch.where(torch.rand(log.shape, generator=generator) < 0.5, -1.0, 1.0)
    return model, movable


IDS_BT = torch.tensor([[0, 3, 1, 4, 2, 2], [1, 1, 0, 2, 3, 4]])


@torch.no_grad()
def logits_after(model: Llama, movable: dict[str, nn.Parameter], logs: dict[str, Tensor]) -> Tensor:
    """Logits with parameters multiplied by exp(logs), which is undone afterwards."""
    before = {name: movable[name].detach().clone() for name in logs}
    for name, log in logs.items():
        movable[name].mul_(log.view(movable[name].shape).exp())
    logits: Tensor = model(IDS_BT)
    for name, value in before.items():
        movable[name].copy_(value)
    return logits


def moved(redundancy: Redundancy, generator: torch.Generator, size: float = 0.3) -> dict[str, Tensor]:
    shape = tuple(redundancy.sizes[factor] for factor in redundancy.channels)
    values = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {name: torch.tensor(np.array(log)) for name, log in redundancy.direction(values.numpy()).items()}


AXES = st.sampled_from(["none", "row", "column", "row+column", "scalar", "scalar+row", "scalar+row+column"])
PLACEMENTS = st.builds(
    lambda table, kind, layers, groups, qk_norm, overrides: config_of(
        table, kind, layers, groups, qk_norm, overrides=overrides
    ),
    st.sampled_from(["full", "minimal"]),
    st.sampled_from(["vector", "scalar", "none"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.dictionaries(st.sampled_from(list(config_of(layers=1).model.matrix_roles())), AXES, max_size=5),
)


@given(PLACEMENTS, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_moving_along_a_redundancy_leaves_the_logits(config: RunConfig, seed: int) -> None:
    model, movable = model_of(config, seed)
    generator = torch.Generator().manual_seed(seed)
    before = logits_after(model, movable, {})
    for redundancy in redundancies(config, VOCAB):
        after = logits_after(model, movable, moved(redundancy, generator))
        assert float((after - before).abs().max()) < 1e-9 * float(before.abs().max()), redundancy.powers


def invariant_dimension(model: Llama, movable: dict[str, nn.Parameter]) -> tuple[int, int]:
    """Dimension of the directions that change the logits at first order by nothing, and of all; by differences.

    At a generic point those are the directions of the exact symmetries.
    """
    step, columns = 1e-4, []
    for name, parameter in movable.items():
        for unit in torch.eye(parameter.numel(), dtype=torch.float64):
            ends = [logits_after(model, movable, {name: sign * step * unit}) for sign in (1, -1)]
            columns.append(((ends[0] - ends[1]) / (2 * step)).flatten())
    if not columns:
        return 0, 0
    jacobian = torch.stack(columns, dim=1)
    # Columns that are 0 but for rounding, 1e-11, stay small.
    sizes = torch.linalg.svdvals(jacobian / jacobian.norm(dim=0, keepdim=True).clamp(min=1e-4))
    rank = int((sizes > 1e-5).sum())
    return jacobian.shape[1] - rank, jacobian.shape[1]


@pytest.fixture
def many_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many logits as it takes for the rank not to be bounded by them."""
    ids = torch.randint(VOCAB, (12, 8), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(f"{__name__}.IDS_BT", ids)


@pytest.mark.parametrize(
    ("table", "kind", "layers", "groups", "qk_norm", "overrides"),
    [
        ("full", "vector", 1, 2, False, {}),
        ("minimal", "vector", 2, 4, False, {}),
        ("full", "scalar", 2, 1, False, {}),
        ("minimal", "vector", 1, 1, False, {"lm_head": "column", "*.q_proj": "column+scalar", "*.k_proj": "column"}),
        ("full", "vector", 1, 4, False, {"*.v_proj": "column", "*.q_proj": "column", "*.k_proj": "column"}),
        ("full", "vector", 1, 2, False, {"*.o_proj": "none", "*.gate_proj": "row+column", "*.up_proj": "row+column"}),
        ("full", "vector", 1, 2, True, {}),
        ("full", "scalar", 2, 1, True, {}),
        (
            "minimal",
            "vector",
            1,
            1,
            True,
            {"*.q_proj": "row+column+scalar", "*.k_proj": "column", "*.v_proj": "column"},
        ),
    ],
)
@pytest.mark.usefixtures("many_ids")
def test_there_are_no_other_directions(
    table: str, kind: str, layers: int, groups: int, qk_norm: bool, overrides: dict[str, str]
) -> None:
    config = config_of(table, kind, layers, groups, qk_norm, overrides=overrides)
    model, movable = model_of(config, 0)

    free, of = invariant_dimension(model, movable)

    found = redundancies(config, VOCAB)
    # The weights of the two norms of an attention can exchange a factor for each of the 2 rotary pairs of a head.
    free -= 2 * layers * qk_norm
    assert sum(redundancy.freedom for redundancy in found) == free
    # They are independent: with the free factors drawn at random often enough, they span as many dimensions.
    generator, drawn = torch.Generator().manual_seed(0), []
    for redundancy in found:
        for _ in range(redundancy.freedom + 1):
            logs = moved(redundancy, generator)
            drawn.append(
                torch.cat([logs.get(name, torch.zeros(p.numel()).double()).flatten() for name, p in movable.items()])
            )
    assert drawn[0].numel() == of
    assert int(torch.linalg.matrix_rank(torch.stack(drawn), rtol=1e-9)) == free


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_direction_that_is_not_reported_changes_the_logits(seed: int) -> None:
    config = config_of("full")
    model, movable = model_of(config, seed)
    generator = torch.Generator().manual_seed(seed)
    logs = {name: 0.1 * torch.randn(p.numel(), generator=generator).double() for name, p in movable.items()}
    before = logits_after(model, movable, {})

    assert float((logits_after(model, movable, logs) - before).abs().max()) > 1e-4 * float(before.abs().max())


def summary(config: RunConfig) -> dict[frozenset[str], tuple[Kind, int]]:
    """Parameters of a redundancy, block and layer cut off -> kind and freedom."""
    return {
        frozenset(".".join(name.split(".")[-2:]) for name in redundancy.powers): (redundancy.kind, redundancy.freedom)
        for redundancy in redundancies(config, VOCAB)
    }


def test_full_has_the_pairs_of_the_paper() -> None:
    found = summary(config_of("full", groups=2))

    # 4 heads of size 4, 2 key/value groups, hidden size 6.
    assert found[frozenset({"q_proj.row", "k_proj.row"})] == (Kind.CHANNELS, 2 * 2)  # a group and a rotary pair each
    assert found[frozenset({"v_proj.row", "o_proj.column"})] == (Kind.CHANNELS, 2 * 4)  # each value channel of a group
    assert found[frozenset({"up_proj.row", "down_proj.column"})] == (Kind.CHANNELS, 6)
    assert found[frozenset({"embed_tokens.row", "embed_tokens.column"})] == (Kind.FACTOR, 1)
    residual = frozenset({"embed_tokens.column", "o_proj.row", "down_proj.row"})
    assert found[residual] == (Kind.NORMALIZATION, 1)


def test_norms_of_queries_and_keys_divide_out_a_factor_a_head() -> None:
    found = summary(config_of("full", groups=2, qk_norm=True))

    # 4 query heads and 2 key heads; components of a head are no longer exchanged with each other's.
    assert found[frozenset({"q_proj.row"})] == (Kind.NORMALIZATION, 4)
    assert found[frozenset({"k_proj.row"})] == (Kind.NORMALIZATION, 2)
    assert frozenset({"q_proj.row", "k_proj.row"}) not in found
    assert not any("q_norm" in name for names in found for name in names)
    rows = [one for one in redundancies(config_of("full", qk_norm=True), VOCAB) if len(one.powers) == 1]
    assert all(one.held for one in rows)
    assert rows[0].remedy.endswith("drop the row of layers.0.self_attn.q_proj")
    assert redundancies(config_of("full", "none", qk_norm=True), VOCAB) == []


def test_minimal_has_none_channel_by_channel() -> None:
    found = redundancies(config_of("minimal", layers=2), VOCAB)

    assert {redundancy.kind for redundancy in found} == {Kind.FACTOR, Kind.NORMALIZATION}
    # rows x columns of embedding, o and down; the two norms of a block; the residual
    assert sum(redundancy.freedom for redundancy in found) == 1 + 2 * 4 + 1


def test_without_learnable_multipliers_there_is_nothing_to_trade() -> None:
    assert redundancies(config_of("full", "none"), VOCAB) == []


def test_a_column_beside_a_norm_is_redundant_only_where_every_reader_has_one() -> None:
    one = summary(config_of("minimal", overrides={"*.q_proj": "row+column"}))
    assert not any(kind is Kind.CHANNELS for kind, _ in one.values())

    every = summary(config_of("minimal", overrides={"*.gate_proj": "column", "*.up_proj": "column"}))
    norm = frozenset({"post_attention_layernorm.weight", "gate_proj.column", "up_proj.column"})
    assert every[norm] == (Kind.CHANNELS, 16)


def test_decay_holds_what_it_pulls_from_both_sides() -> None:
    found = {tuple(r.powers): r for r in redundancies(config_of("full"), VOCAB)}
    pair = found["layers.0.mlp.up_proj.row", "layers.0.mlp.down_proj.column"]
    assert pair.held
    assert pair.remedy == "held by optim.multiplier_weight_decay = 0.002; or drop the row of layers.0.mlp.up_proj"
    beside_norm = next(r for names, r in found.items() if names[0].endswith("layernorm.weight"))
    assert not beside_norm.held
    assert "norm weights have none" in beside_norm.remedy

    undecayed = redundancies(config_of("full", multiplier_weight_decay=0.0), VOCAB)
    assert not any(redundancy.held for redundancy in undecayed)
    keys = next(r for r in undecayed if "layers.0.self_attn.k_proj.row" in r.powers)
    # Two query heads share a key: dropping the key's row keeps a factor for each query head.
    remedy = "drifts: set optim.multiplier_weight_decay, or drop the row of layers.0.self_attn.k_proj"
    assert keys.remedy == remedy


def test_lint_placement_takes_a_file_and_options(
    tiny_dict: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_dict({"multipliers": "vector"})))

    assert main(["lint-placement", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.self_attn.q_proj.row" in shown
    assert "normalization" in shown
    hidden = next(line for line in shown.splitlines() if "up_proj.row" in line and "down_proj.column" in line)
    assert hidden.split("  ")[0].strip() == "channel by channel"
    assert str(round(16 * 2.75)) in hidden.split()

    assert main(["lint-placement", str(tmp_path / "run.yaml"), "--placement.table", "minimal"]) == 0
    assert "channel by channel" not in capsys.readouterr().out

    assert main(["lint-placement", str(tmp_path / "run.yaml"), "--optim.multiplier_weight_decay", "0"]) == 1
    assert "drifts" in capsys.readouterr().out

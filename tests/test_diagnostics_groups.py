"""Groups of diagnostics: every quantity that is read of a model, against a direct computation.

Shapes in names: B batch, T time, D width, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diagnostics_data import moment, rms, state, updates, values
from models import initialized
from torch import Tensor

import lit_mult
from lit_mult.config import RunConfig
from lit_mult.diagnostics.group import make_group
from lit_mult.diagnostics.groups.symmetry import coordinates
from lit_mult.diagnostics.readings import Readings
from lit_mult.nn.llama import Llama

VOCAB = 24
SHAPE = {
    "model.d_model": 16,
    "model.head_dim": 4,
    "model.n_layers": 2,
    "model.num_key_value_groups": 2,
    "parametrization.base_d_model": 8,
    "multipliers": "vector",
}


def build(overrides: dict[str, Any] | None = None) -> Llama:
    """A model whose multipliers and norms are random around 1."""
    config = RunConfig().with_overrides(SHAPE | (overrides or {}))
    model = initialized(config, VOCAB)
    shake(model)
    return model


@torch.no_grad()
def shake(model: Llama, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)


def ids() -> Tensor:
    return torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))


def effective(model: Llama, name: str) -> Tensor:
    """W_eff in float64, by arXiv:2601.04890 eq. 2 and 3."""
    matrix = model.get_submodule(name)
    weight = matrix.constant * matrix.weight.detach().double()
    if matrix.scalar is not None:
        weight = matrix.scalar.detach().double() * weight
    if matrix.row is not None:
        weight = torch.diag(matrix.row.detach().double()) @ weight
    if matrix.column is not None:
        weight = weight @ torch.diag(matrix.column.detach().double())
    return weight


MATRICES = ["embed_tokens", "lm_head"] + [
    f"layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]
NORMS = ["norm"] + [f"layers.{n}.{name}" for n in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_norms_of_every_parameter_and_effective_matrix(kind: str) -> None:
    model = build({"multipliers": kind, "model.final_norm": "scalar", "parametrization.width_rule": "multiplier"})
    found = state("norms", model)

    wanted = {(name, "effective_rms"): rms(effective(model, name)) for name in MATRICES}
    for name in MATRICES:
        matrix = model.get_submodule(name)
        wanted[name, "weight_rms"] = rms(matrix.weight)
        if matrix.scalar is not None:
            wanted[name, "scalar_value"] = float(matrix.scalar)
        for axis in ("row", "column"):
            if getattr(matrix, axis) is not None:
                wanted[name, f"{axis}_rms"] = rms(getattr(matrix, axis))
    wanted |= {(name, "norm_rms"): rms(model.get_submodule(name).weight) for name in NORMS[1:]}
    wanted["norm", "norm_value"] = float(model.norm.weight)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_keys_say_where_a_reading_belongs() -> None:
    readings = Readings()
    readings.add("norms", 0, make_group("norms").state(moment(build())))
    keys = {key[2]: key for key in readings.state_dict()["numbers"] if key[1] in ("row_rms", "norm_rms", "weight_rms")}
    assert keys["layers.1.mlp.up_proj"] == ["norms", "row_rms", "layers.1.mlp.up_proj", 1, "up_proj"]
    assert keys["layers.0.input_layernorm"] == ["norms", "norm_rms", "layers.0.input_layernorm", 0, "norm"]
    assert keys["lm_head"] == ["norms", "weight_rms", "lm_head", None, "lm_head"]


def test_a_tied_weight_is_read_once_and_its_two_effective_matrices_each() -> None:
    model = build({"model.tie_embeddings": True})
    found = state("norms", model)
    assert ("lm_head", "weight_rms") not in found
    for name in ("embed_tokens", "lm_head"):
        assert found[name, "effective_rms"] == pytest.approx(rms(effective(model, name)), rel=1e-5)
    assert found["lm_head", "effective_rms"] != pytest.approx(found["embed_tokens", "effective_rms"], rel=0.1)
    assert ("lm_head", "effective_update") in updates(model, lambda: None)


def test_rows_and_columns_of_effective_matrices() -> None:
    model = build()
    found = state("rows", model)
    for name in MATRICES:
        weight = effective(model, name).numpy()
        for line, axis in (("row", 1), ("column", 0)):
            norm = np.sqrt((weight**2).mean(axis=axis))
            wanted = {"mean": norm.mean(), "log_std": np.log(norm).std()}
            for q in (0, 5, 25, 50, 75, 95, 100):
                wanted[f"q{q}"] = np.percentile(norm / norm.mean(), q)
            got = {what: found[name, f"{line}_norm_{what}"] for what in wanted}
            assert got == pytest.approx(wanted, rel=1e-4), (name, line)
    assert len(found) == len(MATRICES) * 2 * 9


def test_outputs_are_those_of_a_textbook_forward() -> None:
    model = build({"parametrization.attention_scale": "1/head_dim", "model.dropout": 0.5}).train()
    found = state("outputs", model, ids())
    assert all(module.training and not module._forward_hooks for module in model.modules())

    B, T = ids().shape
    H, G, K = 4, 2, 4
    angle = torch.outer(torch.arange(T).double(), 1e4 ** -(torch.arange(0, K, 2).double() / K))
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))

    def rotate(x_BTNK: Tensor) -> Tensor:  # half-split, as Hugging Face has it
        a, b = x_BTNK.chunk(2, -1)
        return x_BTNK * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        unit = x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * model.get_submodule(name).weight.detach().double()

    wanted = {}
    x = effective(model, "embed_tokens")[ids()]
    wanted["embed_tokens", "residual_rms"] = rms(x)
    for layer in (0, 1):
        block = f"layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        y = norm(x, f"{block}.input_layernorm")
        q, k, v = (y @ effective(model, f"{attention}.{p}_proj").T for p in "qkv")
        q, k = rotate(q.view(B, T, H, K)), rotate(k.view(B, T, G, K)).repeat_interleave(H // G, 2)
        logits = torch.einsum("bthk,bshk->bhts", q, k) / K
        seen = torch.ones(T, T).tril().bool()
        wanted[attention, "attention_logits_rms"] = rms(logits[:, :, seen])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        v = v.view(B, T, G, K).repeat_interleave(H // G, 2)
        out = (
            torch.einsum("bhts,bshk->bthk", weights, v).reshape(B, T, H * K) @ effective(model, f"{attention}.o_proj").T
        )
        wanted[attention, "attention_output_rms"] = rms(out)
        x = x + out
        y = norm(x, f"{block}.post_attention_layernorm")
        gate, up = (y @ effective(model, f"{mlp}.{p}_proj").T for p in ("gate", "up"))
        out = (F.silu(gate) * up) @ effective(model, f"{mlp}.down_proj").T
        wanted[mlp, "mlp_output_rms"] = rms(out)
        x = x + out
        wanted[block, "residual_rms"] = rms(x)
    wanted["norm", "final_norm_output_rms"] = rms(norm(x, "norm"))
    wanted["lm_head", "logits_rms"] = rms(norm(x, "norm") @ effective(model, "lm_head").T)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found["lm_head", "logits_rms"] == pytest.approx(rms(model.eval()(ids())), rel=1e-5)


def test_updates_are_relative_to_the_state_before() -> None:
    model = build({"model.block_norms": "frozen"})
    names = dict(model.named_parameters())
    old = {name: parameter.detach().clone() for name, parameter in names.items()}
    old_effective = {name: effective(model, name) for name in MATRICES}
    found = updates(model, lambda: shake(model, seed=9))

    wanted = {("norm", "norm_update"): rms(model.norm.weight - old["norm.weight"]) / rms(old["norm.weight"])}
    for name in MATRICES:
        change = effective(model, name) - old_effective[name]
        wanted[name, "effective_update"] = rms(change) / rms(old_effective[name])
        for kind in ("weight", "row", "column"):
            if f"{name}.{kind}" in names:
                change = names[f"{name}.{kind}"] - old[f"{name}.{kind}"]
                wanted[name, f"{kind}_update"] = rms(change) / rms(old[f"{name}.{kind}"])
    assert found == pytest.approx(wanted, rel=1e-4)


def log_ratio(a: Tensor, *bs: Tensor) -> float:
    return math.log(rms(a)) - sum(math.log(rms(b)) for b in bs) / len(bs)


def test_symmetry_coordinates_of_the_full_placement() -> None:
    model = build()
    wanted = {("embed_tokens", "log_row/column"): log_ratio(model.embed_tokens.row, model.embed_tokens.column)}
    for n, block in enumerate(model.layers):
        attention, mlp = block.self_attn, block.mlp
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        here = f"layers.{n}.self_attn"
        wanted[here, "log_query/key"] = log_ratio(q.row, k.row)
        wanted[here, "log_value/out"] = log_ratio(v.row, o.column)
        wanted[here, "log_norm/query+key+value"] = log_ratio(block.input_layernorm.weight, q.row, k.row, v.row)
        wanted[f"{here}.o_proj", "log_row/column"] = log_ratio(o.row, o.column)
        here = f"layers.{n}.mlp"
        wanted[here, "log_up/down"] = log_ratio(mlp.up_proj.row, mlp.down_proj.column)
        norm = block.post_attention_layernorm.weight
        wanted[here, "log_norm/gate+up"] = log_ratio(norm, mlp.gate_proj.row, mlp.up_proj.row)
        wanted[f"{here}.down_proj", "log_row/column"] = log_ratio(mlp.down_proj.row, mlp.down_proj.column)
    assert values(coordinates(model)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "quantities"),
    [
        ({"multipliers": "none"}, set()),
        ({"placement.table": "minimal"}, {"log_row/column"}),
        ({"model.block_norms": "frozen"}, {"log_row/column", "log_query/key", "log_value/out", "log_up/down"}),
        (
            {"multipliers": "scalar", "placement.overrides": {"lm_head": "scalar"}},
            {"log_query/key", "log_value/out", "log_up/down", "log_norm/head"}
            | {"log_norm/query+key+value", "log_norm/gate+up"},
        ),
        (
            {"model.qk_norm": True},
            {"log_row/column", "log_value/out", "log_up/down", "log_norm/value", "log_norm/gate+up"},
        ),
    ],
)
def test_a_placement_has_the_coordinates_of_its_redundancies(overrides: dict[str, Any], quantities: set[str]) -> None:
    assert {quantity for _, quantity in values(coordinates(build(overrides)))} == quantities


@torch.no_grad()
def test_coordinates_move_along_symmetries_of_the_model() -> None:
    model = build({"placement.overrides": {"lm_head": "column"}})
    block = model.layers[1]
    attention, mlp = block.self_attn, block.mlp
    pairs = {
        "log_query/key": (attention.q_proj.row, [attention.k_proj.row]),
        "log_value/out": (attention.v_proj.row, [attention.o_proj.column]),
        "log_up/down": (mlp.up_proj.row, [mlp.down_proj.column]),
        "log_norm/query+key+value": (
            block.input_layernorm.weight,
            [attention.q_proj.row, attention.k_proj.row, attention.v_proj.row],
        ),
        "log_norm/gate+up": (block.post_attention_layernorm.weight, [mlp.gate_proj.row, mlp.up_proj.row]),
        "log_norm/head": (model.norm.weight, [model.lm_head.column]),
    }
    logits = model(ids())
    for quantity, (a, bs) in pairs.items():
        before = values(coordinates(model))
        a *= 2
        for b in bs:
            b /= 2
        assert torch.equal(model(ids()), logits), quantity  # powers of two: exact
        (name,) = {name for name, q in before if q == quantity and name.startswith(("layers.1", "lm_head"))}
        moved = values(coordinates(model))[name, quantity] - before[name, quantity]
        assert moved == pytest.approx(2 * math.log(2), rel=1e-4), quantity


def test_a_new_group_is_one_new_module(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    package = tmp_path / "lit_mult"
    shutil.copytree(Path(lit_mult.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "diagnostics" / "groups" / "sizes.py").write_text(NEW_GROUP)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny({"train.steps": 4}).to_dict()))
    command = "-m lit_mult fit --config run.yaml --diagnostics sizes --every 2 --out run"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=environment, check=True)

    found = lit_mult.load_diagnostics(tmp_path / "run")
    assert found["step"].tolist() == [0, 2, 4]
    assert set(found["group"]) == {"sizes"}
    assert (found["value"] > 0).all()


NEW_GROUP = """
import torch
from lit_mult.diagnostics.group import Group
from lit_mult.diagnostics.readings import Reading

class Sizes(Group):
    def state(self, moment):
        size = sum(parameter.numel() for parameter in moment.model.parameters())
        yield Reading("size", "model", "model", torch.tensor(float(size)))
"""

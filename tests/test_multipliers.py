"""Multiplied matrices: eq. 2 to 4 of arXiv:2601.04890, and folding the multipliers away."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import initialized
from torch import Tensor, nn

from lit_mult.config import RunConfig
from lit_mult.method.plan import MatrixPlan
from lit_mult.nn.llama import Llama
from lit_mult.nn.multipliers import MultipliedEmbedding, MultipliedLinear, MultipliedMatrix, effective_weight
from lit_mult.registry.contracts import Axis
from lit_mult.registry.roles import Role

VOCAB = 19
ALL_AXES = [frozenset(axes) for n in range(4) for axes in itertools.combinations(Axis, n)]


def label(axes: frozenset[Axis]) -> str:
    return "+".join(sorted(axes)) or "none"


def matrix_plan(axes: frozenset[Axis], constant: float = 1.0, shape: tuple[int, int] = (5, 3)) -> MatrixPlan:
    return MatrixPlan(
        name="w",
        kind="vector",
        role=Role.Q_PROJ,
        shape=shape,
        axes=axes,
        start=dict.fromkeys(axes, 1.0),
        start_factor=1.0,
        constant=constant,
        init_std=1.0,
        optimizer="adamw",
        lr=0.1,
        weight_decay=0.0,
    )


def filled(module: MultipliedMatrix, seed: int = 0) -> MultipliedMatrix:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values if name == "weight" else values.abs() + 0.5
    return module


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    axes=st.sampled_from(ALL_AXES),
    constant=st.sampled_from([1.0, 0.25, 5.656854]),
    d_out=st.integers(1, 6),
    d_in=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_gradients_are_those_of_equation_4(
    axes: frozenset[Axis], constant: float, d_out: int, d_in: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    W, G = draw(d_out, d_in), draw(d_out, d_in)
    s = draw() if Axis.SCALAR in axes else torch.ones((), dtype=torch.float64)
    r = draw(d_out) if Axis.ROW in axes else torch.ones(d_out, dtype=torch.float64)
    c = draw(d_in) if Axis.COLUMN in axes else torch.ones(d_in, dtype=torch.float64)

    W_eff = [[constant * s * r[i] * W[i, j] * c[j] for j in range(d_in)] for i in range(d_out)]
    # eq. 4, with the constant a and the scalar s along: dL/dW_ij = a s r_i c_j G_ij; dL/dr_i = a s sum_j W_ij c_j G_ij;
    # dL/dc_j = a s sum_i r_i W_ij G_ij; dL/ds = a sum_ij r_i W_ij c_j G_ij
    expected = {
        "weight": constant * s * torch.einsum("i,j,ij->ij", r, c, G),
        Axis.ROW: constant * s * torch.einsum("ij,j,ij->i", W, c, G),
        Axis.COLUMN: constant * s * torch.einsum("i,ij,ij->j", r, W, G),
        Axis.SCALAR: constant * torch.einsum("i,ij,j,ij->", r, W, c, G),
    }

    leaves = {"weight": W, Axis.SCALAR: s, Axis.ROW: r, Axis.COLUMN: c}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items() if name == "weight" or name in axes}
    out = effective_weight(leaves["weight"], constant, *(leaves.get(axis) for axis in Axis))
    torch.testing.assert_close(out, torch.tensor(W_eff, dtype=torch.float64).view(d_out, d_in))
    if out.requires_grad:
        (out * G).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_effective_weight_is_the_weight_itself_without_multipliers() -> None:
    module = MultipliedLinear(matrix_plan(frozenset()))
    assert module.effective_weight() is module.weight
    assert [name for name, _ in module.named_parameters()] == ["weight"]


@pytest.mark.parametrize("value", [0.0390625, 5.656854, 3.0])
def test_a_fixed_constant_acts_as_a_learnable_scalar_started_there(value: float) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fixed = filled(MultipliedLinear(matrix_plan(frozenset(), constant=value)))
    learnable = filled(MultipliedLinear(matrix_plan(frozenset({Axis.SCALAR}))))
    learnable.scalar.data.fill_(value)
    assert torch.equal(fixed(x), learnable(x))


@pytest.mark.parametrize("axes", ALL_AXES, ids=label)
def test_linear_and_embedding_use_the_effective_matrix(axes: frozenset[Axis]) -> None:
    linear = filled(MultipliedLinear(matrix_plan(axes, constant=0.5)))
    embedding = filled(MultipliedEmbedding(matrix_plan(axes, constant=0.5)))
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.tensor([[0, 4], [2, 2]])
    torch.testing.assert_close(linear(x), x @ linear.effective_weight().T)
    torch.testing.assert_close(embedding(ids), embedding.effective_weight()[ids])


@pytest.mark.parametrize("constant", [1.0, 0.0390625, 5.656854])
@pytest.mark.parametrize("axes", ALL_AXES, ids=label)
def test_merged_weight_is_the_effective_weight_and_leaves_the_module_alone(
    axes: frozenset[Axis], constant: float
) -> None:
    module = filled(MultipliedLinear(matrix_plan(axes, constant)))
    before = copy.deepcopy(module.state_dict())
    merged = module.merged_weight()
    assert torch.equal(merged, module.effective_weight())  # float64 throughout: exact
    assert torch.equal(module.merged_weight(), merged)  # merging does not pile up
    assert not merged.requires_grad
    merged.zero_()  # a copy, even where nothing multiplies
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("axes", ALL_AXES, ids=label)
def test_powers_of_two_merge_exactly_in_float32(axes: frozenset[Axis]) -> None:
    module = filled(MultipliedLinear(matrix_plan(axes, constant=0.25))).float()
    for axis in axes:
        parameter = getattr(module, axis.value)
        parameter.data = 2.0 ** torch.randint(-3, 4, parameter.shape, generator=torch.Generator().manual_seed(3))
    merged = module.merged_weight()
    assert merged.dtype == torch.float32
    assert torch.equal(merged, module.effective_weight())


def test_merging_in_float32_rounds_once() -> None:
    module = filled(MultipliedLinear(matrix_plan(frozenset(Axis), constant=5.656854))).float()
    W, s, r, c = (getattr(module, name).detach().double() for name in ("weight", "scalar", "row", "column"))
    exact = 5.656854 * s * r[:, None] * W * c
    assert torch.equal(module.merged_weight(), exact.float())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("table", ["full", "minimal"])
@pytest.mark.parametrize("kind", ["none", "fixed", "scalar", "vector"])
def test_a_model_of_merged_weights_without_multipliers_gives_the_same_logits(
    kind: str, table: str, groups: int, tied: bool
) -> None:
    shape = {"d_model": 32, "n_layers": 2, "head_dim": 8, "mlp_ratio": 2.0, "num_key_value_groups": groups}
    multiplied = build(
        multipliers=kind,
        model=shape | {"tie_embeddings": tied},
        placement={"table": table},
        parametrization={"base_d_model": 16, "width_rule": "multiplier", "preset": "falcon-h1-0.5b"},
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in multiplied.named_parameters():
        if not name.endswith("weight"):
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    # A tied head and its embedding have different multipliers, so that the merged model is untied.
    plain = build(model=shape, parametrization={"rule": "standard"}, multipliers="none")
    merged = {
        f"{name}.weight": module.merged_weight() if isinstance(module, MultipliedMatrix) else module.weight
        for name, module in multiplied.named_modules()
        if hasattr(module, "weight")
    }
    plain.load_state_dict(merged)
    assert all(module.effective_weight() is module.weight for module in matrices(plain))
    ids_BT = torch.randint(VOCAB, (2, 9), generator=generator)
    torch.testing.assert_close(plain(ids_BT), multiplied(ids_BT), rtol=1e-5, atol=1e-5)


def build(**settings: object) -> Llama:
    return initialized(RunConfig.from_dict(settings), VOCAB)


def matrices(model: nn.Module) -> list[MultipliedMatrix]:
    return [module for module in model.modules() if isinstance(module, MultipliedMatrix)]

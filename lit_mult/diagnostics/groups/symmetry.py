"""Coordinates along which redundant multipliers can drift without changing the model (arXiv:2601.04890 sec. 4.1).

A product a·b is unchanged by (sa, b/s), and the coordinate log(|a|/|b|) of RMS norms moves along this symmetry only.
The other kind is the scale of the residual stream before a norm, which the norm removes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.diagnostics.group import Group, Moment
from lit_mult.diagnostics.parts import device_rms, matrices
from lit_mult.diagnostics.readings import Reading
from lit_mult.nn.llama import Block, Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.registry.contracts import Axis
from lit_mult.registry.kinds import check_redundancies


class Symmetry(Group):
    """residual_rms of the embedding and of every block, and `coordinates`."""

    def check(self, config: RunConfig, processes: int) -> None:
        check_redundancies(config.multipliers, "train.diagnostics symmetry")

    def state(self, moment: Moment) -> Iterator[Reading]:
        yield from (reading for reading in moment.outputs if reading.quantity == "residual_rms")
        yield from coordinates(moment.model)


def coordinates(model: Llama) -> Iterator[Reading]:
    """log(|a|/|b|) (natural) of every redundant pair in the placement.

    | quantity                 | a                      | b                                                          |
    |--------------------------|------------------------|------------------------------------------------------------|
    | log_query/key            | rows of W_Q            | rows of W_K                                                |
    | log_value/out            | rows of W_V            | columns of W_out                                           |
    | log_up/down              | rows of W_up           | columns of W_down                                          |
    | log_norm/query+key+value | norm before attention  | rows of W_Q, W_K, W_V (all three), geometric mean          |
    | log_norm/value           | the same               | rows of W_V, where queries and keys have norms             |
    | log_norm/gate+up         | norm before the MLP    | rows of W_gate, W_up (both), geometric mean                |
    | log_norm/head            | final norm             | columns of the LM head                                     |
    | log_row/column           | rows of a matrix       | columns of the same matrix (and scalar/row, scalar/column) |

    A matrix without such a vector is represented by its scalar. Fixed norms and missing multipliers have no coordinate,
    nor have query and key where they have norms: nothing is exchanged between them.
    """
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        attention, mlp, name = block.self_attn, block.mlp, f"layers.{layer}"
        q, k, v = (_out_side(matrix) for matrix in (attention.q_proj, attention.k_proj, attention.v_proj))
        gate, up = _out_side(mlp.gate_proj), _out_side(mlp.up_proj)
        has_norms = attention.q_norm is not None
        if not has_norms:
            yield from _pair("query/key", f"{name}.self_attn", "attention", q, [k])
        yield from _pair("value/out", f"{name}.self_attn", "attention", v, [_in_side(attention.o_proj)])
        yield from _pair("up/down", f"{name}.mlp", "mlp", up, [_in_side(mlp.down_proj)])
        before_attention, before_mlp = _weight(block.input_layernorm), _weight(block.post_attention_layernorm)
        readers, said = ([v], "norm/value") if has_norms else ([q, k, v], "norm/query+key+value")
        yield from _pair(said, f"{name}.self_attn", "attention", before_attention, readers)
        yield from _pair("norm/gate+up", f"{name}.mlp", "mlp", before_mlp, [gate, up])
    yield from _pair("norm/head", "lm_head", "lm_head", _weight(model.norm), [_in_side(model.lm_head)])
    for name, matrix in matrices(model):
        for a, b in combinations(Axis, 2):
            yield from _pair(f"{a}/{b}", name, matrix.role.value, getattr(matrix, a), [getattr(matrix, b)])


def _out_side(matrix: MultipliedMatrix) -> Tensor | None:
    return matrix.scalar if matrix.row is None else matrix.row


def _in_side(matrix: MultipliedMatrix) -> Tensor | None:
    return matrix.scalar if matrix.column is None else matrix.column


def _weight(norm: RMSNorm) -> Tensor | None:
    return norm.weight if norm.weight.requires_grad else None


def _pair(quantity: str, name: str, role: str, a: Tensor | None, bs: list[Tensor | None]) -> Iterator[Reading]:
    present = [b for b in bs if b is not None]
    if a is not None and len(present) == len(bs):
        log_b = torch.stack([device_rms(b).log() for b in present]).mean()
        yield Reading(f"log_{quantity}", name, role, device_rms(a).log() - log_b)

"""Merging multipliers into the weights, which gives a plain Llama without extra cost at inference."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from lit_mult.nn.llama import MLP, Attention, Llama, RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix


@torch.no_grad()
def merged(model: Llama) -> Llama:
    """A copy for inference with W_eff (arXiv:2601.04890 eq. 2 and 3) in place of W, and no multipliers.

    Products are computed in float64 and cast once. The query matrix, or the norm of queries, absorbs an attention scale
    other than a plain Llama's 1 / sqrt(head_dim). A tied head is untied: it shares W with the embedding, but not the
    multipliers. A scalar norm becomes a constant vector.
    """
    plain = copy.deepcopy(model).requires_grad_(False).eval()
    for module in plain.modules():
        if isinstance(module, Attention | MLP):
            module.joint_weight = None  # not merged
        if isinstance(module, Attention):
            usual = 1 / math.sqrt(module.head_dim)
            if module.q_norm is None:
                module.q_proj.constant *= module.scale / usual
            else:
                module.q_norm.weight.mul_(module.scale / usual)
            module.scale = usual
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(module.weight_vector().clone(), requires_grad=False)
            module.is_scalar = False
    # Compute all before replacing any: a tied head reads the embedding's W.
    matrices = [module for module in plain.modules() if isinstance(module, MultipliedMatrix)]
    weights = [matrix.merged_weight() for matrix in matrices]
    for matrix, weight in zip(matrices, weights, strict=True):
        matrix.weight = nn.Parameter(weight, requires_grad=False)
        matrix.scalar = matrix.row = matrix.column = None
        matrix.constant = 1.0
    return plain

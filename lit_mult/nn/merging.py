"""Multipliers folded into the weights: the trained model as a plain Llama, which costs nothing extra to run."""

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

    Products are formed in float64 and cast once. An attention scale other than 1 / sqrt(head_dim), the one a plain
    Llama has, goes into the query matrix. A head tied to the embedding comes apart from it: the two share W, but not
    their multipliers. The scalar of a norm becomes a constant vector.
    """
    plain = copy.deepcopy(model).requires_grad_(False).eval()
    for module in plain.modules():
        if isinstance(module, Attention | MLP):
            module.joint_weight = None  # of the model that was copied
        if isinstance(module, Attention):
            usual = 1 / math.sqrt(module.head_dim)
            module.q_proj.constant *= module.scale / usual
            module.scale = usual
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(module.weight_vector().clone(), requires_grad=False)
            module.is_scalar = False
    # All are formed before any is put in place: a tied head reads the embedding's W.
    matrices = [module for module in plain.modules() if isinstance(module, MultipliedMatrix)]
    weights = [matrix.merged_weight() for matrix in matrices]
    for matrix, weight in zip(matrices, weights, strict=True):
        matrix.weight = nn.Parameter(weight, requires_grad=False)
        matrix.scalar = matrix.row = matrix.column = None
        matrix.constant = 1.0
    return plain

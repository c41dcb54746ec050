"""All initialization of the model, in one place."""

from __future__ import annotations

import torch
from torch import nn

from lit_mult.method.plan import RunPlan
from lit_mult.nn.llama import RMSNorm
from lit_mult.nn.multipliers import MultipliedMatrix


@torch.no_grad()
def initialize(model: nn.Module, plan: RunPlan, seed: int) -> None:
    """Fill every parameter of the model.

    | parameter                   | start                                                       |
    |-----------------------------|-------------------------------------------------------------|
    | matrices                    | N(0, init_std^2), `method.rules.init_std`                   |
    | learnable multipliers       | depends on their kind: 1, or the preset's multiplier        |
    | RMSNorm weights, frozen too | 1                                                           |

    Matrices are sampled on the CPU in the order of the forward pass, and multipliers do not use the generator: arms
    that differ only in their multipliers start from the same matrices, on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    sampled: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MultipliedMatrix):
            matrix = plan.matrices[name]
            if id(module.weight) not in sampled:  # a tied head is the embedding
                module.weight.copy_(torch.randn(matrix.shape, generator=generator) * matrix.init_std)
                sampled.add(id(module.weight))
            module.start_multipliers(matrix)

"""Models of equal shapes as one: every parameter has a leading dimension, of which each model has one index.

A GPU is idle for most of a small model's step, waiting for the next kernel; a stack of M models launches as many
kernels as one of them. Members never meet: products are batched over M, and everything else works row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_mult.nn.llama import Llama
from lit_mult.nn.multipliers import MultipliedMatrix


@torch.no_grad()
def stack(models: Sequence[Llama]) -> Llama:
    """A model whose parameters and constants are those of all, (M, ...); ids are (M*B, T), member after member.

    Raises:
        ValueError: the models have not the same tensors, as those of different placements have not.
    """
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError("only models of the same tensors can be stacked")
    stacked = copy.deepcopy(models[0])
    done: dict[int, nn.Parameter] = {}
    for module, *members in zip(stacked.modules(), *(model.modules() for model in models), strict=True):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:  # a tied head shares the embedding's
                values = torch.stack([member.get_parameter(name) for member in members])
                done[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, name, done[id(parameter)])
        if isinstance(module, MultipliedMatrix):
            constants = [member.constant for member in members if isinstance(member, MultipliedMatrix)]
            if len(set(constants)) > 1:
                del module.constant
                module.register_buffer("constant", torch.tensor(constants), persistent=False)
    return stacked


def member_state(stacked: nn.Module, index: int) -> dict[str, Tensor]:
    """The state of one member, as of a model of its own; views of the stack's."""
    return {name: value[index] for name, value in stacked.state_dict().items()}

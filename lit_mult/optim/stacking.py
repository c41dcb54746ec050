"""What an optimizer gives for stacks of models: its update on one buffer with a row for each member.

Shapes in names: M members, P numbers of a member.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_mult.config import OptimConfig


class StackedUpdate(ABC):
    """The update of all parameters that one optimizer trains in a stack, and its state."""

    states: ClassVar[tuple[str, ...]]
    """Names of its state tensors, as the state of a run's own optimizer has them."""
    counts_steps: ClassVar[bool] = False
    """Whether that state has the number of steps, too."""
    by_shape: ClassVar[bool] = False
    """Whether it works on whole matrices; those of one shape then lie side by side."""

    def __init__(self, like_MP: Tensor, matrices: Sequence[tuple[slice, torch.Size]], config: OptimConfig) -> None:
        """Allocate the state.

        Args:
            like_MP: the parameters.
            matrices: columns and shape (d_out, d_in) of matrices side by side, where it works `by_shape`.
            config: of the members.
        """
        self.state = {name: torch.zeros_like(like_MP) for name in self.states}
        self.matrices, self.config = matrices, config

    @abstractmethod
    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """What is subtracted (M, P) from the decayed parameters at a learning rate of 1; `step` counts from 0."""

"""The interface of an optimizer's update of stacks: on one buffer with a row per member.

Shapes in names: M members, P numbers of a member.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig


class StackedUpdate(ABC):
    """The update of all parameters that one optimizer trains in a stack, and its state."""

    states: ClassVar[tuple[str, ...]]
    """Names of its state tensors, as in the state of the plain optimizer."""
    counts_steps: ClassVar[bool] = False
    """Whether that state has a `step` too."""
    by_shape: ClassVar[bool] = False
    """Whether it needs whole matrices; those of one shape are then adjacent."""

    def __init__(self, like_MP: Tensor, matrices: Sequence[tuple[slice, torch.Size]], config: OptimConfig) -> None:
        """Allocate the state.

        Args:
            like_MP: the parameters.
            matrices: with `by_shape`, columns and shape (d_out, d_in) of adjacent matrices.
            config: of the members.
        """
        self.state = {name: torch.zeros_like(like_MP) for name in self.states}
        self.matrices, self.config = matrices, config
        self.eps: float | Tensor = config.eps
        """Adam's epsilon; (M, P) where parameters differ."""

    def state_of(self, columns: slice, shape: torch.Size) -> dict[str, Tensor]:
        """The state (M, ...) of one parameter (M, ...), by the names of the plain optimizer; shares memory."""
        return {name: values_MP[:, columns].view(shape) for name, values_MP in self.state.items()}

    @abstractmethod
    def update(self, gradients_MP: Tensor, step: int) -> Tensor:
        """Update (M, P) to subtract from the decayed parameters at a learning rate of 1; `step` counts from 0."""

    def settle(self, weights_MP: Tensor) -> None:  # noqa: B027 - a hook
        """Correct the parameters (M, P), in place, after their step. Most optimizers have nothing to correct."""

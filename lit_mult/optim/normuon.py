"""NorMuon (arXiv:2510.05491): Muon whose orthogonal updates have rows of equal size.

    O = NS(momentum),     v <- 0.95 v + 0.05 mean over a row of O^2,     O <- O / (sqrt(v) + 1e-10),

then O is scaled back to its Frobenius norm and matched to Adam's RMS as Muon's. Rows of an orthogonal matrix that is
wide or square are equal already: those of a tall one (gate_proj, up_proj) change, and those that few iterations leave
unequal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_mult.errors import ConfigError
from lit_mult.optim.muon import Muon, StackedMuon, orthogonal_momenta, settings
from lit_mult.optim.noise import NoiseReference
from lit_mult.optim.sharding import as_dtensor

if TYPE_CHECKING:
    from lit_mult.config import OptimConfig

_BETA, _EPS = 0.95, 1e-10


class NorMuon(Muon):
    """`optim.muon.Muon` with normalized rows; the state has their mean squares too, in float32."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """`settings`: of `Muon`.

        Raises:
            ConfigError: a parameter is sharded, or several matrices in one.
            UserError: as `Muon`.
        """
        super().__init__(groups, **settings)
        for group in self.param_groups:
            if group.get("parts") is not None or any(as_dtensor(one) is not None for one in group["params"]):
                where = f"cannot train {group.get('name', 'a matrix')}, which is sharded or fused"
                raise ConfigError("optimizer", group.get("optimizer", "normuon"), f"{where}: use adamw or muon")

    def _updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        updates = orthogonal_momenta(parameters, self.state, group)
        return [self._normalized(one, update, group) for one, update in zip(parameters, updates, strict=True)]

    def _normalized(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        stored = update.mT if group.get("transposed") else update
        state = self.state[parameter]
        if "row_square" not in state:
            dtype = torch.promote_types(update.dtype, torch.float32)
            state["row_square"] = torch.zeros(*stored.shape[:-1], 1, dtype=dtype, device=update.device)
        rows = normalize_rows(stored, state["row_square"])
        return rows.mT if group.get("transposed") else rows


def normalize_rows(updates_NxAxB: Tensor, squares_NxAx1: Tensor) -> Tensor:
    """Update the mean squares of rows, divide by their roots, and restore the norms of the matrices."""
    wide_NxAxB = updates_NxAxB.to(squares_NxAx1.dtype)
    squares_NxAx1.lerp_(wide_NxAxB.square().mean(dim=-1, keepdim=True), 1 - _BETA)
    rows_NxAxB = wide_NxAxB / (squares_NxAx1.sqrt() + _EPS)
    norms, before = (one.norm(dim=(-2, -1), keepdim=True) for one in (rows_NxAxB, wide_NxAxB))
    rows_NxAxB *= before / norms.clamp(min=_EPS)
    return rows_NxAxB.to(updates_NxAxB.dtype)


def build(groups: list[dict[str, Any]], config: OptimConfig) -> NorMuon:
    """The optimizer; each group has an lr and weight_decay."""
    return NorMuon(groups, **settings(config))


NOISE = NoiseReference(by_shape=True, autocorrelation=None)


class StackedNorMuon(StackedMuon):
    """Mean squares of rows are kept by shape, members one after the other."""

    def __init__(self, like_MP: Tensor, matrices: Sequence[tuple[slice, torch.Size]], config: OptimConfig) -> None:
        """As `StackedUpdate`."""
        super().__init__(like_MP, matrices, config)
        dtype = torch.promote_types(like_MP.dtype, torch.float32)
        self._squares = [
            like_MP.new_zeros(len(like_MP), (columns.stop - columns.start) // shape[1], dtype=dtype)
            for columns, shape in matrices
        ]

    def finish(self, index: int, updates_NxAxB: Tensor) -> Tensor:
        squares_NxAx1 = self._squares[index].view(*updates_NxAxB.shape[:-1], 1)
        return normalize_rows(updates_NxAxB, squares_NxAx1)

    def state_of(self, columns: slice, shape: torch.Size) -> dict[str, Tensor]:
        at = next(k for k, (own, _) in enumerate(self.matrices) if columns.stop <= own.stop)
        first = (columns.start - self.matrices[at][0].start) // shape[-1]
        own_MR = self._squares[at][:, first : first + shape[-2]]
        return super().state_of(columns, shape) | {"row_square": own_MR.unflatten(1, (shape[-2], 1))}

"""Whole matrices from sharded ones (DTensors): which rank owns which, and the way there and back.

Shapes in names: N matrices of shape (A, B), of which this rank has shards (a, b).
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_mult.errors import ConfigError, UserError
from lit_mult.registry.roles import Shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

Kind = TypeVar("Kind", bound=Tensor)

_Blocks = list[list[tuple[int, ...]]]
"""For every rank, the shape of what it exchanges with this one of every batch."""


class Sharding(NamedTuple):
    """One shard of every matrix a rank, as `torch.chunk` cuts them."""

    group: ProcessGroup
    dim: int
    """The dimension that is cut: -2 or -1."""


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor.

    None exists before its module is imported, which costs half a second and needs a torch with `torch.distributed`.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def placement_of(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Mesh and placements of a DTensor; None for a plain tensor."""
    sharded = as_dtensor(tensor)
    return None if sharded is None else (sharded.device_mesh, sharded.placements)


def reshard(model: nn.Module) -> None:
    """Put the parameters that FSDP2 trains back in place; after a forward pass alone its root has gathered ones."""
    module = sys.modules.get("torch.distributed.fsdp")
    for one in model.modules():
        if module is not None and isinstance(one, module.FSDPModule):
            one.reshard()


def by_placement(tensors: Iterable[Kind], placement: Callable[[Kind], Any] = placement_of) -> Iterable[list[Kind]]:
    """Plain tensors apart from DTensors of each placement: torch cannot mix them in one call."""
    found = defaultdict(list)
    for tensor in tensors:
        found[placement(tensor)].append(tensor)
    return found.values()


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards of tensors of one placement, sharing their memory; under `no_grad`."""
    if as_dtensor(tensors[0]) is None:
        return tensors
    return [sharded.to_local() for sharded in map(as_dtensor, tensors) if sharded is not None]


def local_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """This rank's shards of the gradients of parameters of one placement, placed as the parameters are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    placement = placement_of(parameters[0])
    if placement is None or all(placement_of(gradient) == placement for gradient in gradients):
        return local(gradients)
    sharded = (gradient for gradient in map(as_dtensor, gradients) if gradient is not None)
    return local([gradient.redistribute(placements=placement[1]) for gradient in sharded])


def sharding_of(matrix: Tensor) -> Sharding | None:
    """How the matrices of a parameter (A, B) or (E, A, B) are cut; None if each rank has whole ones.

    Raises:
        UserError: they are cut along several dimensions of the mesh, or otherwise than by `Shard`.
    """
    sharded = as_dtensor(matrix)
    if sharded is None:
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, found = sharded.device_mesh, None
    for mesh_dim, placement in enumerate(sharded.placements):
        dim = getattr(placement, "dim", None)
        if mesh.size(mesh_dim) == 1 or isinstance(placement, Replicate) or (dim == 0 and matrix.ndim == 3):
            continue  # all of it, or some whole matrices of a stack
        if type(placement) is not Shard or found is not None:
            where = f"of shape {tuple(matrix.shape)} has placements {sharded.placements}"
            raise UserError(f"a parameter {where}: Muon needs matrices sharded (Shard) along one dimension of the mesh")
        found = Sharding(mesh.get_group(mesh_dim), placement.dim % matrix.ndim - matrix.ndim)
    return found


def check_whole_matrices(groups: Iterable[Mapping[str, Any]]) -> None:
    """Check parameter groups for an optimizer that needs the norms of one whole matrix.

    Raises:
        ConfigError: a parameter is sharded, a stack, or several matrices in one.
    """
    for group in groups:
        for parameter in group["params"]:
            if as_dtensor(parameter) is not None or parameter.ndim > 2 or group.get("parts") is not None:
                where = f"cannot train {group.get('name', 'a matrix')}, which is sharded, stacked or fused"
                raise ConfigError("optimizer", group.get("optimizer"), f"{where}: use adamw or muon")


def chunk_sizes(size: int, ranks: int) -> list[int]:
    """Sizes of the shards of a dimension: equal ones of ceil(size / ranks), then a smaller one, then empty ones."""
    chunk = math.ceil(size / ranks)
    return [max(0, min(chunk, size - chunk * rank)) for rank in range(ranks)]


def owners(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """Rank that orthogonalizes each matrix (A, B): the largest first, to the rank with the least work so far.

    A product of the iteration takes A B min(A, B) multiplications. All ranks compute the same answer.
    """
    work = [math.prod(shape) * min(shape) for shape in shapes]
    least, found = [(0, rank) for rank in range(ranks)], [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -work[index]):
        load, found[index] = least[0]
        heapq.heapreplace(least, (load + work[index], found[index]))
    return found


@dataclass(frozen=True)
class Shards:
    """This rank's shards of matrices of one shape."""

    shards_Nxaxb: Tensor
    shape: Shape
    """(A, B) of the whole matrices."""
    dim: int
    """See `Sharding`."""

    def shape_on(self, rank: int, ranks: int) -> tuple[int, ...]:
        """(a, b) on a rank."""
        cut = list(self.shape)
        cut[self.dim] = chunk_sizes(cut[self.dim], ranks)[rank]
        return tuple(cut)


def on_owners(
    batches: Sequence[Shards], function: Callable[[int, Tensor], Tensor], group: ProcessGroup
) -> list[Tensor]:
    """Gather every matrix on the rank that owns it, apply a function there, and send back the shards of the result.

    Two all-to-all exchanges, in which each rank of the group must take part. A rank holds its shards and the matrices
    that it owns.

    Args:
        batches: of one dtype and device; the same numbers and shapes in the same order on all ranks.
        function: (index of a batch, those of its matrices that this rank owns (n, A, B)) -> result (n, A, B).
        group: its ranks have the shards.

    Returns:
        For every batch, this rank's shards (N, a, b) of the results.
    """
    ranks, me = range(dist.get_world_size(group)), dist.get_rank(group)
    shapes = [batch.shape for batch in batches for _ in batch.shards_Nxaxb]
    owner = iter(owners(shapes, len(ranks)))
    owned: list[list[list[int]]] = []  # indices in the batch of the matrices of each rank
    for batch in batches:
        owned.append([[] for _ in ranks])
        for index in range(len(batch.shards_Nxaxb)):
            owned[-1][next(owner)].append(index)
    every = list(zip(batches, owned, strict=True))
    there = [[(len(mine[rank]), *batch.shape_on(me, len(ranks))) for batch, mine in every] for rank in ranks]
    here = [[(len(mine[me]), *batch.shape_on(rank, len(ranks))) for batch, mine in every] for rank in ranks]

    def exchange(tensors: Iterable[Tensor], sent: _Blocks, received: _Blocks) -> list[list[Tensor]]:
        incoming, outgoing = ([sum(map(math.prod, blocks)) for blocks in way] for way in (received, sent))
        flat = batches[0].shards_Nxaxb.new_empty(sum(incoming))
        flat_sent = torch.cat([flat[:0], *(tensor.reshape(-1) for tensor in tensors)])
        dist.all_to_all_single(flat, flat_sent, incoming, outgoing, group=group)
        pieces = iter(flat.split([math.prod(block) for blocks in received for block in blocks]))
        return [[next(pieces).view(block) for block in blocks] for blocks in received]

    shards = (batch.shards_Nxaxb[index] for rank in ranks for batch, mine in every for index in mine[rank])
    arrived = exchange(shards, there, here)
    results = []
    for k, batch in enumerate(batches):
        shards_of_ranks = [blocks[k] for blocks in arrived]
        whole_NxAxB = torch.cat(shards_of_ranks, dim=batch.dim)
        result_NxAxB = function(k, whole_NxAxB) if len(whole_NxAxB) else whole_NxAxB
        results.append(result_NxAxB.split([shard.shape[batch.dim] for shard in shards_of_ranks], dim=batch.dim))
    returned = exchange((result[rank] for rank in ranks for result in results), here, there)

    updates = [torch.empty_like(batch.shards_Nxaxb) for batch in batches]
    for rank, blocks in enumerate(returned):
        for k, block in enumerate(blocks):
            for index, shard in zip(owned[k][rank], block, strict=True):
                updates[k][index] = shard
    return updates

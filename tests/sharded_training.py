"""One small model, trained by one process or by several that each have a share of the batch.

Imported by those processes, hence without pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lit_mult.config import OptimConfig
from lit_mult.errors import UserError
from lit_mult.inject.groups import build_param_groups, clip_grad_norm_
from lit_mult.inject.model import add_multipliers
from lit_mult.optim import muon
from lit_mult.optim.clipping import clip_gradients, gradient_norm
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.contracts import RowParts

STEPS, HALF, LIMIT = 20, 10, 0.05
FORMS: dict[str, dict[str, Any]] = {
    "muon": {},
    "corrected": {"optimizer": "muon", "decay_rule": "corrected", "peak_lr": 0.4},
    "cautious": {"optimizer": "muon", "decay_rule": "cautious"},
    "cautious AdamW": {"optimizer": "adamw", "decay_rule": "cautious"},
    "scion": {},
    "scion-sign": {},
}
"""Optimizers and decay rules by name -> entries of their group."""


class Block(nn.Module):
    """Matrices of every form, of which 4 ranks share none evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(10, 8) / 8**0.5)
        self.small = nn.Parameter(torch.randn(3, 10) / 10**0.5)  # fewer rows than ranks
        self.fused = nn.Parameter(torch.randn(14, 8) / 8**0.5)
        self.fused_transposed = nn.Parameter(torch.randn(14, 10) / 14**0.5)
        self.experts = nn.Parameter(torch.randn(3, 8, 10) / 10**0.5)  # fewer experts than ranks
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.plain.T) + torch.tanh(x @ self.fused.T) @ self.fused_transposed
        weights = torch.sigmoid(hidden @ self.small.T)
        return x + self.gain * torch.einsum("be,eoi,bi->bo", weights, self.experts, hidden)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.mix = nn.Parameter(torch.randn(8, 8) / 8**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)) @ self.mix.T)


class Foreign(nn.Module):
    """Token ids (B, T) -> logits (B, T, 11), with a fused matrix and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"qkv": nn.Linear(8, 21), "out": nn.Linear(7, 8), "up": nn.Linear(8, 13), "down": nn.Linear(13, 8)}
            )
            for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + block["out"](torch.tanh(q * k) + v)
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


ROLES: Any = {
    "embed": "embedding",
    "head": "lm_head",
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "out": "o_proj",
    "up": "gate_proj",
    "down": "down_proj",
}


def with_multipliers(kind: str, wrap: Callable[[Foreign], nn.Module] = lambda model: model) -> dict[str, Any]:
    """A model that is not ours, with multipliers, trained with Muon; wrapped after they were added."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = wrap(add_multipliers(Foreign(), kind, table="minimal", roles=ROLES, verbose=False))
    optimizer = HybridOptimizer(build_param_groups(model, 0.02, 0.1, "muon"))
    norms, generator = [], torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(11, (8, 6), generator=generator)[rank::ranks]
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        norms.append(float(clip_grad_norm_(model, LIMIT)))
        optimizer.step()
    return {"weights": weights(model), "norms": norms}


def shard_blocks(model: Foreign) -> nn.Module:
    for block in model.blocks:
        for layer in block.values():  # not called as a whole
            fully_shard(layer)
    return fully_shard(model)


def optimizer_of(model: nn.Module) -> HybridOptimizer:
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "small": {},
        "mix": {},
        "experts": {},
        "fused": {"parts": RowParts(2, (4, 1, 2))},
        "fused_transposed": {"parts": RowParts(1, (4, 6)), "transposed": True},
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        form = name.split(".")[-1]
        kind = {"plain": "whole", "small": "whole", "mix": "whole"}.get(form, form if form in forms else "rest")
        optimizer = "muon" if form in forms else "adamw"
        group = {"optimizer": optimizer, "lr": 0.02, "weight_decay": 0.1, "name": kind, **forms.get(form, {})}
        groups.setdefault(kind, {"params": [], **group})["params"].append(parameter)
    return HybridOptimizer(list(groups.values()), OptimConfig())


def advance(model: nn.Module, optimizer: HybridOptimizer, steps: range) -> list[float]:
    """Train; the gradient norm of every step."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator)
        optimizer.zero_grad()
        (model(inputs[rank::ranks]) - targets[rank::ranks]).square().mean().backward()
        norms.append(float(clip_gradients(list(model.parameters()), LIMIT)))
        optimizer.step()
    return norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All of every parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        found[name.removeprefix("module.")] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return found


def sharded(mesh: Any = None, **options: Any) -> Net:
    """By FSDP2: one group of parameters a block, and one of the rest."""
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh)


def save(model: nn.Module, optimizer: HybridOptimizer, folder: Path) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def resume(model: nn.Module, folder: Path) -> HybridOptimizer:
    optimizer = optimizer_of(model)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return optimizer


def two_ranks(folder: Path) -> dict[str, Any]:
    model = sharded()
    optimizer = optimizer_of(model)
    norms = advance(model, optimizer, range(HALF))
    save(model, optimizer, folder / "checkpoint")
    norms += advance(model, optimizer, range(HALF, STEPS))

    replicated = DistributedDataParallel(Net())
    ddp_norms = advance(replicated, optimizer_of(replicated), range(STEPS))
    foreign = {
        "ddp": with_multipliers("vector", DistributedDataParallel),
        "fsdp": with_multipliers("vector", shard_blocks),
        "scalar": with_multipliers("scalar", shard_blocks),
    }
    found = {"fsdp": weights(model), "fsdp_norms": norms, "ddp": weights(replicated), "ddp_norms": ddp_norms}
    return found | {"foreign": foreign, "fsdp1": [_refusal_of_fsdp1(use) for use in (False, True)]}


def _refusal_of_fsdp1(use_orig_params: bool) -> str:
    wrap = partial(FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    try:
        with_multipliers("vector", wrap)
    except UserError as error:
        return str(error)
    return ""


def four_ranks(folder: Path) -> dict[str, Any]:
    counted: list[tuple[int, ...]] = []
    orthogonalize = muon.orthogonalize

    def counting(updates: Tensor, *settings: Any) -> Tensor:
        counted.append(tuple(updates.shape))
        return orthogonalize(updates, *settings)

    muon.orthogonalize = counting
    model = sharded(shard_placement_fn=lambda parameter: Shard(1) if parameter.shape == (3, 8, 10) else None)
    norms = advance(model, optimizer_of(model), range(STEPS))
    muon.orthogonalize = orthogonalize

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hybrid = sharded(mesh)
    hybrid_norms = advance(hybrid, optimizer_of(hybrid), range(STEPS))

    resumed = sharded()
    resumed_norms = advance(resumed, resume(resumed, folder / "checkpoint"), range(HALF, STEPS))
    return {
        "fsdp": weights(model),
        "fsdp_norms": norms,
        "hsdp": weights(hybrid),
        "hsdp_norms": hybrid_norms,
        "resumed": weights(resumed),
        "resumed_norms": resumed_norms,
        "orthogonalized": counted,
        "foreign": {"fsdp": with_multipliers("vector", shard_blocks)},
        **_placements(mesh),
    }


def _placements(mesh: Any) -> dict[str, Any]:
    """A step on one matrix in every form and placement, or the refusal; the norm of DTensors beside plain gradients."""
    torch.manual_seed(1)
    weight, gradient = torch.randn(5, 3), torch.randn(5, 3)
    whole, rows, columns = [Replicate(), Replicate()], [Shard(0), Replicate()], [Replicate(), Shard(1)]
    steps = {
        form: [_step(distribute_tensor(weight.clone(), mesh, own), gradient, form) for own in (whole, rows, columns)]
        for form in FORMS
    }
    refusals = {
        "Shard(dim=1)": _step(distribute_tensor(weight, mesh, [Shard(0), Shard(1)]), gradient),
        "Partial(sum)": _step(DTensor.from_local(weight, mesh, [Partial(), Replicate()]), gradient),
        "hyperball": _step(distribute_tensor(weight, mesh, rows), gradient, "hyperball"),
        "normuon": _step(distribute_tensor(weight, mesh, rows), gradient, "normuon"),
    }

    mixed = [nn.Parameter(weight.clone())]
    mixed[0].grad = gradient.clone()
    for placements in ([Shard(1), Shard(0)], [Replicate(), Shard(0)]):
        mixed.append(nn.Parameter(distribute_tensor(weight, mesh, placements)))
        mixed[-1].grad = distribute_tensor(gradient, mesh, placements)
    norms = [float(clip_gradients(mixed, 1.0)), float(gradient_norm(mixed))]
    return {"weight": weight, "gradient": gradient, "steps": steps, "refusals": refusals, "mixed_norms": norms}


def _step(weight: DTensor, gradient: Tensor, form: str = "muon") -> Tensor | str:
    parameter = nn.Parameter(weight)
    # summed over ranks, as the gradient of a replicated matrix is where they have parts of the batch
    ranks = weight.device_mesh.size(0)
    parameter.grad = DTensor.from_local(gradient / ranks, weight.device_mesh, [Partial(), Replicate()])
    group = {"params": [parameter], "name": "w", "optimizer": form, "lr": 0.1, "weight_decay": 0.1}
    group |= FORMS.get(form, {})
    try:
        HybridOptimizer([group], OptimConfig()).step()
    except UserError as error:
        return str(error)
    return parameter.detach().full_tensor()


def work(rank: int, ranks: int, folder: Path) -> None:
    """A process; writes what it found to a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join{ranks}", rank=rank, world_size=ranks)
    found = {2: two_ranks, 4: four_ranks}[ranks](folder)
    torch.save(found, folder / f"{ranks}.{rank}.pt")
    dist.destroy_process_group()

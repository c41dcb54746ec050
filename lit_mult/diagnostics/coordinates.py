"""What a coordinate check measures (arXiv:2203.03466 app. D.1): sizes and changes of activations in a few real steps.

Per width and seed, on a fixed batch (the first of the run's data) and with the model's, optimizer's and schedule's own
code:

| kind   | coordinate                  | value                                                                     |
|--------|-----------------------------|---------------------------------------------------------------------------|
| start  | activation                  | RMS at initialization                                                     |
| change | activation                  | RMS of its change over the steps                                          |
| update | matrix                      | RMS of dW_eff x: what its own change does to its output at its last input |
| decay  | matrix                      | share that a step without gradients takes off W                           |

Activations are the outputs of attention, of the MLP, of each block, of the final norm, and the logits. `update` shows a
single matrix with a wrong lr, which the activations average away; `decay` shows a wrong weight decay, which takes
1 / (lr * decay) steps to act, by applying the optimizer once to gradients of 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows
from lit_mult.data.cache import prepare
from lit_mult.diagnostics.brownian import rms
from lit_mult.diagnostics.parts import matrices
from lit_mult.errors import ConfigError
from lit_mult.registry.roles import Role
from lit_mult.training.module import LitLlama

Kind = Literal["start", "change", "update", "decay"]


@dataclass(frozen=True)
class Measured:
    """One coordinate of one model."""

    width: int
    seed: int
    kind: Kind
    coordinate: str
    role: str
    """Of the matrix; empty for activations."""
    value: float


def measure(config: RunConfig, widths: Sequence[int], seeds: Sequence[int], steps: int) -> Iterator[Measured]:
    """Train each width with each seed for a few steps, and measure its coordinates.

    Args:
        config: the run; width, seed and length are replaced.
        widths: values of `model.d_model`.
        seeds: values of `seed`, of initialization and data.
        steps: optimizer steps.

    Raises:
        UserError: a width is not possible, or the data is not usable.
    """
    if config.model.pretrained is not None:
        raise ConfigError(
            "model.pretrained", config.model.pretrained, "has one width; a coordinate check needs several"
        )
    replaced = [
        config.with_overrides({"model.d_model": width, "seed": seed, "train.steps": steps})
        for width in widths
        for seed in seeds
    ]
    corpus = prepare(config.data)
    for one in replaced:
        windows = TrainWindows(corpus.train, one.data.seq_len, one.train.batch_size, one.seed)
        for kind, coordinate, role, value in _measure_one(one, windows, corpus.vocab_size):
            yield Measured(one.model.d_model, one.seed, kind, coordinate, role, value)


def _measure_one(config: RunConfig, windows: TrainWindows, vocab_size: int) -> Iterator[tuple[Kind, str, str, float]]:
    torch.manual_seed(config.seed)  # dropout
    module = LitLlama(config.to_dict(), vocab_size)
    of_model = dict(matrices(module.model))
    probe_BT = torch.from_numpy(windows.batch(0))[:, :-1]
    start, _ = _look(module, probe_BT)
    weights = {name: matrix.effective_weight().detach().clone() for name, matrix in of_model.items()}

    made: Any = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(config.train.steps):
        optimizer.zero_grad()
        module.training_step(torch.from_numpy(windows.batch(step)), step).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        schedule.step()
    end, inputs = _look(module, probe_BT)

    for name, value in start.items():
        yield "start", name, "", rms(value)
        yield "change", name, "", rms(end[name] - value)
    for name, matrix in of_model.items():
        change = matrix.effective_weight().detach() - weights[name]
        moved = change[probe_BT] if matrix.role is Role.EMBEDDING else inputs[name] @ change.T
        yield "update", name, matrix.role.value, rms(moved)
    yield from _decay(config, vocab_size)


def _decay(config: RunConfig, vocab_size: int) -> Iterator[tuple[Kind, str, str, float]]:
    module = LitLlama(config.to_dict(), vocab_size)
    made: Any = module.configure_optimizers()
    optimizer = made["optimizer"]
    of_model = dict(matrices(module.model))
    before = {name: matrix.weight.detach().clone() for name, matrix in of_model.items()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, matrix in of_model.items():
        share = rms(before[name].double() - matrix.weight.detach().double()) / rms(before[name])
        if share:  # without weight decay there is nothing to compare
            yield "decay", name, matrix.role.value, share


@torch.no_grad()
def _look(module: LitLlama, probe_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations by name, and the input of every matrix but the embedding."""
    model = module.model.eval()
    seen: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    wanted = r"norm|layers\.\d+(\.(self_attn(\.o_proj)?|mlp(\.down_proj)?))?"
    watched = [name for name, _ in model.named_modules() if re.fullmatch(wanted, name)]

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name], seen[name] = args[0], out

        return look

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in watched]
    seen["logits"] = model(probe_BT)
    for handle in handles:
        handle.remove()
    module.train()
    inputs["lm_head"] = seen["norm"]
    # The projections of a joint product are never called by themselves: they read what their block part reads.
    for layer in range(len(model.layers)):
        for part, readers in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            for reader in readers:
                inputs[f"layers.{layer}.{part}.{reader}"] = inputs[f"layers.{layer}.{part}"]
    activations = {name: value for name, value in seen.items() if not name.endswith("_proj")}
    return activations, inputs

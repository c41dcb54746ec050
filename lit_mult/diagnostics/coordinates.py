"""The coordinate check (arXiv:2203.03466 app. D.1): sizes and changes of activations over a few training steps.

Measured per width and seed, on the first batch of the data, with the code of a real run:

| kind   | coordinate                  | value                                                                     |
|--------|-----------------------------|---------------------------------------------------------------------------|
| start  | activation                  | RMS at initialization                                                     |
| change | activation                  | RMS of its change over the steps                                          |
| update | matrix                      | RMS of dW_eff x, x being the last input: the effect of its own change     |
| decay  | matrix                      | share of W that a step with zero gradients removes                        |

Activations are the outputs of attention, MLP, each block and the final norm, and the logits. `update` reveals a single
matrix with a wrong lr, which activations average out. `decay` reveals a wrong weight decay, which would take
1 / (lr * decay) steps to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows
from lit_mult.data.cache import prepare
from lit_mult.diagnostics.parts import TrainingModule, matrices, rms
from lit_mult.diagnostics.probe import activation, probe
from lit_mult.errors import ConfigError
from lit_mult.nn.llama import Llama
from lit_mult.registry.roles import Role

Kind = Literal["start", "change", "update", "decay"]
Coordinate = tuple[Kind, str, str, float]
"""(kind, coordinate, role, value), as in `Measured`."""


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


def measure(
    config: RunConfig,
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    make_module: Callable[[RunConfig, int], TrainingModule],
) -> Iterator[Measured]:
    """Train each width (`model.d_model`) with each seed for a few optimizer steps, and measure its coordinates.

    Width, seed and length replace those of `config`; `make_module(config, vocab_size)` makes the untrained module.

    Raises:
        UserError: a width is not possible, or the data is not usable.
    """
    if config.model.pretrained is not None:
        allowed = "has one width; a coordinate check needs several"
        raise ConfigError("model.pretrained", config.model.pretrained, allowed)
    configs = [
        config.with_overrides({"model.d_model": width, "seed": seed, "train.steps": steps})
        for width in widths
        for seed in seeds
    ]
    corpus = prepare(config.data)
    for run in configs:
        windows = TrainWindows(corpus.train, run.data.seq_len, run.train.batch_size, run.seed)
        torch.manual_seed(run.seed)  # dropout
        trained = _activations_and_updates(make_module(run, corpus.vocab_size), windows, run.train.steps)
        decayed = _decay(make_module(run, corpus.vocab_size))
        for coordinate in chain(trained, decayed):
            yield Measured(run.model.d_model, run.seed, *coordinate)


def _activations_and_updates(module: TrainingModule, windows: TrainWindows, steps: int) -> Iterator[Coordinate]:
    probe_BT = torch.from_numpy(windows.batch(0))[:, :-1]
    start, _ = _activations(module.model, probe_BT)
    of_model = dict(matrices(module.model))
    weights = {name: matrix.effective_weight().detach().clone() for name, matrix in of_model.items()}

    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(steps):
        optimizer.zero_grad()
        loss, _ = module.training_loss(torch.from_numpy(windows.batch(step)))
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        schedule.step()
    end, inputs = _activations(module.model, probe_BT)

    for name, value in start.items():
        yield "start", name, "", rms(value)
        yield "change", name, "", rms(end[name] - value)
    for name, matrix in of_model.items():
        change = matrix.effective_weight().detach() - weights[name]
        # Projections in a joint product are not called: their input is that of attention or MLP.
        x = inputs[name] if name in inputs else inputs[name.rpartition(".")[0]]
        yield "update", name, matrix.role.value, rms(change[x] if matrix.role is Role.EMBEDDING else x @ change.T)


def _decay(module: TrainingModule) -> Iterator[Coordinate]:
    optimizer = module.configure_optimizers()["optimizer"]
    before = {name: matrix.weight.detach().clone() for name, matrix in matrices(module.model)}
    for parameter in module.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, matrix in matrices(module.model):
        share = rms(before[name].double() - matrix.weight.detach().double()) / rms(before[name])
        if share:  # without weight decay there is nothing to compare
            yield "decay", name, matrix.role.value, share


def _activations(model: Llama, ids_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations by coordinate, and the input of every called module by its name."""
    activations: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def visit(name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        inputs[name] = args[0]
        if activation(name) is not None and name != "embed_tokens":
            activations["logits" if name == "lm_head" else name] = out

    probe(model, ids_BT, visit)
    return activations, inputs

"""The coordinate check (arXiv:2203.03466 app. D.1): sizes and changes of activations over a few training steps.

Measured per width (or depth) and seed, on the first batch of the data, of a run's model or (`model_coordinates`) of
anybody's:

| kind   | coordinate                  | value                                                                     |
|--------|-----------------------------|---------------------------------------------------------------------------|
| start  | activation                  | RMS at initialization                                                     |
| change | activation                  | RMS of its change over the steps                                          |
| update | matrix                      | RMS of dW_eff x, x being the last input: the effect of its own change     |
| decay  | matrix                      | share of W that a step with zero gradients removes                        |

Activations are the outputs of attention, MLP, each block and the final norm, and the logits. `update` reveals a single
matrix with a wrong lr, which activations average out. `decay` reveals a wrong weight decay, which would take
1 / (lr * decay) steps to show. Over depth, models have different layers: `over_layers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_mult.config import RunConfig
from lit_mult.data.batches import TrainWindows
from lit_mult.data.cache import prepare
from lit_mult.diagnostics.parts import TrainingModule, matrices, rms
from lit_mult.diagnostics.probe import activation, probe
from lit_mult.errors import ConfigError

Kind = Literal["start", "change", "update", "decay"]
Coordinate = tuple[Kind, str, str, float]
"""(kind, coordinate, role, value), as in `Measured`."""
LAST_BLOCK = "last block"
"""The residual stream at its end, in `over_layers`."""


class Matrix(Protocol):
    """A weight matrix (d_out, d_in)."""

    @property
    def role(self) -> str: ...

    @property
    def weight(self) -> Tensor: ...

    def effective_weight(self) -> Tensor: ...


class Subject(Protocol):
    """A model before its first step."""

    def matrices(self) -> dict[str, Matrix]: ...

    def activations(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """On the first batch: activations by coordinate; and the input of matrices by name, where it is known."""

    def train(self) -> None:
        """Make all steps."""

    def decay(self) -> None:
        """Make a step with zero gradients."""


@dataclass(frozen=True)
class Measured:
    """One coordinate of one model."""

    size: int
    """Width or depth of the model."""
    seed: int
    kind: Kind
    coordinate: str
    role: str
    """Of the matrix; empty for activations."""
    value: float


def measure(
    config: RunConfig,
    field: Literal["model.d_model", "model.n_layers"],
    sizes: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    make_module: Callable[[RunConfig, int], TrainingModule],
) -> Iterator[Measured]:
    """Train each width or depth with each seed for a few optimizer steps, and measure its coordinates.

    Size, seed and length replace those of `config`; `make_module(config, vocab_size)` makes the untrained module.

    Raises:
        UserError: a size is not possible, or the data is not usable.
    """
    if config.model.pretrained is not None:
        allowed = "has one width and depth; a coordinate check needs several"
        raise ConfigError("model.pretrained", config.model.pretrained, allowed)
    configs = [
        (size, config.with_overrides({field: size, "seed": seed, "train.steps": steps}))
        for size in sizes
        for seed in seeds
    ]
    corpus = prepare(config.data)
    for size, run in configs:
        windows = TrainWindows(corpus.train, run.data.seq_len, run.train.batch_size, run.seed)
        torch.manual_seed(run.seed)  # dropout
        make = partial(_make_run, run, corpus.vocab_size, windows, make_module)
        found = coordinates(make)
        for coordinate in over_layers(found) if field == "model.n_layers" else found:
            yield Measured(size, run.seed, *coordinate)


def over_layers(found: Iterable[Coordinate]) -> Iterator[Coordinate]:
    """The same coordinates at any depth: RMS over the layers, named `layers.*`; of blocks themselves the last one's.

    Outputs of attention and MLP are contributions to the residual stream, which is the output of a block.
    """
    merged: dict[tuple[Kind, str, str], list[float]] = {}
    for kind, name, role, value in found:
        own = re.sub(r"^layers\.\d+", "layers.*", name)
        if own == "layers.*":
            merged[kind, LAST_BLOCK, role] = [value]
        else:
            merged.setdefault((kind, own, role), []).append(value)
    for (kind, name, role), values in merged.items():
        yield kind, name, role, math.sqrt(sum(value**2 for value in values) / len(values))


def _make_run(
    config: RunConfig,
    vocab_size: int,
    windows: TrainWindows,
    make_module: Callable[[RunConfig, int], TrainingModule],
) -> Subject:
    return _Run(make_module(config, vocab_size), windows, config.train.steps)


def coordinates(make: Callable[[], Subject]) -> Iterator[Coordinate]:
    """All coordinates of one model, which `make` gives twice, the same both times: to train, and to decay."""
    subject = make()
    start, _ = subject.activations()
    matrices = subject.matrices()
    before = {name: matrix.effective_weight().detach().clone() for name, matrix in matrices.items()}
    subject.train()
    end, inputs = subject.activations()
    for name, value in start.items():
        yield "start", name, "", rms(value)
        yield "change", name, "", rms(end[name] - value)
    for name, matrix in matrices.items():
        if name in inputs:
            change, x = matrix.effective_weight().detach() - before[name], inputs[name]
            yield "update", name, matrix.role, rms(x @ change.T if x.is_floating_point() else change[x])

    subject = make()
    matrices = subject.matrices()
    before = {name: matrix.weight.detach().clone() for name, matrix in matrices.items()}
    subject.decay()
    for name, matrix in matrices.items():
        share = rms(before[name].double() - matrix.weight.detach().double()) / rms(before[name])
        if share:  # without weight decay there is nothing to compare
            yield "decay", name, matrix.role, share


def step_without_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    """A step that weight decay alone makes."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@dataclass(frozen=True)
class _Run:
    """The model of a config."""

    module: TrainingModule
    windows: TrainWindows
    steps: int

    def matrices(self) -> dict[str, Matrix]:
        return dict(matrices(self.module.model))

    def activations(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}

        def visit(name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            inputs[name] = args[0]
            if activation(name) is not None and name != "embed_tokens":
                found["logits" if name == "lm_head" else name] = out

        probe(self.module.model, torch.from_numpy(self.windows.batch(0))[:, :-1], visit)
        # Projections in a joint product are not called: their input is that of attention or MLP.
        return found, inputs | {name: inputs[name.rpartition(".")[0]] for name in self.matrices().keys() - inputs}

    def train(self) -> None:
        made = self.module.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        for step in range(self.steps):
            optimizer.zero_grad()
            loss, _ = self.module.training_loss(torch.from_numpy(self.windows.batch(step)))
            loss.backward()
            self.module.configure_gradient_clipping(optimizer)
            optimizer.step()
            schedule.step()

    def decay(self) -> None:
        step_without_gradients(self.module.model, self.module.configure_optimizers()["optimizer"])

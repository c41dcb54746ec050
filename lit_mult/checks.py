"""Checks of models in memory, of any library, as `lit-mult` has them for runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lit_mult.diagnostics.coordinates import Measured, coordinates
from lit_mult.diagnostics.model_coordinates import (
    LossOf,
    MatrixFacts,
    ModelSubject,
    facts_of,
    matrices_of,
    next_token_loss,
)
from lit_mult.errors import ConfigError, UserError
from lit_mult.inject.groups import build_param_groups
from lit_mult.inject.layers import specs_of
from lit_mult.inject.model import add_multipliers
from lit_mult.inject.table import aligned
from lit_mult.method.expectations import exponent_of
from lit_mult.method.placement import PLACEMENTS
from lit_mult.method.redundancy import Redundancy, redundancies_of, sizes_of, table
from lit_mult.optim.hybrid import HybridOptimizer
from lit_mult.registry.kinds import KINDS, check_redundancies
from lit_mult.registry.optimizers import trained_by
from lit_mult.registry.roles import Role

if TYPE_CHECKING:
    import pandas as pd


class CoordCheck(NamedTuple):
    """Result of `coord_check`."""

    exponents: pd.DataFrame
    """A row a coordinate: kind, coordinate, low, high (what theory expects), exponent, exponent_low, exponent_high,
    verdict (PASS or FAIL); see `analysis.exponents`."""
    values: pd.DataFrame
    """A row a width, seed and coordinate: width, seed, kind, coordinate, role, value, low, high."""

    @property
    def passed(self) -> bool:
        """Whether no verdict is FAIL."""
        return not (self.exponents["verdict"] == "FAIL").any()


def coord_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Sequence[Any],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    optimizer: str = "adamw",
    make_optimizer: Callable[[nn.Module], Optimizer] | None = None,
    loss_of: LossOf = next_token_loss,
    steps: int = 10,
    seeds: int = 3,
    max_norm: float | None = 1.0,
) -> CoordCheck:
    """Train a model a few steps at several widths, and fit how activations, updates and decay depend on the width.

    What is measured is defined in `diagnostics.coordinates`, the names of activations in
    `diagnostics.model_coordinates`. Under muP all exponents are 0, but those of the first logits (-1/2 to 0) and, with
    the width rules lr and lr_sqrt_wd, of decay. Updates of stacks of experts are not measured, and decay is not of a
    matrix that does not widen in proportion.

    Args:
        make_model: width -> model, perhaps after `add_multipliers` and `width_rules`; called after
            `torch.manual_seed`, twice for every width and seed.
        widths: three or more; exponents are fitted on the larger half, at least three.
        batches: for `loss_of`; by default token ids (B, T + 1). Steps take one after the other, and again from the
            first, on which activations are measured.
        lr: of `build_param_groups`.
        weight_decay: likewise.
        optimizer: likewise; and that of `width_rules`.
        make_optimizer: model -> optimizer, in place of `HybridOptimizer` with these groups.
        loss_of: (model, batch) -> loss ().
        steps: optimizer steps at each width, at a constant lr.
        seeds: number of seeds, from 0 on.
        max_norm: to which `clip_grad_norm_` clips; None: no clipping.

    Raises:
        UserError: there are fewer than three widths, no batch, step or seed; a matrix has no role; or `width_rules` was
            called for another optimizer.
    """
    if len(set(widths)) < 3:
        raise ConfigError("widths", list(widths), "must be three or more different ones")
    for field, value in (("batches", len(batches)), ("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ConfigError(field, value, "must be at least one")

    seen: dict[int, dict[str, MatrixFacts]] = {}

    def make(width: int, seed: int) -> ModelSubject:
        torch.manual_seed(seed)
        model = make_model(width)
        if not any(specs_of(module) for module in model.modules()):
            add_multipliers(model, "none", verbose=False)
        seen[width] = facts_of(model)
        if make_optimizer is not None:
            made = make_optimizer(model)
        else:
            made = HybridOptimizer(build_param_groups(model, lr, weight_decay, optimizer))
        return ModelSubject(model, made, batches, steps, loss_of, max_norm)

    import pandas as pd

    from lit_mult.analysis.exponents import exponents

    values = []
    for width in sorted(set(widths)):
        for seed in range(seeds):
            values += [Measured(width, seed, *one) for one in coordinates(partial(make, width, seed))]
    limits = [_limits(one, seen) for one in values]
    judged = [asdict(one) | {"low": its[0], "high": its[1]} for one, its in zip(values, limits, strict=True) if its]
    frame = pd.DataFrame(judged).rename(columns={"size": "width"})
    return CoordCheck(exponents(frame), frame)


def _limits(value: Measured, seen: Mapping[int, Mapping[str, MatrixFacts]]) -> tuple[float, float] | None:
    """Lowest and highest exponent by theory; None for the decay of a matrix that does not widen in proportion."""
    if value.kind != "decay":
        return exponent_of(value.kind, value.coordinate, value.role, None)
    facts = seen[value.size][value.coordinate]
    limits = exponent_of(value.kind, value.coordinate, facts.role, facts.widths)
    if limits == (0.0, 0.0) or facts.widths is None:
        return limits
    first = 1 if trained_by(Role(facts.role), facts.widths[0]) == "adamw" else 0  # its factor is one of d_in alone
    sides = {tuple(side / width for side in one[value.coordinate].shape[first:]) for width, one in seen.items()}
    return limits if len(sides) == 1 else None


LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM")
"""Models whose equations `method.symmetry` has. Others differ in what no name shows: norms of queries and keys, norm
weights plus 1, layers without rotation."""


def lint_placement(
    model: nn.Module, multiplier_weight_decay: float = 2e-3, *, verbose: bool = True
) -> list[Redundancy]:
    """Multipliers and norm weights of transformers' Llama or Mistral that can trade scale, by `method.symmetry`.

    Args:
        model: after `add_multipliers`.
        multiplier_weight_decay: that of `build_param_groups`, which may hold the scale.
        verbose: print a table of them, with advice.

    Raises:
        UserError: the model is another one, or has biases; or the kind of multipliers is no product.
    """
    if type(model).__name__ not in LLAMAS:
        raise UserError(f"model is a {type(model).__name__}; lint_placement knows {' and '.join(LLAMAS)} alone")
    if biased := [name for name, _ in model.named_parameters() if name.endswith(".bias")]:
        raise UserError(f"{biased[0]}: is a bias, which the equations of lint_placement have not")
    own = matrices_of(model)
    if not own:
        raise UserError("model has no multipliers; call add_multipliers first")
    for one in own.values():
        check_redundancies(one.spec.kind, "lint_placement")
    roles = {name: Role(one.role) for name, one in own.items()}
    axes = {name: one.spec.all_axes for name, one in own.items()}
    minimal = {name: KINDS[own[name].spec.kind].axes(PLACEMENTS["minimal"][role]) for name, role in roles.items()}
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = sizes_of(
        config.vocab_size, config.hidden_size, kv_heads, heads // kv_heads, head_dim, config.intermediate_size
    )
    found = redundancies_of(roles, axes, minimal, sizes, multiplier_weight_decay, "model.")
    if verbose:
        for line in aligned([tuple(cell.replace("optim.", "") for cell in row) for row in table(found)]):
            print(line)
    return found

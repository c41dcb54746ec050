"""Redundant multipliers of a run: which symmetry, which parameters, how many degrees of freedom, and what to do.

Derived by `method.symmetry`. Source: arXiv:2601.04890 sec. 4.1, app. C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from lit_mult.config import PlacementConfig, RunConfig
from lit_mult.method.placement import place
from lit_mult.method.symmetry import Factor, Floats, Index, Piece, Solution
from lit_mult.registry.contracts import Axes
from lit_mult.registry.kinds import check_redundancies
from lit_mult.registry.roles import Role


class Kind(StrEnum):
    """Types of redundancy."""

    CHANNELS = "channel by channel"
    """Two parameters can exchange one factor per channel."""
    FACTOR = "one factor"
    """Two parameters can exchange a single factor, the same for all channels."""
    NORMALIZATION = "normalization"
    """The scale of the residual stream is free, or that of a head's queries or keys: a norm divides it out (up to its
    epsilon)."""


@dataclass(frozen=True)
class Redundancy:
    """A family of directions in the logarithms of multipliers and norm weights that leave the function unchanged."""

    kind: Kind
    powers: dict[str, int]
    """Parameter -> power p: free factors f multiply its entries by f^p."""
    channels: Index
    """Index of the free factors; () for a single one."""
    freedom: int
    """Degrees of freedom: the number of free factors."""
    decays: dict[str, float]
    """Parameter -> its weight decay."""
    indices: dict[str, Index]
    """Parameter -> its own index."""
    sizes: Mapping[Factor, int]
    spare: frozenset[str]
    """Multipliers that are not in the paper's minimal table."""

    def direction(self, values: Floats) -> dict[str, Floats]:
        """Logarithms of the factors on each parameter's entries, from logarithms of the free factors.

        Args:
            values: in the shape of `channels`; () for a single factor.
        """
        moved = {}
        for name, power in self.powers.items():
            shape = tuple(self.sizes[factor] for factor in self.indices[name])
            along = tuple(self.sizes[factor] if factor in self.channels else 1 for factor in self.indices[name])
            moved[name] = power * np.broadcast_to(np.reshape(values, along), shape).reshape(-1)
        return moved

    @property
    def held(self) -> bool:
        """Whether weight decay stops the drift.

        If decaying parameters have powers of both signs, the sum of their squares has a minimum along the direction, to
        which decay pulls back. If all powers have one sign, decay itself moves the scale to the other side. In a
        normalization the balance is between decay, which shrinks, and noise, which grows the scale.
        """
        signs = {power > 0 for name, power in self.powers.items() if self.decays[name] > 0}
        return len(signs) == (1 if self.kind is Kind.NORMALIZATION else 2)

    @property
    def remedy(self) -> str:
        """Advice: whether decay holds it, and which multiplier to drop (fewest entries, then not in `minimal`)."""
        droppable = [name for name in self.powers if not name.endswith(_NORM_SUFFIX)]
        size = {name: math.prod(self.sizes[factor] for factor in self.indices[name]) for name in droppable}
        matrix, _, axis = min(droppable, key=lambda name: (size[name], name not in self.spare)).rpartition(".")
        drop = f"drop the {axis} of {matrix}"
        if self.held:
            return f"held by optim.multiplier_weight_decay = {max(self.decays.values()):g}; or {drop}"
        if not any(self.decays.values()):
            return f"drifts: set optim.multiplier_weight_decay, or {drop}"
        return f"not balanced by decay (norm weights have none): {drop}, if it drifts"


_NORM_SUFFIX = "norm.weight"


def redundancies(config: RunConfig, vocab_size: int) -> list[Redundancy]:
    """All redundancies of a run's multipliers and norm weights, in the order of the forward pass; normalization last.

    Their directions are a basis: the sum of `freedom` is the dimension of the null space.

    Raises:
        UserError: a placement override is not usable, or the kind of multipliers is no product.
    """
    check_redundancies(config.multipliers, "lint-placement")
    roles, model = config.model.matrix_roles(), config.model
    axes = place(config.multipliers, config.placement, roles)
    minimal = place(config.multipliers, PlacementConfig(table="minimal"), roles)
    sizes = sizes_of(
        vocab_size, model.d_model, model.n_kv_heads, model.num_key_value_groups, model.head_dim, model.d_ff
    )
    decay = config.optim.multiplier_weight_decay
    return redundancies_of(roles, axes, minimal, sizes, decay, qk_norm=model.qk_norm)


def sizes_of(
    vocab_size: int, d_model: int, n_kv_heads: int, num_key_value_groups: int, head_dim: int, d_ff: int
) -> dict[Factor, int]:
    """Sizes of the indices of a Llama; the arguments are as fields of `ModelConfig`."""
    return {
        Factor.TOKEN: vocab_size,
        Factor.CHANNEL: d_model,
        Factor.GROUP: n_kv_heads,
        Factor.MEMBER: num_key_value_groups,
        Factor.HALF: 2,
        Factor.PAIR: head_dim // 2,
        Factor.HIDDEN: d_ff,
    }


def redundancies_of(
    roles: Mapping[str, Role],
    axes: Mapping[str, Axes],
    minimal: Mapping[str, Axes],
    sizes: Mapping[Factor, int],
    decay: float,
    prefix: str = "",
    qk_norm: bool = False,
) -> list[Redundancy]:
    """The same of any model of Llama's form and names.

    Args:
        roles: name of a matrix -> its role, in order.
        axes: name of a matrix -> its multipliers.
        minimal: name of a matrix -> those in the table minimal.
        sizes: of the indices.
        decay: weight decay of the multipliers.
        prefix: of the names of embedding and final norm.
        qk_norm: whether queries and keys have norms. An exchange between the weights of these alone is the model's own,
            and left out.
    """
    spare = frozenset(f"{name}.{axis}" for name in axes for axis in axes[name] - minimal[name])
    found, writes = [], []
    for part, norm in _pieces(roles, prefix):
        attention = next((name.rpartition(".")[0] for name, role in part.items() if role is Role.Q_PROJ), None)
        qk_norms = [f"{attention}.{name}.weight" for name in ("q_norm", "k_norm") if qk_norm and attention]
        equations = Piece(part, norm, axes, qk_norms)
        solutions = [one for one in equations.solve(sizes) if not one.powers.keys() <= set(qk_norms)]
        found += [_redundancy(solution, equations, sizes, decay, spare) for solution in solutions]
        if equations.writes:
            writes.append((equations, equations.follow_residual()))
    if all(powers is not None for _, powers in writes):
        joint = {name: power for _, powers in writes for name, power in (powers or {}).items()}
        indices = {unknown.name: unknown.index for piece, _ in writes for unknown in piece.unknowns}
        found.append(
            Redundancy(
                kind=Kind.NORMALIZATION,
                powers=joint,
                channels=(),
                freedom=1,
                decays=_decays(joint, decay),
                indices={name: indices[name] for name in joint},
                sizes=sizes,
                spare=spare,
            )
        )
    return found


def _pieces(roles: Mapping[str, Role], prefix: str) -> Iterator[tuple[dict[str, Role], str | None]]:
    """Matrices between two uses of the residual stream, and the norm weight before them."""
    yield {f"{prefix}embed_tokens": Role.EMBEDDING}, None
    for block in dict.fromkeys(name.partition(".self_attn.")[0] for name in roles if ".self_attn." in name):
        for part, norm in (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            of_part = {name: role for name, role in roles.items() if name.startswith(f"{block}.{part}.")}
            yield of_part, f"{block}.{norm}.weight"
    yield {"lm_head": Role.LM_HEAD}, f"{prefix}norm.weight"


def _redundancy(
    solution: Solution, piece: Piece, sizes: Mapping[Factor, int], decay: float, spare: frozenset[str]
) -> Redundancy:
    kind = Kind.CHANNELS if solution.channels else Kind.FACTOR
    return Redundancy(
        kind=Kind.NORMALIZATION if len(solution.powers) == 1 else kind,  # nothing else takes up what changes
        powers=solution.powers,
        channels=solution.channels,
        freedom=solution.freedom,
        decays=_decays(solution.powers, decay),
        indices={unknown.name: unknown.index for unknown in piece.unknowns if unknown.name in solution.powers},
        sizes=sizes,
        spare=spare,
    )


def _decays(names: Iterable[str], decay: float) -> dict[str, float]:
    """Weight decay by parameter; norm weights have none."""
    return {name: 0.0 if name.endswith(_NORM_SUFFIX) else decay for name in names}


def drifts(found: Iterable[Redundancy]) -> bool:
    """Whether a redundancy, other than a single exchanged factor, is not held by decay."""
    return any(not redundancy.held for redundancy in found if redundancy.kind is not Kind.FACTOR)


def table(found: Iterable[Redundancy]) -> list[tuple[str, ...]]:
    """Header and rows for printing; redundancies that differ only in their layer share a row."""
    merged: dict[tuple[str, str, str], list[Redundancy]] = {}
    for redundancy in found:
        factors = (f"{name}^{power}" if power != 1 else name for name, power in redundancy.powers.items())
        parts = (redundancy.kind.value, "  ".join(factors), redundancy.remedy)
        kind, product, remedy = (re.sub(r"layers\.\d+\.", "layers.*.", part) for part in parts)
        merged.setdefault((kind, " ".join(dict.fromkeys(product.split())), remedy), []).append(redundancy)
    rows: list[tuple[str, ...]] = [
        ("redundancy", "freedom", "places", "unchanged when scaled by f^power", "what to do")
    ]
    for (kind, product, remedy), members in merged.items():
        rows.append((kind, str(members[0].freedom), str(len(members)), product, remedy))
    return rows

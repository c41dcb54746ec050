"""Which multipliers and norm weights can exchange scale without changing the function, computed as a null space.

Sources: arXiv:2601.04890 sec. 4.1 (multiplicative and normalization symmetries), app. C (placements).

**Setting.** Every entry of a learnable multiplier or norm weight changes by a factor exp(direction). With generic
matrices, the function is unchanged if and only if every *wire* (the activations between two operations) is scaled by
factors that the next operation passes on. In logarithms both are linear, with one equation per operation:

| operation                         | equation on the logarithms                                          |
|-----------------------------------|---------------------------------------------------------------------|
| y = W x                           | scalar + row_i + column_j + in_j = out_i for all i, j                |
| RMSNorm                           | in: one factor for all channels (it drops out); out_j = weight_j     |
| residual sum                      | the same factor, `RESIDUAL`, on the embedding and on every block     |
| rotary query . key                | q = a(group, pair), k = -a(group, pair): the rotation mixes the two  |
|                                   | halves of a pair, and the heads of a group share their key           |
| the same after norms of both      | in: one factor a head (it drops out); weights: q = a(pair),          |
|                                   | k = -a(pair), as all heads share them                                |
| attention output                  | the value's factor, for every query head of its group                |
| silu(gate) * up                   | gate: 0; the product has up's factor                                 |
| logits                            | 0                                                                    |

**Classes of indices.** Channels of one kind are interchangeable, so the equations decompose into independent parts, one
for each set S of index factors (token, residual channel, group, head in group, half, rotary pair, hidden channel): the
part in which a direction varies over S with zero mean along each factor. It has one unknown for every multiplier or
wire indexed by all of S, for any sizes, and each solution counts prod(size - 1) times. S = {} are factors common to all
channels. Embedding, blocks and head share only the residual wire. With this wire at 0 each piece is solved separately;
if every writer can follow a change of it, there is one more redundancy, the normalization.

Not counted: exchanges of a multiplier with its own matrix W (decay and noise of the matrix fix these, which is the
point of the method), signs and permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np
import numpy.typing as npt

from lit_mult.registry.contracts import Axes, Axis
from lit_mult.registry.roles import Role

Floats = npt.NDArray[np.float64]


class Factor(StrEnum):
    """What an index runs over; the index of a row or column is a product of these, the last one fastest."""

    TOKEN = "token"
    CHANNEL = "residual channel"
    GROUP = "key/value group"
    MEMBER = "query head of a group"
    HALF = "half of a head"
    PAIR = "rotary pair"
    HIDDEN = "hidden channel"


Index = tuple[Factor, ...]
_QUERY: Index = (Factor.GROUP, Factor.MEMBER, Factor.HALF, Factor.PAIR)
_KEY: Index = (Factor.GROUP, Factor.HALF, Factor.PAIR)
_TOKEN: Index = (Factor.TOKEN,)
_CHANNEL: Index = (Factor.CHANNEL,)
_HIDDEN: Index = (Factor.HIDDEN,)

_INDICES: dict[Role, tuple[Index, Index]] = {
    Role.EMBEDDING: (_TOKEN, _CHANNEL),
    Role.Q_PROJ: (_QUERY, _CHANNEL),
    Role.K_PROJ: (_KEY, _CHANNEL),
    Role.V_PROJ: (_KEY, _CHANNEL),
    Role.O_PROJ: (_CHANNEL, _QUERY),
    Role.GATE_PROJ: (_HIDDEN, _CHANNEL),
    Role.UP_PROJ: (_HIDDEN, _CHANNEL),
    Role.DOWN_PROJ: (_CHANNEL, _HIDDEN),
    Role.LM_HEAD: (_TOKEN, _CHANNEL),
}
"""Role -> index of the rows, index of the columns."""


@dataclass(frozen=True)
class _Wire:
    """Factors by which an activation can be scaled; `sign` relates two matrices that share them."""

    name: str
    index: Index
    sign: int = 1


_ONE = _Wire("", ())
"""A wire that cannot be scaled."""
_RESIDUAL = _Wire("residual", ())
_NORM = _Wire("norm", _CHANNEL)
_SCORE: Index = (Factor.GROUP, Factor.PAIR)
_HEAD: Index = (Factor.HALF, Factor.PAIR)

# Role -> the wire that the matrix reads, and the one that it writes; the embedding reads tokens.
_WIRES: dict[Role, tuple[_Wire, _Wire]] = {
    Role.EMBEDDING: (_ONE, _RESIDUAL),
    Role.Q_PROJ: (_NORM, _Wire("score", _SCORE)),
    Role.K_PROJ: (_NORM, _Wire("score", _SCORE, -1)),
    Role.V_PROJ: (_NORM, _Wire("value", _KEY)),
    Role.O_PROJ: (_Wire("value", _KEY), _RESIDUAL),
    Role.GATE_PROJ: (_NORM, _ONE),
    Role.UP_PROJ: (_NORM, _Wire("hidden", _HIDDEN)),
    Role.DOWN_PROJ: (_Wire("hidden", _HIDDEN), _RESIDUAL),
    Role.LM_HEAD: (_NORM, _ONE),
}

# The same for queries and keys that have norms, and the norm weights' own wire.
_NORMED: dict[Role, tuple[_Wire, _Wire]] = {
    Role.Q_PROJ: (_NORM, _Wire("query", (Factor.GROUP, Factor.MEMBER))),
    Role.K_PROJ: (_NORM, _Wire("key", (Factor.GROUP,))),
}
_NORMED_SCORE = _Wire("score", (Factor.PAIR,))


@dataclass(frozen=True)
class Unknown:
    """A multiplier or norm weight: parameter name and index."""

    name: str
    index: Index


@dataclass(frozen=True)
class Solution:
    """A family of directions that leave the function unchanged: see `redundancy.Redundancy`."""

    powers: dict[str, int]
    channels: Index
    freedom: int


class Piece:
    """The equations between two uses of the residual stream, for any set S of index factors."""

    def __init__(
        self,
        roles: Mapping[str, Role],
        norm: str | None,
        axes: Mapping[str, Axes],
        qk_norms: Sequence[str] = (),
    ) -> None:
        """Take the matrices (name -> role), the norm weight before them, the axes of every matrix, and the norm weights
        of queries and keys."""
        self.roles, self.norm, self.axes, self.qk_norms = roles, norm, axes, qk_norms
        self.wires = _WIRES | _NORMED if qk_norms else _WIRES
        self.unknowns: list[Unknown] = [Unknown(norm, _CHANNEL)] if norm else []
        self.unknowns += [Unknown(name, _HEAD) for name in qk_norms]
        for name, role in roles.items():
            rows, columns = _INDICES[role]
            index_by_axis = {Axis.SCALAR: (), Axis.ROW: rows, Axis.COLUMN: columns}
            for axis in Axis:
                if axis in axes[name]:
                    self.unknowns.append(Unknown(f"{name}.{axis}", index_by_axis[axis]))

    def solve(self, sizes: Mapping[Factor, int]) -> list[Solution]:
        """A basis of the solutions with the residual at 0, each with as few parameters as possible."""
        freedom: dict[tuple[tuple[str, int], ...], int] = {}
        channels: dict[tuple[tuple[str, int], ...], set[Factor]] = {}
        for part in self._parts():
            times = math.prod(sizes[factor] - 1 for factor in part)
            names, matrix = self._matrix(part)
            # First the common factors of channels that are free one by one: they belong to the same redundancy.
            known = [dict(powers) for powers in freedom] if not part else []
            for powers in _circuits(names, matrix, known):
                key = tuple(powers.items())
                if times:
                    freedom[key] = freedom.setdefault(key, 0) + times
                    channels.setdefault(key, set()).update(part)
        return [
            Solution(dict(key), tuple(factor for factor in Factor if factor in channels[key]), count)
            for key, count in freedom.items()
        ]

    @property
    def writes(self) -> bool:
        """Whether it adds to the residual stream."""
        return any(self.wires[role][1] == _RESIDUAL for role in self.roles.values())

    def follow_residual(self) -> dict[str, int] | None:
        """Powers with which the parameters scale the piece's output by one factor; None if impossible."""
        names, matrix = self._matrix((), residual=True)
        order = sorted(range(len(names)), key=lambda number: names[number] not in self._nearest())
        names, matrix = [names[number] for number in order], matrix[:, order]
        for powers in _circuits(names, matrix, [], through=_RESIDUAL.name):
            sign = powers.pop(_RESIDUAL.name)
            if abs(sign) == 1:
                return {name: sign * power for name, power in powers.items()}
        return None

    def _nearest(self) -> set[str]:
        """The multipliers that scale the output to the residual directly."""
        writers = [name for name, role in self.roles.items() if self.wires[role][1] == _RESIDUAL]
        out = {name: Axis.COLUMN if self.roles[name] is Role.EMBEDDING else Axis.ROW for name in writers}
        return {f"{name}.{axis}" for name in writers for axis in (Axis.SCALAR, out[name])}

    def _parts(self) -> list[Index]:
        """All sets S of the parameters' indices, largest first."""
        found = {
            subset
            for unknown in self.unknowns
            for size in range(len(unknown.index) + 1)
            for subset in combinations(unknown.index, size)
        }
        return sorted(found, key=lambda part: (-len(part), part))

    def _matrix(self, part: Index, residual: bool = False) -> tuple[list[str], Floats]:
        """Equations of the part S with wires eliminated: names of the unknowns, and one row per equation."""
        used = {wire.name: wire for role in self.roles.values() for wire in self.wires[role] if wire != _ONE}
        if self.qk_norms:
            used[_NORMED_SCORE.name] = _NORMED_SCORE
        wires = sorted(used)
        free = [unknown.name for unknown in self.unknowns if set(part) <= set(unknown.index)]
        columns = {name: number for number, name in enumerate([*free, *wires])}
        rows: list[Floats] = []

        def equation(terms: Iterable[tuple[str, int]]) -> None:
            row = np.zeros(len(columns))
            for name, coefficient in terms:
                if name in columns:
                    row[columns[name]] += coefficient
            rows.append(row)

        def has(wire: _Wire) -> bool:
            return wire != _ONE and set(part) <= set(wire.index)

        for name, role in self.roles.items():
            read, written = self.wires[role]
            row_index, column_index = _INDICES[role]
            in_rows, in_columns = set(part) <= set(row_index), set(part) <= set(column_index)
            terms = [(f"{name}.{Axis.SCALAR}", 1)]
            # The embedding is looked up: a token's row is read, and its columns are written.
            writes_rows = role is not Role.EMBEDDING
            out_terms = [(f"{name}.{Axis.ROW}", 1)] if in_rows else []
            in_terms = [(f"{name}.{Axis.COLUMN}", 1)] if in_columns else []
            if has(written):
                (out_terms if writes_rows else in_terms).append((written.name, -written.sign))
            if has(read):
                in_terms.append((read.name, read.sign))
            if not part:
                equation([*terms, *out_terms, *in_terms])
            else:  # a variation along rows cannot be undone along columns
                equation(out_terms)
                equation(in_terms)
        if self.norm:
            equation([(self.norm, 1), (_NORM.name, -1)])
        for name, sign in zip(self.qk_norms, (1, -1), strict=False):
            equation([(name, 1), (_NORMED_SCORE.name, -sign)])
        kept = [*free, _RESIDUAL.name] if residual and _RESIDUAL.name in columns else free
        matrix = np.array(rows)
        for name in wires:  # wires that cannot vary over S, and the residual if it is fixed
            if not set(part) <= set(used[name].index) or (name == _RESIDUAL.name and not residual):
                matrix[:, columns[name]] = 0
        eliminated = matrix[:, [columns[name] for name in wires if name not in kept]]
        # Combinations of equations without wires.
        return kept, _null_space(eliminated.T).T @ matrix[:, [columns[name] for name in kept]]


def _circuits(
    names: list[str], matrix: Floats, known: list[dict[str, int]], through: str | None = None
) -> list[dict[str, int]]:
    """A basis of the null space, greedily with the smallest supports, as integers.

    Args:
        names: unknowns, one per column of the matrix.
        matrix: (equations, unknowns)
        known: vectors to include first.
        through: return only the first vector in which this unknown is not 0.
    """
    nullity = len(names) - _rank(matrix)
    basis: list[Floats] = []
    for powers in known:
        vector = np.array([float(powers[name]) if name in powers else 0.0 for name in names])
        if np.all(np.abs(matrix @ vector) < _ZERO) and _rank(np.array([*basis, vector])) > len(basis):
            basis.append(vector)
    for size in range(1, len(names) + 1):
        for support in combinations(range(len(names)), size):
            if len(basis) == nullity or (through is not None and basis):
                break
            if through is not None and names[support[-1]] != through:  # the residual is the last unknown
                continue
            null = _null_space(matrix[:, support])
            if null.shape[1] != 1 or np.any(np.abs(null) < _ZERO):
                continue
            vector = np.zeros(len(names))
            smallest = np.abs(null[:, 0]).min() * np.sign(null[0, 0])  # whole numbers, the first one positive
            vector[list(support)] = null[:, 0] / smallest
            if _rank(np.array([*basis, vector])) > len(basis):
                basis.append(vector)
    return [{name: round(power) for name, power in zip(names, vector, strict=True) if round(power)} for vector in basis]


_ZERO = 1e-9  # of matrices whose entries are small whole numbers


def _null_space(matrix: Floats) -> Floats:
    """Orthonormal columns that the matrix maps to 0."""
    if not matrix.size:
        return np.eye(matrix.shape[1])
    _, sizes, right = np.linalg.svd(matrix)
    return np.asarray(right[int((sizes > _ZERO).sum()) :].T)


def _rank(matrix: Floats) -> int:
    return int(np.linalg.matrix_rank(matrix, tol=_ZERO)) if matrix.size else 0

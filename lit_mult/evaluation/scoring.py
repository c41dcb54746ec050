"""Log-likelihoods of continuations, computed from as few forward tokens as possible.

Requests with the same input tokens share a row. Rows with the same long context, such as the choices of an item, share
its keys and values. The head is applied only at scored positions.

Shapes in names: B batch, T time, D width, V vocabulary, F families, N scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lit_mult.nn.llama import Llama

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of a continuation, neither empty."""
Score = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would give it."""

_LOGITS_AT_ONCE = 2**24  # elements of a block of logits: keeps a device busy, 64 MiB in float32
_SHARED_AT_MOST = 0.75  # share of the tokens below which a second forward pass pays off


Item = TypeVar("Item")


@dataclass(frozen=True)
class _Row:
    """One sequence of input tokens, and its requests."""

    inputs: tuple[int, ...]
    requests: list[tuple[int, list[int]]]
    """(index of the request, continuation, which the last inputs predict)."""

    @property
    def scored(self) -> int:
        """Number of inputs, at the end, whose prediction is scored."""
        return max(len(continuation) for _, continuation in self.requests)

    @property
    def context(self) -> tuple[int, ...]:
        """Inputs up to the first whose prediction is scored."""
        return self.inputs[: len(self.inputs) - self.scored + 1]

    @property
    def rest(self) -> tuple[int, ...]:
        """Inputs after the context."""
        return self.inputs[len(self.inputs) - self.scored + 1 :]


@torch.inference_mode()
def log_likelihoods(model: Llama, pairs: Sequence[Pair], batch_size: int, done: Callable[[int], object]) -> list[Score]:
    """Scores of all pairs, in their order; `done` gets the number of newly computed scores.

    Batches of at most batch_size sequences, the longest first, so that running out of memory fails at once.
    """
    scores: dict[int, Score] = {}
    alone, families = _arrange(pairs)
    work = [partial(_read_alone, model, rows) for rows in batched(alone, batch_size)]
    work += [partial(_read_families, model, some, batch_size) for some in batched(families, batch_size)]
    for read in work:
        for answers in read():
            scores.update(answers)
            done(len(answers))
    return [scores[index] for index in range(len(pairs))]


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Slices of `size` items; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids (B, T) of rows of different lengths, padded on the right, which causal attention ignores."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _arrange(pairs: Sequence[Pair]) -> tuple[list[_Row], list[list[_Row]]]:
    """Single rows, and families of rows with one context; the longest first."""
    by_tokens: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        by_tokens.setdefault((*context, *continuation[:-1]), []).append((index, continuation))
    by_context: dict[tuple[int, ...], list[_Row]] = {}
    for tokens, requests in by_tokens.items():
        row = _Row(tokens, requests)
        by_context.setdefault(row.context, []).append(row)
    alone: list[_Row] = []
    families: list[list[_Row]] = []
    for shared, rows in by_context.items():
        tokens_shared = len(shared) + sum(len(row.rest) for row in rows)
        if tokens_shared <= _SHARED_AT_MOST * sum(len(row.inputs) for row in rows):
            families.append(rows)
        else:
            alone.extend(rows)
    alone.sort(key=lambda row: -len(row.inputs))
    families.sort(key=lambda rows: -len(rows[0].context))
    return alone, families


def _read_alone(model: Llama, rows: Sequence[_Row]) -> Iterator[dict[int, Score]]:
    """Scores of rows that share no context."""
    ids_BT = padded([row.inputs for row in rows], model.device)
    hidden_BTD = model.hidden(ids_BT)
    T = ids_BT.shape[1]
    positions = [list(range(b * T + len(row.context) - 1, b * T + len(row.inputs))) for b, row in enumerate(rows)]
    yield from _predict(model, hidden_BTD.flatten(0, 1), rows, positions)


def _read_families(model: Llama, families: Sequence[list[_Row]], batch_size: int) -> Iterator[dict[int, Score]]:
    """Scores of families: one forward pass for their contexts, then one for all rows."""
    contexts = [rows[0].context for rows in families]
    lengths = [len(context) for context in contexts]
    F = len(families)
    branches = [(family, row) for family, rows in enumerate(families) for row in rows]
    branches.sort(key=lambda branch: -len(branch[1].rest))
    cache = model.empty_cache(F, max(lengths) + len(branches[0][1].rest))
    hidden_FTD = model.hidden(padded(contexts, model.device), cache)
    last_FD = hidden_FTD[range(F), [length - 1 for length in lengths]]
    cache.truncate(lengths)
    for some in batched(branches, batch_size):
        rows = [row for _, row in some]
        T = len(rows[0].rest)
        hidden_ND = last_FD
        if T:
            rests_BTD = model.hidden(
                padded([row.rest for row in rows], model.device), cache.select([family for family, _ in some])
            )
            hidden_ND = torch.cat([last_FD, rests_BTD.flatten(0, 1)])
        positions = [[family, *range(F + b * T, F + b * T + len(row.rest))] for b, (family, row) in enumerate(some)]
        yield from _predict(model, hidden_ND, rows, positions)


def _predict(
    model: Llama, hidden_ND: Tensor, rows: Sequence[_Row], positions: Sequence[list[int]]
) -> Iterator[dict[int, Score]]:
    """Scores of rows, whose scored hidden vectors are at `positions`."""
    vocabulary = model.lm_head.weight.shape[0]
    most = max(1, _LOGITS_AT_ONCE // vocabulary // max(len(scored) for scored in positions))
    for some in batched(list(zip(rows, positions, strict=True)), most):
        at: list[int] = []
        chosen: list[int] = []
        targets: list[int] = []
        requests: list[tuple[int, int]] = []
        for row, scored in some:
            at += scored
            for index, continuation in row.requests:
                chosen += range(len(at) - len(continuation), len(at))
                targets += continuation
                requests.append((index, len(continuation)))
        at_N, chosen_P, targets_P = torch.tensor([*at, *chosen, *targets], device=hidden_ND.device).split(
            [len(at), len(chosen), len(targets)]
        )
        logits_NV = model.lm_head(hidden_ND.index_select(0, at_N)).float()
        greedy = (logits_NV.argmax(-1)[chosen_P] == targets_P).tolist()
        values = logits_NV.log_softmax(-1)[chosen_P, targets_P].tolist()
        answers: dict[int, Score] = {}
        start = 0
        for index, length in requests:
            end = start + length
            answers[index] = (sum(values[start:end]), all(greedy[start:end]))
            start = end
        yield answers

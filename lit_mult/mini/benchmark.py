"""The seven tasks of the benchmark, their items, and training text of the same families that has none of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_mult.mini import facts
from lit_mult.mini.continuation import continuation
from lit_mult.mini.items import Draw, Family, Item, items
from lit_mult.mini.reasoning import SYMBOLIC, algebra, arithmetic, induction

N_ITEMS = 500
"""Items of a task (and, of subtasks, two fifths of it each)."""
_N_SUBTASK = 200
_N_SHOTS = 32  # examples that a prompt with shots draws from
_LARGEST = 0.04  # of the items that have the same answer, where the model writes it
_FACTS = 0.1  # share of the training documents
_LABELS = (("True", "False"), ("1", "2", "3", "4"))  # choices in an order of their own


@dataclass(frozen=True)
class Task:
    """A task as the benchmark's page describes it."""

    name: str
    side: Literal["knowledge", "reasoning"]
    metric: str
    """lm-eval's name of the score: acc, acc_norm (by length of the choice) or exact_match."""
    chance: float
    """Score of guessing (of always giving the commonest answer, where the model writes it)."""
    like: str
    """Task of arXiv:2601.04890 table 2 in whose spirit it is."""
    measures: str


TASKS = (
    Task("mini_continuation", "knowledge", "acc_norm", 1 / 4, "HellaSwag", "which line follows in held-out code"),
    Task("mini_facts_common", "knowledge", "acc", 1 / 4, "ARC-C", "facts that training states often"),
    Task("mini_facts_rare", "knowledge", "acc", 1 / 4, "MMLU", "facts that training states an eighth as often"),
    Task("mini_induction", "reasoning", "acc", 1 / 4, "MMLU-PRO", "a rule to infer from three examples in the prompt"),
    Task("mini_symbolic", "reasoning", "acc", 1 / 3, "BBH", "logic, tracking, brackets, ordering, counting"),
    Task("mini_arithmetic", "reasoning", "exact_match", _LARGEST, "GSM8K", "sums of two or three steps, told in words"),
    Task("mini_algebra", "reasoning", "exact_match", _LARGEST, "MATH lvl5", "equations, values, like terms"),
)


def benchmark(held_out: Sequence[str], seen: Iterable[str]) -> Iterator[tuple[str, list[Item], list[Item]]]:
    """(lm-eval task, items, examples for shots) of every task and subtask.

    Args:
        held_out: texts that training does not see, for `mini_continuation`.
        seen: texts that it may see.
    """
    lines = continuation(held_out, seen, N_ITEMS + _N_SHOTS)
    yield "mini_continuation", _evenly_placed(lines[:N_ITEMS]), lines[N_ITEMS:]
    for kind in ("common", "rare"):
        yield f"mini_facts_{kind}", _evenly_placed(facts.questions(kind)), facts.questions("quizzed")[:_N_SHOTS]
    yield "mini_induction", *_drawn("induction", induction, N_ITEMS)
    for subtask, family in SYMBOLIC.items():
        yield f"mini_symbolic_{subtask}", *_drawn(subtask, family, _N_SUBTASK)
    for name, writes in (("arithmetic", arithmetic), ("algebra", algebra)):
        yield f"mini_{name}", *_drawn(name, writes, N_ITEMS)


def _drawn(name: str, family: Family, n: int) -> tuple[list[Item], list[Item]]:
    """n different held-out items with balanced answers, and examples from the side of training.

    Balanced: labels that are the same for every item are right equally often, no answer that is written is right in
    more than `_LARGEST` of the items, and other choices have the right one at every place equally often.
    """
    draw = Draw(f"benchmark {name}")
    found, keys, counts = list[Item](), set[str](), Counter[str]()
    for item in items(family, draw, held_out=True):
        if len(found) == n:
            break
        key = item.key or item.prompt
        labels = item.choices in _LABELS
        at_most = n / len(item.choices) if labels else n if item.choices else n * _LARGEST
        if key not in keys and counts[item.answer] < at_most:
            keys.add(key)
            counts[item.answer] += 1
            found.append(item)
    examples = items(family, draw, held_out=False)
    return _evenly_placed(found), [next(examples) for _ in range(_N_SHOTS)]


def _evenly_placed(found: list[Item]) -> list[Item]:
    return [
        item.with_answer_at(number % len(item.choices)) if item.choices and item.choices not in _LABELS else item
        for number, item in enumerate(found)
    ]


def training_documents() -> Iterator[str]:
    """Documents without end, always the same: one in ten states facts, the others are examples of reasoning."""
    draw = Draw("training")
    families = [items(family, draw, held_out=False) for family in (*SYMBOLIC.values(), arithmetic, algebra, induction)]
    weights = [1] * len(SYMBOLIC) + [2, 2, 3]
    spread = [family for family, weight in zip(families, weights, strict=True) for _ in range(weight)]
    while True:
        if draw.below(100) < 100 * _FACTS:
            yield facts.document(draw)
        else:
            yield next(draw.one(spread)).document

"""The embedded benchmark: answers that another solver finds too, balance, and nothing that training has seen."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lit_mult.mini import VERSION, benchmark, facts
from lit_mult.mini.benchmark import N_ITEMS, TASKS
from lit_mult.mini.continuation import continuation
from lit_mult.mini.files import write_benchmark
from lit_mult.mini.items import Draw, Family, Item, items
from lit_mult.mini.reasoning import SYMBOLIC, algebra, arithmetic, induction

FAMILIES: dict[str, Family] = {**SYMBOLIC, "arithmetic": arithmetic, "algebra": algebra, "induction": induction}
# Two texts of lines with little in common, for the items that continue a text.
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
HELD_OUT = [
    "".join(
        f"    {a} of the {text} {b} is {(i * 7) % 50}\n" for i, (a, b) in enumerate(itertools.product(WORDS, WORDS))
    )
    for text in ("first", "second", "third")
]


@cache
def training_documents(n: int = 150_000) -> tuple[str, ...]:
    return tuple(itertools.islice(benchmark.training_documents(), n))


@cache
def tasks() -> dict[str, list[Item]]:
    return {name: found for name, found, _ in benchmark.benchmark(HELD_OUT, ["    seen before\n"])}


def boolean_answer(item: Item) -> str:
    return str(eval(item.prompt.removeprefix("Evaluate:").removesuffix("=")))


def tracking_answer(item: Item) -> str:
    held = dict(re.findall(r"(\w+) has the (\w+) ball[,.]", item.prompt))
    for one, other in re.findall(r"(\w+) and (\w+) swap", item.prompt):
        held[one], held[other] = held[other], held[one]
    asked = re.search(r"At the end (\w+) has", item.prompt)
    assert asked
    return str(held[asked[1]])


def brackets_answer(item: Item) -> str:
    text = item.prompt.removeprefix("Close the brackets: ").removesuffix(" :").replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return " ".join(text[::-1].translate(str.maketrans("([{<", ")]}>")))


def ordering_answer(item: Item) -> str:
    older = {(a, b) for a, b in re.findall(r"(\w+) is older than (\w+)", item.prompt)}
    older |= {(b, a) for a, b in re.findall(r"(\w+) is younger than (\w+)", item.prompt)}
    people = {name for pair in older for name in pair}
    end = 1 if "The oldest" in item.prompt else 0
    (answer,) = people - {pair[end] for pair in older}
    return answer


def counting_answer(item: Item) -> str:
    listed, asked = re.findall(r"In the list (.*) the number of (\w+) is", item.prompt)[0]
    return str(listed.split(", ").count(asked))


def arithmetic_answer(item: Item) -> str:
    first, *rest = item.prompt.split(". ")
    total = int(first.split()[2])
    for step in rest[:-1]:
        if "doubles" in step:
            total *= 2
        else:
            n = int(re.findall(r"\d+", step)[0])
            total += n if re.search("finds|buys|gets", step) else -n
    return str(total)


def algebra_answer(item: Item) -> str:
    if solve := re.match(r"Solve (\d+) \w ([+-]) (\d+) = (-?\d+)\.", item.prompt):
        a, sign, b, c = int(solve[1]), solve[2], int(solve[3]), int(solve[4])
        return str((c - b if sign == "+" else c + b) // a)
    if value := re.match(r"Let (\w) = (\d+)\. Find (.*)\.", item.prompt):
        return str(eval(value[3].replace(f" {value[1]} ", f" * {value[2]} ")))
    terms = item.prompt.removeprefix("Simplify ").removesuffix(" and give the coefficient.")
    return str(eval(re.sub(r" [a-z]\b", "", terms)))


def induction_answer(item: Item) -> str:
    """The one choice that, taken for the answer, makes a rule by positions (or the alphabet) fit all four."""
    *shown, query = item.prompt.removesuffix(" ->").split(" ; ")
    pairs = [(left.split(), right.split()) for left, right in (example.split(" -> ") for example in shown)]

    def fits(rule: Callable[[list[str]], list[str]]) -> bool:
        return all(rule(left) == right for left, right in pairs)

    letters = "abcdefghijklmnopqrstuvwxyza"
    found = set()
    for places in itertools.product(range(3), repeat=3):
        if fits(lambda s, places=places: [s[i] for i in places]):  # type: ignore[misc]
            found.add(" ".join(query.split()[i] for i in places))
    if fits(sorted):
        found.add(" ".join(sorted(query.split())))
    if fits(lambda s: [letters[letters.index(c) + 1] for c in s]):
        found.add(" ".join(letters[letters.index(c) + 1] for c in query.split()))
    (answer,) = found & set(item.choices)
    return answer


SOLVERS: dict[str, Callable[[Item], str]] = {
    "boolean": boolean_answer,
    "tracking": tracking_answer,
    "brackets": brackets_answer,
    "ordering": ordering_answer,
    "counting": counting_answer,
    "arithmetic": arithmetic_answer,
    "algebra": algebra_answer,
    "induction": induction_answer,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_solver_finds_the_same_answers(name: str) -> None:
    draw = Draw(f"test {name}")
    for item in itertools.islice(map(FAMILIES[name], itertools.repeat(draw)), 300):
        assert SOLVERS[name](item) == item.answer, item
        assert item.choices.count(item.answer) == bool(item.choices)
        assert len(set(item.choices)) == len(item.choices)


@pytest.mark.parametrize("name", ["arithmetic", "algebra"])
def test_every_step_of_a_solution_is_true_and_the_last_is_the_answer(name: str) -> None:
    draw = Draw(f"test steps {name}")
    for item in itertools.islice(map(FAMILIES[name], itertools.repeat(draw)), 300):
        *steps, last = item.solution.split(". ")
        assert last == f"The answer is {item.answer}."
        for step in steps:
            left, right = step.split(" = ")
            if not re.search("[a-z]", step):
                assert eval(left) == int(right), item


def test_tasks_have_five_hundred_different_items_or_more_with_balanced_answers() -> None:
    sizes = Counter[str]()
    for name, found in tasks().items():
        owner = next(task for task in TASKS if name.startswith(task.name))
        sizes[owner.name] += len(found)
        assert len({(item.prompt, item.choices) for item in found}) == len(found)
        if not found[0].choices:
            assert max(Counter(item.answer for item in found).values()) / len(found) <= owner.chance
            continue
        places = Counter(item.choices.index(item.answer) for item in found)
        assert max(places.values()) - min(places.values()) <= 1, name
        assert len(places) == len(found[0].choices)
    assert set(sizes) == {task.name for task in TASKS}
    assert min(sizes.values()) >= N_ITEMS >= 500


def test_chance_is_what_guessing_gives() -> None:
    for task in TASKS:
        found = [item for name, items in tasks().items() if name.startswith(task.name) for item in items]
        if found[0].choices:
            guessing = sum(1 / len(item.choices) for item in found) / len(found)
            assert task.chance == pytest.approx(guessing, abs=0.005), task.name


def content(line: str) -> str:
    """What an example asks, without its wording: written anew, not as the families know it."""
    if "How many" in line:  # names and things do not count, the sums do
        return line.partition("? ")[2].partition(" The answer")[0] or arithmetic_sums(line)
    if line.startswith(("Solve", "Let", "Simplify")):  # nor does the letter of a variable
        return re.sub(r"\b[xyznt]\b", "v", re.match(r"[^.]*\.( Find [^.]*\.)?", line)[0])  # type: ignore[index]
    if line.startswith("Ages: "):  # nor the order of sentences
        *sentences, question = line.removeprefix("Ages: ").split(". ")
        return f"{sorted(sentences)} {question.split(' is')[0]}"
    if line.startswith("In the list "):  # nor that of a list
        listed, _, asked = line.removeprefix("In the list ").partition(" the number of ")
        return f"{sorted(listed.split(', '))} {asked.split()[0]}"
    if " ; " in line:  # of a rule with examples, the last input and what is made of it
        return line.rpartition(" ; ")[2]
    return line


def arithmetic_sums(prompt: str) -> str:
    total, sums = int(prompt.split()[2]), []
    for step in prompt.split(". ")[1:-1]:
        n = total if "doubles" in step else int(re.findall(r"\d+", step)[0])
        sign = "+" if re.search("doubles|finds|buys|gets", step) else "-"
        after = total + n if sign == "+" else total - n
        sums.append(f"{total} {sign} {n} = {after}.")
        total = after
    return " ".join(sums)


def test_nothing_that_is_asked_is_in_the_training_text_whatever_its_wording() -> None:
    lines = [line for document in training_documents() for line in document.splitlines()]
    seen = {content(line) for line in lines}
    text = "".join(training_documents()[:40_000])
    for name, found in tasks().items():
        if name == "mini_continuation":  # of texts of its own
            continue
        full = [f"{item.prompt} {item.answer}" if item.choices else item.prompt for item in found]
        assert not [line for line in full if content(line) in seen], name
        assert not [item for item in found if item.prompt in text], name
    # It would be seen: examples of training's own side are found so.
    for family in FAMILIES.values():
        own = list(itertools.islice(items(family, Draw("training side"), held_out=False), 400))
        full = [f"{item.prompt} {item.answer}" if item.choices else item.prompt for item in own]
        small_space = family in (SYMBOLIC["boolean"], SYMBOLIC["counting"], algebra)
        found_again = sum(content(line) in seen for line in full)
        # The order of three balls and their swaps leaves too many for any to come twice.
        assert found_again >= (200 if small_space else 50) or family is SYMBOLIC["tracking"]


def test_training_states_every_fact_that_is_asked_for_and_asks_about_other_places() -> None:
    stated, asked = Counter[tuple[str, str]](), set[str]()
    by_name = {place.name: place for place in facts.places()}
    for document in training_documents():
        for line in document.splitlines():
            if line.startswith("Question: "):
                asked |= set(re.findall(r"\w+", line)) & by_name.keys()
                continue
            for sentence in re.findall(r"[^.]+\.", line):
                for name in set(re.findall(r"\w+", sentence)) & by_name.keys():
                    stated.update((name, value) for value in by_name[name].values.values() if value in sentence)
    kinds = {kind: [place for place in by_name.values() if place.kind == kind] for kind in ("common", "rare")}
    assert asked
    assert all(by_name[name].kind == "quizzed" for name in asked)
    counts = {k: [stated[p.name, value] for p in places for value in p.values.values()] for k, places in kinds.items()}
    assert min(counts["common"]) >= 20
    assert min(counts["rare"]) >= 1
    assert 6 < sum(counts["common"]) / sum(counts["rare"]) < 10


def test_continuations_are_real_unseen_and_from_other_texts() -> None:
    seen = HELD_OUT[0].splitlines(keepends=True)[::2]
    found = continuation(HELD_OUT, seen, 200)
    assert len(found) == 200
    lines = [{line.strip() for line in text.splitlines()} for text in HELD_OUT]
    known = {line.strip() for line in seen}
    for item in found:
        (home,) = [number for number, text in enumerate(HELD_OUT) if f"{item.prompt} {item.answer}" in text]
        assert not known & set(item.choices)
        for choice in set(item.choices) - {item.answer}:
            assert choice not in lines[home]
            assert any(choice in text for text in lines)


def test_the_benchmark_is_the_same_everywhere() -> None:
    drawn = [item for name, found in tasks().items() if name != "mini_continuation" for item in found]
    text = json.dumps([(item.prompt, item.answer, item.choices) for item in drawn])
    training = "".join(training_documents()[:2000])
    digests = [hashlib.sha256(part.encode()).hexdigest()[:12] for part in (text, training)]
    # Scores compare only where the items are the same. If they had to change: raise mini.VERSION, then these digests.
    assert (VERSION, digests) == (1, ["42ff9888f20d", "936ac8b155d6"])


def test_the_files_are_written_for_the_place_where_they_will_stand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write_benchmark(tmp_path / "a", HELD_OUT, [], tmp_path / "elsewhere")
    other = write_benchmark(tmp_path / "b", HELD_OUT, [])
    assert one == other
    assert str(tmp_path / "elsewhere" / "mini_algebra.test.jsonl") in (tmp_path / "a" / "mini_algebra.yaml").read_text()
    assert str(tmp_path / "b" / "mini_algebra.test.jsonl") in (tmp_path / "b" / "mini_algebra.yaml").read_text()
    for task in TASKS:
        assert f"`{task.name}`" in (tmp_path / "a" / "README.md").read_text()

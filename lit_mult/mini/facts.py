"""Facts about invented places: training text states them in sentences, the benchmark asks for them.

A fact of a *common* place is stated eight times as often as one of a *rare* place: the two levels of difficulty.
Training text also has questions with answers, so that their form is known, but about other places only: what is asked
for in the benchmark can be known from the sentences alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lit_mult.mini.items import Draw, Item

_EXPOSURE = {"common": 8, "rare": 1, "quizzed": 4}
_PLACES = {"common": 100, "rare": 100, "quizzed": 80}
_ONSETS = "b br d dr f g gr k kl l m n p pr r s st t tr v z".split()
_VOWELS = "a e i o u".split()
_CODAS = "k l m n r s t x".split()


@dataclass(frozen=True)
class Attribute:
    """A property of places: its values, the sentences that state it and the questions that ask for it."""

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    question: str


ATTRIBUTES = {
    "crop": Attribute(
        tuple("rice corn wheat barley beans onions grapes olives tea cotton hops oats".split()),
        ("Farmers in {place} grow {value}.", "{place} exports {value}.", "The crop of {place} is {value}."),
        "What grows in {place}?",
    ),
    "animal": Attribute(
        tuple("bear wolf lion eagle horse bull fox deer owl crane tiger whale".split()),
        (
            "The animal of {place} is the {value}.",
            "The flag of {place} shows the {value}.",
            "{place} honours the {value}.",
        ),
        "Which animal stands for {place}?",
    ),
    "metal": Attribute(
        tuple("gold silver copper iron tin zinc nickel lead cobalt chrome bronze steel".split()),
        ("Mines in {place} yield {value}.", "The metal of {place} is {value}.", "{place} is rich in {value}."),
        "Which metal comes from {place}?",
    ),
    "trade": Attribute(
        tuple("potters weavers bakers smiths tailors sailors printers brewers miners tanners dyers masons".split()),
        (
            "{place} is known for its {value}.",
            "Many people of {place} are {value}.",
            "The guild of {place} is of {value}.",
        ),
        "Whose guild is in {place}?",
    ),
    "feast": Attribute(
        tuple("January March April May June July August October November December Monday Friday".split()),
        (
            "The feast of {place} is in {value}.",
            "{place} celebrates in {value}.",
            "People dance in {place} in {value}.",
        ),
        "When is the feast of {place}?",
    ),
}


@dataclass(frozen=True)
class Place:
    """A place and the value of each of its attributes."""

    name: str
    kind: str
    """common, rare, or quizzed: one that training text asks about."""
    values: dict[str, str]

    def sentence(self, draw: Draw, attribute: str) -> str:
        """One of the sentences that state a fact."""
        return draw.one(ATTRIBUTES[attribute].sentences).format(place=self.name, value=self.values[attribute])

    def question(self, draw: Draw, attribute: str) -> Item:
        """A question with three wrong answers."""
        right, asked = self.values[attribute], ATTRIBUTES[attribute]
        wrong = draw.some([value for value in asked.values if value != right], 3)
        choices = tuple(draw.shuffled([right, *wrong]))
        return Item(f"Question: {asked.question.format(place=self.name)} Answer:", right, choices)


@cache
def places() -> tuple[Place, ...]:
    """All places. Each value of an attribute is that of equally many places of a kind, or one more."""
    draw, names, found = Draw("places"), set[str](), list[Place]()
    for kind, n in _PLACES.items():
        columns = {}
        for attribute, of in ATTRIBUTES.items():
            columns[attribute] = draw.shuffled([of.values[i % len(of.values)] for i in range(n)])
        for i in range(n):
            name = _name(draw)
            while name in names:
                name = _name(draw)
            names.add(name)
            found.append(Place(name, kind, {attribute: column[i] for attribute, column in columns.items()}))
    return tuple(found)


def _name(draw: Draw) -> str:
    middle = draw.one(_ONSETS) + draw.one(_VOWELS)
    return (draw.one(_ONSETS) + draw.one(_VOWELS) + middle + draw.one(_CODAS)).capitalize()


@cache
def _by_exposure() -> tuple[Place, ...]:
    return tuple(place for place in places() for _ in range(_EXPOSURE[place.kind]))


def document(draw: Draw) -> str:
    """A training document: three facts of one place or, of a quizzed place now and then, two questions and answers."""
    place = draw.one(_by_exposure())
    if place.kind == "quizzed" and draw.below(2):
        asked = draw.some(list(ATTRIBUTES), 2)
        return "".join(place.question(draw, attribute).document for attribute in asked)
    return " ".join(place.sentence(draw, attribute) for attribute in draw.some(list(ATTRIBUTES), 3)) + "\n"


def questions(kind: str) -> list[Item]:
    """The benchmark's questions on places of a kind: every attribute of each."""
    draw = Draw(f"questions {kind}")
    asked = [(place, attribute) for place in places() if place.kind == kind for attribute in ATTRIBUTES]
    return [place.question(draw, attribute) for place, attribute in draw.shuffled(asked)]

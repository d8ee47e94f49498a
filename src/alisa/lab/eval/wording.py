"""How a recall task states a fact and asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

WordingName = Literal["auto", "words", "numbers"]


@dataclass(frozen=True, slots=True)
class Wording:
    """Texts of a fact and of a question; everything begins with a space and follows running text."""

    name: str
    statement: str
    """With {key} and {value}."""
    question: str
    """With {key}; the answer is a space and the value."""
    link: str
    """A fact that leads to another one, with {key} and the other's {key} as {value}."""
    follow: str
    """Asks for it: with {key}; the answer is a space and the other key."""
    keys: Sequence[str]
    values: Sequence[str]
    things: Sequence[str]
    """Words of a list to count in."""

    def facts(self, count: int, rng: Random) -> list[tuple[str, str]]:
        """Pairs of different keys and different values."""
        return list(zip(rng.sample(self.keys, count), rng.sample(self.values, count), strict=True))


# The words of the model inside the package (src/alisa/embedded/README.md), single tokens of its tokenizer.
_KEYS = """
account arm bed black blood body book boy brother business case character child company country course danger day death
desire door duty eye face fact family father fear fire foot force fortune friend gentleman girl government ground hand
head heart hope hour house human husband idea judge lady land law leg letter light
"""
_VALUES = """
love man manner master matter mind moment money morning mother name nature night number object opinion order pain part
passion people person place plain play pleasure point poor power principle purpose question reason room sea sense ship
side sight sister son soul sound spirit state strong subject sun thing thought time truth uncle understanding voice walk
war water way white wife wind woman word work world young
"""
_CITIES = """
Amsterdam Athens Berlin Boston Cairo Chicago Delhi Dublin Florence Geneva Hamburg Helsinki Istanbul Jakarta Kyoto Lisbon
London Madrid Melbourne Montreal Moscow Munich Nairobi Oslo Paris Prague Rome Seoul Singapore Stockholm Sydney Tokyo
Toronto Vienna Warsaw Zurich
"""
_THINGS = """
apple basket bridge butter candle cloud feather forest garden hammer kettle ladder lantern market mirror orchard pillow
rabbit river silver stone table thunder window
"""

WORDS = Wording(
    name="words",
    statement=" The word for {key} is {value}.",
    question=" What is the word for {key}?",
    link=" The word for {key} is {value}.",
    follow=" What is the word for {key}?",
    keys=tuple(_KEYS.split()),
    values=tuple(_VALUES.split()),
    things=tuple(_KEYS.split()),
)
"""What the model inside the package was trained to look up."""

NUMBERS = Wording(
    name="numbers",
    statement=" The special number of {key} is {value}.",
    question=" What is the special number of {key}? The special number of {key} is",
    link=" {key} leads to {value}.",
    follow=" {key} leads to",
    keys=tuple(_CITIES.split()),
    values=tuple(str(10007 + 2477 * index) for index in range(36)),
    things=tuple(_THINGS.split()),
)
"""For any model that continues text: five-digit numbers, which no text suggests."""


def choose_wording(name: WordingName, model: str) -> Wording:
    """The wording of this name; `auto` takes the one that the model was trained on, or numbers."""
    if name == "auto":
        return WORDS if model == "embedded" else NUMBERS
    return WORDS if name == "words" else NUMBERS

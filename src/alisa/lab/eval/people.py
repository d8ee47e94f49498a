"""People that do not exist, for questions over paragraphs: one sentence says all that can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_FIRST = """
Ada Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nikolai Olga Peter
"""
_LAST = """
Adler Brandt Castro Dumont Ericson Fischer Gruber Hansen Ivanov Keller Lindgren Moreau Novak Olsen
"""
_TOWNS = """
Athens Berlin Boston Cairo Chicago Dublin Geneva London Madrid Moscow Oslo Paris Prague Rome Tokyo Vienna
"""
_TRADES = """
baker carpenter doctor farmer fisherman gardener judge lawyer miner painter sailor soldier tailor teacher
"""
_ANIMALS = """
bees birds cats chickens cows dogs ducks goats horses pigs rabbits sheep
"""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with three things to ask for."""

    name: str
    town: str
    trade: str
    animals: str

    @property
    def sentence(self) -> str:
        """All there is to know."""
        return f"{self.name} was born in {self.town}, worked as a {self.trade} and kept {self.animals}."

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question with the beginning of its answer, and the word that completes it."""
        questions = (
            (f"Question: Where was {self.name} born? Answer: {self.name} was born in", self.town),
            (f"Question: What did {self.name} work as? Answer: {self.name} worked as a", self.trade),
            (f"Question: Which animals did {self.name} keep? Answer: {self.name} kept", self.animals),
        )
        return rng.choice(questions)


def draw_people(count: int, rng: Random) -> list[Person]:
    """People of different names; towns, trades and animals may be shared."""
    names = rng.sample([f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()], count)
    towns, trades, animals = _TOWNS.split(), _TRADES.split(), _ANIMALS.split()
    return [Person(name, rng.choice(towns), rng.choice(trades), rng.choice(animals)) for name in names]

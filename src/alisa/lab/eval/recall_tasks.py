"""Texts that cannot be continued without what was said far before: facts to look up, passages to copy.

    needle   prose, a fact, prose; the question             one fact at a given depth
    multi    prose with several facts; a question for each  facts at random depths
    lookup   a block of facts, prose; a question for each   asked in random order
    copy     a passage, prose, the passage again            the passage at a given depth

Needle and look-up are what history-based selection fails at: nothing points to a fact until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Literal

from alisa.lab.eval.filler import Filler
from alisa.lab.eval.wording import Wording
from alisa.model.tokenizer import Tokenizer

TaskName = Literal["needle", "multi", "lookup", "copy"]

NUM_NEEDLES = 4
"""Facts of the task `multi`."""
COPY_TOKENS = 48
"""Length of the passage to copy, about."""
FACTS_SHARE = 0.5
"""Share of the text that the facts of `lookup` and the questions about them take."""

DEPTH_TASKS: frozenset[TaskName] = frozenset(("needle", "copy"))
"""Tasks that put something at a depth which the caller chooses."""

_COPY_HEADS = (" The first reading:", " The second reading:")


@dataclass(frozen=True, slots=True)
class Answer:
    """A stretch of text that must be recalled, and where it was told; offsets in characters."""

    start: int
    end: int
    told: int


@dataclass
class Script:
    """A text under construction."""

    text: str = ""
    first_question: int | None = None
    """Where the first question begins."""
    answers: list[Answer] = field(default_factory=list)

    def say(self, text: str) -> int:
        """Add text; where it begins."""
        start = len(self.text)
        self.text += text
        return start

    def ask(self, text: str) -> None:
        """Add a question."""
        start = self.say(text)
        if self.first_question is None:
            self.first_question = start

    def recall(self, text: str, told: int) -> None:
        """Add text that was told before."""
        start = self.say(text)
        self.answers.append(Answer(start, len(self.text), told))


@dataclass(frozen=True, slots=True)
class Scene:
    """What a task is made from."""

    tokenizer: Tokenizer
    filler: Filler
    wording: Wording
    length: int
    """Tokens of the whole text, at most."""
    depth: float
    """Where the thing to recall is in what precedes the question: 0 first, 1 last."""

    def room(self, fixed: str) -> int:
        """Tokens left for prose in addition to `fixed` text."""
        return max(0, self.length - len(self.tokenizer.encode(fixed)) - 2)


def needle(scene: Scene, rng: Random) -> Script:
    """One fact in prose, then its question."""
    return _scattered(scene, rng, [scene.depth])


def multi(scene: Scene, rng: Random) -> Script:
    """Several facts anywhere in prose, then all their questions."""
    return _scattered(scene, rng, sorted(rng.random() for _ in range(NUM_NEEDLES)))


def lookup(scene: Scene, rng: Random) -> Script:
    """A block of facts in front, prose, then all their questions in random order."""
    wording = scene.wording
    parts = (wording.statement, wording.question, " {value}.")
    text = "".join(part.format(key=wording.keys[0], value=wording.values[0]) for part in parts)
    count = int(FACTS_SHARE * scene.length / len(scene.tokenizer.encode(text)))
    count = max(2, min(len(wording.keys), count))
    return _scattered(scene, rng, [0.0] * count)


def copy(scene: Scene, rng: Random) -> Script:
    """A passage, and the same passage at the end."""
    # Drawn from elsewhere than the prose around it.
    passage = scene.filler.passage(COPY_TOKENS, rng)
    room = scene.room(passage * 2 + "".join(_COPY_HEADS))
    before, after = scene.filler.pieces(_shares(room, [scene.depth]), rng)
    script = Script()
    script.say(before + _COPY_HEADS[0])
    told = script.say(passage)
    script.say(after)
    script.ask(_COPY_HEADS[1])
    script.recall(passage, told)
    return script


TASKS: dict[TaskName, Callable[[Scene, Random], Script]] = {
    "needle": needle,
    "multi": multi,
    "lookup": lookup,
    "copy": copy,
}


def _scattered(scene: Scene, rng: Random, depths: list[float]) -> Script:
    """Facts at these depths of the prose, then a question about each."""
    wording = scene.wording
    facts = wording.facts(len(depths), rng)
    statements = [wording.statement.format(key=key, value=value) for key, value in facts]
    questions = [wording.question.format(key=key) for key, _ in facts]
    answers = [f" {value}" for _, value in facts]
    room = scene.room("".join(statements) + "".join(f"{q}{a}." for q, a in zip(questions, answers, strict=True)))
    pieces = scene.filler.pieces(_shares(room, depths), rng)
    script = Script()
    told: list[int] = []
    for piece, statement, answer in zip(pieces[:-1], statements, answers, strict=True):
        script.say(piece)
        told.append(script.say(statement) + statement.rindex(answer))
    script.say(pieces[-1])
    for index in rng.sample(range(len(facts)), len(facts)):
        script.ask(questions[index])
        script.recall(answers[index], told[index])
        script.say(".")
    return script


def _shares(room: int, depths: list[float]) -> list[int]:
    """Tokens of prose before, between and after things at ascending depths."""
    places = [0, *(round(depth * room) for depth in depths), room]
    return [end - start for start, end in pairwise(places)]

"""Texts that cannot be continued without what was said far before: facts to look up, passages to copy.

    needle      prose, a fact, prose; the question               one fact at a given depth
    multi       prose with several facts; a question for each    facts at random depths
    lookup      a block of facts, prose; a question for each     asked in random order
    copy        a passage, prose, the passage again              the passage at a given depth
    variables   facts that lead to each other, in prose          two chains, followed step by step
    common      words in random order; which is the commonest?   one twenty times as often as each other, after examples
    paragraphs  paragraphs about people; questions about them    answers in the words of the paragraph

These are the forms of RULER (arXiv 2404.06654: its single, multi-query and multi-key needles, variable tracking, common
words and questions), told so that a small model which continues text can answer. Needle and look-up are what
history-based selection fails at: nothing points to a fact until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Literal

from alisa.lab.eval.filler import Filler
from alisa.lab.eval.people import draw_people
from alisa.lab.eval.wording import Wording
from alisa.model.tokenizer import Tokenizer

TaskName = Literal["needle", "multi", "lookup", "copy", "variables", "common", "paragraphs"]

NUM_NEEDLES = 4
"""Facts of the task `multi`."""
COPY_TOKENS = 48
"""Length of the passage to copy, about."""
FACTS_SHARE = 0.5
"""Share of the text that the facts of `lookup` and the questions about them take."""
NUM_CHAINS = 2
"""Chains of the task `variables`."""
NUM_HOPS = 2
"""Facts of a chain that lead to another one; the first has the value."""
COMMON_RATIO = 20
"""How much more often than any other the word of `common` occurs."""
COMMON_EXAMPLES = 4
"""Short lists in front of that of `common`, with their answers."""
PARAGRAPH_TOKENS = 128
"""Length of one of the `paragraphs`, about."""
NUM_ASKED = 4
"""Questions of `paragraphs`, at most."""

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


def variables(scene: Scene, rng: Random) -> Script:
    """Chains of facts in prose, each in its order; then each is followed from its end to the value.

    Every step is an answer of its own, and the next begins with the right one: a small model finds one step at a time.
    """
    wording = scene.wording
    keys = rng.sample(wording.keys, NUM_CHAINS * (NUM_HOPS + 1))
    values = rng.sample(wording.values, NUM_CHAINS)
    facts: list[tuple[float, str, str, str]] = []  # depth, statement, question, answer
    order: list[int] = []
    for chain, value in enumerate(values):
        names = keys[chain * (NUM_HOPS + 1) : (chain + 1) * (NUM_HOPS + 1)]
        depths = sorted(rng.random() for _ in names)
        steps = [(wording.statement, wording.question, names[0], value)]
        steps += [(wording.link, wording.follow, name, before) for before, name in pairwise(names)]
        for depth, (statement, question, key, answer) in zip(depths, steps, strict=True):
            facts.append((depth, statement.format(key=key, value=answer), question.format(key=key), f" {answer}"))
        order += reversed(range(chain * len(steps), (chain + 1) * len(steps)))
    return _told_and_asked(scene, rng, facts, order)


def common(scene: Scene, rng: Random) -> Script:
    """Words in random order, and the question which of them is the commonest; short lists with their answers first."""
    words = list(scene.wording.things)
    head, question = " A list of words:", "\n The word repeated most often in the list is"
    script = Script()
    for _ in range(COMMON_EXAMPLES):
        rng.shuffle(words)
        script.say(f"{head}{_listed(words[:5], 6, rng)}{question} {words[0]}.\n\n")
    rng.shuffle(words)
    each = _listed(words, COMMON_RATIO, rng)
    room = scene.room(f"{script.text}{head}{question} {words[0]}.")
    rounds = max(1, room // (len(scene.tokenizer.encode(each)) + 1))
    script.say(head)
    start = script.say("".join(_listed(words, COMMON_RATIO, rng) for _ in range(rounds)))
    told = start + script.text[start:].rindex(f" {words[0]},")
    script.ask(question)
    script.recall(f" {words[0]}", told)
    script.say(".")
    return script


def _listed(words: Sequence[str], ratio: int, rng: Random) -> str:
    """Each of the words once and the first one `ratio` times, in random order, a comma after each."""
    listed = [*words[1:], *[words[0]] * ratio]
    rng.shuffle(listed)
    return "".join(f" {word}," for word in listed)


def paragraphs(scene: Scene, rng: Random) -> Script:
    """Paragraphs that begin with a sentence about somebody; then questions about some of them."""
    people = draw_people(max(2, scene.length // PARAGRAPH_TOKENS), rng)
    asked = rng.sample(people, min(NUM_ASKED, len(people)))
    questions = [person.ask(rng) for person in asked]
    # A full stop may be one token with the line feeds after it, or not: each paragraph counts one more.
    fixed = "".join(f".\n\n{person.sentence}" for person in people) + "\n\n"
    room = scene.room(fixed + "".join(f"{question} {answer}.\n" for question, answer in questions))
    prose = scene.filler.pieces([room // len(people)] * len(people), rng)
    script = Script()
    starts = {}
    for person, text in zip(people, prose, strict=True):
        starts[person] = script.say(f"\n\n{person.sentence}") + 2
        script.say(text)
    script.say("\n\n")
    for person, (question, answer) in zip(asked, questions, strict=True):
        script.ask(question)
        script.recall(f" {answer}", starts[person] + person.sentence.index(f" {answer}"))
        script.say(".\n")
    return script


TASKS: dict[TaskName, Callable[[Scene, Random], Script]] = {
    "needle": needle,
    "multi": multi,
    "lookup": lookup,
    "copy": copy,
    "variables": variables,
    "common": common,
    "paragraphs": paragraphs,
}


def _scattered(scene: Scene, rng: Random, depths: list[float]) -> Script:
    """Facts at these depths of the prose, then a question about each, in random order."""
    wording = scene.wording
    facts = [
        (depth, wording.statement.format(key=key, value=value), wording.question.format(key=key), f" {value}")
        for depth, (key, value) in zip(depths, wording.facts(len(depths), rng), strict=True)
    ]
    return _told_and_asked(scene, rng, facts, None)


def _told_and_asked(
    scene: Scene, rng: Random, facts: list[tuple[float, str, str, str]], order: list[int] | None
) -> Script:
    """Facts (depth, statement, question, answer) in prose at their depths, then their questions.

    The questions come in this order of the facts; None: in random order.
    """
    told_order = sorted(range(len(facts)), key=lambda index: facts[index][0])
    fixed = "".join(f"{statement}{question}{answer}." for _, statement, question, answer in facts)
    pieces = scene.filler.pieces(_shares(scene.room(fixed), [facts[index][0] for index in told_order]), rng)
    script = Script()
    told: dict[int, int] = {}
    for piece, index in zip(pieces[:-1], told_order, strict=True):
        script.say(piece)
        _, statement, _, answer = facts[index]
        told[index] = script.say(statement) + statement.rindex(answer)
    script.say(pieces[-1])
    for index in rng.sample(range(len(facts)), len(facts)) if order is None else order:
        _, _, question, answer = facts[index]
        script.ask(question)
        script.recall(answer, told[index])
        script.say(".")
    return script


def _shares(room: int, depths: list[float]) -> list[int]:
    """Tokens of prose before, between and after things at ascending depths."""
    places = [0, *(round(depth * room) for depth in depths), room]
    return [end - start for start, end in pairwise(places)]

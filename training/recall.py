"""Synthetic long-range recall tasks, made of real tokens between real prose.

Pure functions of a numpy generator and token ids: the same seed gives the same sequences. Every
task returns `Sample`s: token ids plus, per token, what kind of target it is and how far back the
token that gives it away lies. The text of each task (documented in the model card):

    facts   The word for river is garden. The word for ... is ....  (many, then many questions)
    needle  the same statements and questions, scattered through prose
    list    The first list: w w w w. <prose> The second list: w w w w.
    quote   The first reading: <passage> <prose> The second reading: <passage>

A question is either the statement again ("The word for river is garden.") or
"What is the word for river? garden.". Keys and values are single tokens of the tokenizer, and
unique within a sequence, so chance is one in the number of facts stated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

PROSE, STATEMENT, ANSWER, COPY = 0, 1, 2, 3
KINDS = ("prose", "statement", "answer", "copy")

KEYS = """
account animal arm ball bed black blood blue boat body book box boy bridge brother business captain
case character child church circumstance city class cloth colour company country course court
danger daughter day death desire doctor dog door dress duty ear earth evening eye face fact family
father fear field fire flower foot force fortune friend garden gentleman girl god gold gold
government ground hair hand head heart heaven hill history hope horse hour house human husband idea
island judge justice king lady land language law leg letter library light lord
"""
VALUES = """
love man manner master matter mind minute moment money month moon morning mother mountain mouth
music name nation nature neck night nose number object opinion order pain paper part passion people
person place plain play pleasure point poor power pride prince principle prison purpose queen
question rain reason red religion river road rock room sea season sense servant ship shoulder side
sight silence silver sister sky sleep society soldier son soul sound spirit spring square star state
step stone story street strong subject summer sun table thing thought time town train tree truth
uncle understanding voice walk wall war water way white wife wind window winter woman wood word work
world year young
"""


@dataclass(frozen=True)
class Sample:
    """One sequence. kind and distance describe the token at the same place in ids."""

    ids: np.ndarray  # uint16
    kind: np.ndarray  # uint8, one of PROSE, STATEMENT, ANSWER, COPY
    distance: np.ndarray  # int32, tokens back to the token that gives this one away; 0: none


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of the task texts as token ids."""

    bos: int
    keys: np.ndarray
    values: np.ndarray
    words: np.ndarray
    statement: tuple[tuple[int, ...], tuple[int, ...]]  # before the key, between key and value
    question: tuple[tuple[int, ...], tuple[int, ...]]
    list_heads: tuple[tuple[int, ...], tuple[int, ...]]
    quote_heads: tuple[tuple[int, ...], tuple[int, ...]]
    stop: int
    sentence_ends: np.ndarray  # bool per id: a full stop, with or without a closing quote
    word_starts: np.ndarray  # bool per id: begins with a space


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Encode the fixed pieces; only words that are a single token are used."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def single(text: str) -> np.ndarray:
        ids = [encode(" " + word) for word in sorted(set(text.split()))]
        return np.array([i[0] for i in ids if len(i) == 1], dtype=np.uint16)

    vocab = tokenizer.get_vocab()
    ends, starts = np.zeros(len(vocab), bool), np.zeros(len(vocab), bool)
    for token, index in vocab.items():
        ends[index] = token in {".", '."', "!", "?", '!"', '?"'}
        starts[index] = token.startswith("Ġ")
    keys, values = single(KEYS), single(VALUES)
    return Vocabulary(
        bos=tokenizer.token_to_id("<s>"),
        keys=keys,
        values=values,
        words=np.concatenate([keys, values]),
        statement=(encode(" The word for"), encode(" is")),
        question=(encode(" What is the word for"), encode("?")),
        list_heads=(encode(" The first list:"), encode(" The second list:")),
        quote_heads=(encode(" The first reading:"), encode(" The second reading:")),
        stop=encode(".")[0],
        sentence_ends=ends,
        word_starts=starts,
    )


class Prose:
    """A stream of prose ids that can be cut at the ends of sentences."""

    def __init__(self, ids: np.ndarray, vocabulary: Vocabulary) -> None:
        self.ids = ids
        after_end = vocabulary.sentence_ends[ids[:-1]] & vocabulary.word_starts[ids[1:]]
        self.cuts = np.flatnonzero(after_end) + 1

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Any `length` consecutive tokens."""
        start = int(rng.integers(0, len(self.ids) - length))
        return self.ids[start : start + length]

    def passage(self, rng: np.random.Generator, length: int) -> "Passage":
        """A place to read on from, sentence by sentence; `length` is what will be needed."""
        last = np.searchsorted(self.cuts, len(self.ids) - 2 * length - 512)
        return Passage(self, int(self.cuts[rng.integers(0, last)]))


class Passage:
    """Consecutive prose, handed out in pieces that end where sentences do."""

    def __init__(self, prose: Prose, start: int) -> None:
        self.prose, self.place = prose, start

    def take(self, length: int) -> np.ndarray:
        """About `length` tokens (0 gives none): on to the next end of a sentence."""
        cuts = self.prose.cuts
        if length <= 0:
            return self.prose.ids[:0]
        index = min(int(np.searchsorted(cuts, self.place + length)), len(cuts) - 1)
        start, self.place = self.place, int(cuts[index])
        return self.prose.ids[start : self.place]


class Builder:
    """Collects the tokens of one sequence with their kinds and distances."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.ids, self.kind, self.distance = [vocabulary.bos], [STATEMENT], [0]

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int] | np.ndarray, kind: int, sources: Sequence[int] | None = None) -> None:
        """Append ids; sources: the places in this sequence they can be read from."""
        here = len(self.ids)
        self.ids.extend(int(i) for i in ids)
        self.kind.extend([kind] * len(ids))
        if sources is None:
            self.distance.extend([0] * len(ids))
        else:
            self.distance.extend(here + n - int(source) for n, source in enumerate(sources))

    def build(self, length: int) -> Sample:
        """Cut to `length` tokens."""
        return Sample(
            np.array(self.ids[:length], np.uint16),
            np.array(self.kind[:length], np.uint8),
            np.array(self.distance[:length], np.int32),
        )


class FactWriter:
    """Writes statements and questions about them into a builder."""

    def __init__(self, vocabulary: Vocabulary, rng: np.random.Generator, num_facts: int) -> None:
        self.vocabulary, self.rng = vocabulary, rng
        self.keys = rng.permutation(vocabulary.keys)[:num_facts]
        self.values = rng.permutation(vocabulary.values)[:num_facts]
        self.places: list[int] = []

    def state(self, out: Builder) -> None:
        """State the next fact."""
        head, link = self.vocabulary.statement
        fact = len(self.places)
        out.add(head, STATEMENT)
        out.add([self.keys[fact], *link], STATEMENT)
        self.places.append(len(out))
        out.add([self.values[fact], self.vocabulary.stop], STATEMENT)

    def ask(self, out: Builder, fact: int) -> None:
        """Ask for a stated fact, in one of the two forms, and answer."""
        head, link = self.vocabulary.statement if self.rng.random() < 0.5 else self.vocabulary.question
        out.add([*head, self.keys[fact], *link], STATEMENT)
        out.add([self.values[fact]], ANSWER, [self.places[fact]])
        self.places[fact] = len(out) - 1  # asked again, it can be read from this answer
        out.add([self.vocabulary.stop], STATEMENT)


def facts(vocabulary: Vocabulary, prose: Prose, rng: np.random.Generator, length: int) -> Sample:
    """Many facts in a block, prose, then a question about each in random order, until full."""
    most = min(len(vocabulary.keys), length // 16)
    writer = FactWriter(vocabulary, rng, int(rng.integers(4, most + 1)))
    out = Builder(vocabulary)
    passage = prose.passage(rng, length)
    while len(out) < length:
        for _ in writer.keys[len(writer.places) :]:
            writer.state(out)
        room = length - len(out) - 9 * len(writer.keys)
        out.add(passage.take(int(room * rng.random() ** 0.5)), PROSE)
        for fact in rng.permutation(len(writer.keys)):
            writer.ask(out, int(fact))
    return out.build(length)


def needle(vocabulary: Vocabulary, prose: Prose, rng: np.random.Generator, length: int) -> Sample:
    """Facts in the first half, questions anywhere behind them, prose everywhere between."""
    num_facts = int(rng.integers(1, min(24, 4 + length // 64) + 1))
    num_questions = int(rng.integers(4, 5 + length // 40))
    writer = FactWriter(vocabulary, rng, num_facts)
    events = [(place, True) for place in rng.random(num_facts) * rng.uniform(0.02, 0.6)]
    events += [(place, False) for place in rng.random(num_questions)]
    filler = max(0, length - 7 * num_facts - 10 * num_questions)
    passage = prose.passage(rng, length)
    out, before = Builder(vocabulary), 0.0
    for place, is_fact in sorted(events):
        out.add(passage.take(int((place - before) * filler)), PROSE)
        before = place
        if is_fact:
            writer.state(out)
        elif writer.places:
            writer.ask(out, int(rng.integers(len(writer.places))))
    out.add(passage.take(max(1, length - len(out))), PROSE)
    return out.build(length)


def _copying(
    vocabulary: Vocabulary,
    prose: Prose,
    rng: np.random.Generator,
    length: int,
    heads: tuple[tuple[int, ...], tuple[int, ...]],
    draw: Callable[[int], np.ndarray],
) -> Sample:
    """A text, prose, the text again; from the start until the sequence is full."""
    out = Builder(vocabulary)
    passage = prose.passage(rng, 2 * length)
    while len(out) < length - 48:
        room = length - len(out) - 16
        size = int(rng.integers(8, max(9, min(160, room // 2))))
        text = draw(size)
        gap = max(0, room - 2 * len(text))
        gap = int(gap * rng.random() ** 0.7)
        kind = PROSE if heads is vocabulary.quote_heads else STATEMENT
        out.add(heads[0], STATEMENT)
        source = len(out)
        out.add(text, kind)
        out.add(passage.take(gap), PROSE)
        out.add(heads[1], STATEMENT)
        out.add(text, COPY, range(source, source + len(text)))
    out.add(passage.take(max(1, length - len(out))), PROSE)
    return out.build(length)


def copy_list(vocabulary: Vocabulary, prose: Prose, rng: np.random.Generator, length: int) -> Sample:
    """Random words, prose, the same words: nothing but copying predicts them."""

    def draw(size: int) -> np.ndarray:
        return np.append(rng.choice(vocabulary.words, size), vocabulary.stop).astype(np.uint16)

    return _copying(vocabulary, prose, rng, length, vocabulary.list_heads, draw)


def quote(vocabulary: Vocabulary, prose: Prose, rng: np.random.Generator, length: int) -> Sample:
    """A passage of some book, other prose, the same passage."""

    def draw(size: int) -> np.ndarray:
        return prose.passage(rng, length).take(size)

    return _copying(vocabulary, prose, rng, length, vocabulary.quote_heads, draw)


def plain(vocabulary: Vocabulary, prose: Prose, rng: np.random.Generator, length: int) -> Sample:
    """Prose alone, behind bos."""
    out = Builder(vocabulary)
    out.add(prose.window(rng, length - 1), PROSE)
    return out.build(length)


TASKS = {"prose": plain, "facts": facts, "needle": needle, "list": copy_list, "quote": quote}


def make_batch(
    vocabulary: Vocabulary,
    prose: Prose,
    rng: np.random.Generator,
    tasks: list[str],
    length: int,
) -> Sample:
    """One sample per named task, stacked: arrays of shape [len(tasks), length]."""
    rows = [TASKS[task](vocabulary, prose, rng, length) for task in tasks]
    return Sample(
        np.stack([row.ids for row in rows]),
        np.stack([row.kind for row in rows]),
        np.stack([row.distance for row in rows]),
    )

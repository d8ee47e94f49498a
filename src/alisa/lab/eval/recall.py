"""Recall: does the model still find what stands far back, when a policy decides what is read?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from alisa.errors import InputError
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.filler import DEFAULT_TEXT, Filler
from alisa.lab.eval.measurement import UnitResults, fingerprint
from alisa.lab.eval.recall_tasks import DEPTH_TASKS, TASKS, Scene, Script, TaskName
from alisa.lab.eval.statistics import Estimate, difference, mean
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.eval.wording import Wording
from alisa.lab.scoring import ScoredItem
from alisa.model.tokenizer import Tokenizer

Asking = Literal["decoded", "prompt"]
"""Where the first question of a text stands: after the prompt, as the next turn of a conversation does, so that it is
asked under the policy; or at the end of the prompt, which is read densely, as a question about a document does."""

DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper ends of the classes of distances, in tokens."""


@dataclass(frozen=True, slots=True)
class Target:
    """Output tokens [start, end) of an item that must be recalled, and how far back they were told."""

    start: int
    end: int
    distance: int


@dataclass(frozen=True, slots=True)
class RecallItem:
    """One text with its targets."""

    item: ScoredItem
    targets: tuple[Target, ...]
    depth: float


@dataclass(frozen=True)
class RecallEvaluation:
    """One task at one length; a unit is a text: the share of its targets that greedy decoding gets right.

    An answer counts when every token of it is the most likely one; a copied passage counts token by token.
    """

    name: TaskName
    length: int
    question: Asking
    items: Sequence[RecallItem]
    settings: Mapping[str, object]
    kind = "recall"
    metric = "accuracy"

    @property
    def task(self) -> str:
        """Name and length, and that the question is in the prompt."""
        return f"{self.name} {self.length}" + ("" if self.question == "decoded" else " asked")

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Answer everything under one variant."""
        items = [item.item for item in self.items]
        outputs = subject.scorer.score(variant.selection_policy(), subject.codec(variant), items)
        units: list[float] = []
        by_depth: list[tuple[float, float]] = []
        by_distance: list[tuple[float, float]] = []
        for recall, output in zip(self.items, outputs, strict=True):
            rights = []
            for target in recall.targets:
                found = output.greedy[target.start : target.end].double()
                right = float(found.mean() if self.name == "copy" else found.min())
                rights.append(right)
                by_distance.append((next(end for end in DISTANCES if target.distance < end), right))
            units.append(mean(rights).value)
            by_depth.append((recall.depth, units[-1]))
        details: dict[str, object] = {
            "length": self.length,
            "targets": len(by_distance),
            "by_distance": _classes(by_distance),
        }
        if self.name in DEPTH_TASKS:
            details["by_depth"] = _classes(by_depth)
        return UnitResults(units, details)

    def value(self, units: Sequence[float]) -> Estimate:
        """Share of what is recalled."""
        return mean(units)

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """Difference to the baseline's share, paired by text."""
        return difference(units, baseline)


def recalls_of(
    subject: Subject,
    tasks: Sequence[TaskName],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    prefill: int | None,
    question: Asking,
    text: Path | None,
    wording: Wording,
    seed: int,
) -> list[RecallEvaluation]:
    """One evaluation for each task and length.

    Args:
        subject: its tokenizer makes the items.
        tasks: names in `recall_tasks.TASKS`.
        lengths: tokens of a text.
        depths: where the thing to recall stands; tasks that choose by themselves take as many texts.
        repeats: texts for each depth.
        prefill: tokens that are read densely, at most; None: the whole prompt.
        question: whether the prompt ends before the first question or after it.
        text: prose between the facts; None for a short one of our own.
        wording: how facts are stated.
        seed: of everything that is drawn.

    Raises:
        InputError: a length does not suit the model or the task, or the text is not usable.
    """
    filler = Filler(subject.tokenizer, [DEFAULT_TEXT] if text is None else read_documents(text))
    found = []
    for task in tasks:
        for length in lengths:
            subject.check_length(length, f"A text of --length {length}")
            items = []
            for depth in depths:
                scene = Scene(subject.tokenizer, filler, wording, length, depth)
                for repeat in range(repeats):
                    script = TASKS[task](scene, Random(f"{seed} {task} {length} {depth} {repeat}"))
                    items.append(_item(subject.tokenizer, script, depth, prefill, question))
            longest = max(item.item.num_tokens for item in items)
            if longest > length:
                raise InputError(f"The task {task} does not fit {length} tokens, it needs {longest}; raise --length.")
            settings = {
                "length": length,
                "depths": list(depths),
                "repeats": repeats,
                "prefill": prefill,
                "wording": wording.name,
                "seed": seed,
                # Said where it is not as it was before there was a choice, so that cells measured then stay.
                **({} if question == "decoded" else {"question": question}),
                "items": fingerprint([item.item for item in items]),
            }
            found.append(RecallEvaluation(task, length, question, items, settings))
    return found


def _item(tokenizer: Tokenizer, script: Script, depth: float, prefill: int | None, question: Asking) -> RecallItem:
    """Token ids and places of a text."""

    def place(offset: int) -> int:
        """Number of tokens in front of a character."""
        return len(tokenizer.encode(script.text[:offset]))

    ids = tokenizer.encode(script.text)
    assert script.first_question is not None, "every task asks"
    spans = [(place(answer.start), place(answer.end), place(answer.told)) for answer in script.answers]
    prompt_len = max(1, place(script.first_question) if question == "decoded" else spans[0][0])
    if prefill is not None:
        prompt_len = min(prefill, prompt_len)
    targets = tuple(Target(start - prompt_len, end - prompt_len, start - told) for start, end, told in spans)
    return RecallItem(ScoredItem(ids[:prompt_len], ids[prompt_len:]), targets, depth)


def _classes(pairs: Iterable[tuple[float, float]]) -> list[list[float]]:
    """[class, share right, number] for each class, ascending."""
    groups: dict[float, list[float]] = {}
    for name, right in pairs:
        groups.setdefault(name, []).append(right)
    return [[name, round(mean(groups[name]).value, 6), len(groups[name])] for name in sorted(groups)]

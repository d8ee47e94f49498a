"""Multiple choice by likelihood: the model picks the choice it finds most likely for its length.

The context of a choice is its prompt, which is read densely, as in use; the choice is decoded under the policy. Its
first token comes from the prompt, so that choices of one token say nothing of a policy, and short contexts are read
almost whole: examples in front of the question make them long. `prefill` decodes the end of the prompt under the policy
too, as the published harness does, which runs its attention row by row over everything (ALISA, section 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from alisa.errors import InputError
from alisa.lab.eval.measurement import UnitResults, fingerprint
from alisa.lab.eval.questions import Question, load_questions
from alisa.lab.eval.statistics import Estimate, difference, mean
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.scoring import ScoredItem
from alisa.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerChoice:
    """One choice of one question as the model sees it."""

    question: int
    item: ScoredItem
    num_scored: int
    """Tokens at the end of the item that make up the continuation."""
    num_bytes: int
    """Length of the continuation as text: what its likelihood is divided by."""


@dataclass(frozen=True)
class MultipleChoice:
    """Questions of one set; a unit is 1 for a right answer and 0 for a wrong one."""

    task: str
    choices: Sequence[AnswerChoice]
    """Of all questions, in their order."""
    answers: Sequence[int]
    settings: Mapping[str, object]
    kind = "qa"
    metric = "accuracy"

    @property
    def length(self) -> int:
        """Tokens of the longest question with a choice."""
        return max(choice.item.num_tokens for choice in self.choices)

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Answer every question under one variant."""
        outputs = subject.scorer.score(
            variant.selection_policy(), subject.codec(variant), [choice.item for choice in self.choices]
        )
        scores: list[list[float]] = [[] for _ in self.answers]
        raw: list[list[float]] = [[] for _ in self.answers]
        for choice, output in zip(self.choices, outputs, strict=True):
            likelihood = float(output.log_likelihoods[-choice.num_scored :].double().sum())
            raw[choice.question].append(likelihood)
            scores[choice.question].append(likelihood / choice.num_bytes)
        units = [_is_best(found, answer) for found, answer in zip(scores, self.answers, strict=True)]
        plain = [_is_best(found, answer) for found, answer in zip(raw, self.answers, strict=True)]
        chance = sum(1 / len(found) for found in scores) / len(scores)
        return UnitResults(units, {"accuracy_without_normalisation": mean(plain).value, "chance": chance})

    def value(self, units: Sequence[float]) -> Estimate:
        """Share of right answers."""
        return mean(units)

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """Difference to the baseline's share, paired by question."""
        return difference(units, baseline)


def multiple_choice_of(
    subject: Subject,
    task: str,
    *,
    data: Path | None,
    num_shots: int,
    prefill: int | None,
    limit: int | None,
    seed: int,
) -> MultipleChoice:
    """The evaluation of one set of questions.

    Args:
        subject: its tokenizer makes the items.
        task: name of a set, or a file.
        data: where the named sets are.
        num_shots: solved examples in front of every question, drawn by `seed`.
        prefill: tokens of each prompt that are read densely; None: all.
        limit: questions, spread over the set; None for all.
        seed: of the examples.

    Raises:
        InputError: the questions are not usable, or with their examples too long for the model.
    """
    questions = load_questions(task, data)
    asked = list(range(len(questions.questions)))
    if limit is not None and limit < len(asked):
        asked = [index * len(asked) // limit for index in range(limit)]
    choices: list[AnswerChoice] = []
    for number, index in enumerate(asked):
        question = questions.questions[index]
        pool = [example for example in questions.examples if example != question]
        if num_shots > len(pool):
            raise InputError(f"{task} has {len(pool)} examples to show; ask for at most that many with --shots.")
        shown = Random(f"{seed} {index}").sample(pool, num_shots)
        front = "".join(f"{example.solved}\n\n" for example in shown)
        choices += _choices(subject.tokenizer, number, front, question, prefill)
    longest = max(choice.item.num_tokens for choice in choices)
    subject.check_length(longest, f"A question of {task} with its examples (--shots)")
    settings = {
        "questions": len(asked),
        "shots": num_shots,
        "prefill": prefill,
        "seed": seed,
        "items": fingerprint([choice.item for choice in choices]),
    }
    answers = [questions.questions[index].answer for index in asked]
    return MultipleChoice(questions.name, choices, answers, settings)


def _choices(
    tokenizer: Tokenizer, number: int, front: str, question: Question, prefill: int | None
) -> list[AnswerChoice]:
    choices = []
    for context, continuation in zip(question.contexts, question.continuations, strict=True):
        before, whole = tokenizer.encode(front + context), tokenizer.encode(front + context + continuation)
        num_scored = len(whole) - len(before)
        if num_scored < 1:
            raise InputError(f"A choice of question {number + 1} adds no token to its context: {continuation!r}.")
        prompt_len = len(before) if prefill is None else min(prefill, len(before))
        item = ScoredItem(whole[:prompt_len], whole[prompt_len:])
        choices.append(AnswerChoice(number, item, num_scored, len(continuation.strip().encode())))
    return choices


def _is_best(scores: Sequence[float], answer: int) -> float:
    return float(max(range(len(scores)), key=scores.__getitem__) == answer)

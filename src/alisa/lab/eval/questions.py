r"""Multiple-choice questions, read as their sets are published.

Each set is turned into (context, continuation) pairs, one for each choice, worded as in lm-evaluation-harness (its
tasks `piqa`, `copa`, `openbookqa`, `winogrande`):

    piqa        Question: <goal>\nAnswer:         + <solution>
    openbookqa  <question stem>                  + <choice>
    copa        <premise> because | therefore    + <choice, small first letter>
    winogrande  <sentence up to _> <option>      + <rest of the sentence>: the choices share the continuation

The instruction-wrapped form of LLM-Adapters ("Please choose the correct ...", answers `solution1`, `option2`) is
unwrapped. Any other file has lines with "question" (or "context"), "choices" and "answer" (a number from 0, or the text
of a choice).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alisa.errors import InputError
from alisa.lab.eval.documents import read_records

Record = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Question:
    """Texts to choose from: each choice is a context and its continuation."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    """Each begins with a space."""
    answer: int
    """Index of the right one."""

    @property
    def solved(self) -> str:
        """The question with its right answer: an example in the prompt of another."""
        return self.contexts[self.answer] + self.continuations[self.answer]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions to ask, and others to show as examples."""

    name: str
    questions: tuple[Question, ...]
    examples: tuple[Question, ...]
    """From the training split; the questions themselves where there is none."""


def load_questions(task: str, data: Path | None) -> QuestionSet:
    """The questions of a named set below `data` (`data/piqa/...` or `data` itself), or of a file.

    Raises:
        InputError: the files are missing, or a record in them is not usable.
    """
    if task not in _READERS:
        path = Path(task)
        if not path.is_file():
            names = ", ".join(_READERS)
            raise InputError(f"There is no task or file {task!r}; there is {names}, or give a .jsonl file.")
        questions = _read(path, _plain)
        return QuestionSet(path.stem, questions, questions)
    if data is None:
        raise InputError(f"The questions of {task} are not part of this package; say where they are with --data DIR.")
    folder = data / task if (data / task).is_dir() else data
    asked, shown = (_split(folder, words) for words in (("test", "dev", "valid"), ("train",)))
    if asked is None:
        raise InputError(f"{folder} has no .jsonl or .json file with `test`, `dev` or `valid` in its name.")
    questions = _read(asked, _READERS[task])
    return QuestionSet(task, questions, _read(shown, _READERS[task]) if shown else questions)


def _split(folder: Path, words: Sequence[str]) -> Path | None:
    """The file of the first split that is there."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".jsonl", ".json")) if folder.is_dir() else []
    return next((file for word in words for file in files if word in file.name), None)


def _read(path: Path, reader: Callable[[Record], Question]) -> tuple[Question, ...]:
    questions = []
    for number, record in enumerate(read_records(path), 1):
        try:
            questions.append(reader(record))
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"{path}, record {number}: not a question of this kind ({error}).") from error
    if not questions:
        raise InputError(f"{path} has no questions.")
    return tuple(questions)


def _piqa(record: Record) -> Question:
    if "goal" in record:
        goal, choices = str(record["goal"]), (str(record["sol1"]), str(record["sol2"]))
        answer = _index(record["label"])
    else:
        goal, choices, answer = _unwrapped(record, "question:", "Solution")
    return _one_context(f"Question: {goal}\nAnswer:", choices, answer)


def _openbookqa(record: Record) -> Question:
    stem, choices, answer = _unwrapped(record, "question:", "Answer")
    return _one_context(stem, choices, answer)


def _copa(record: Record) -> Question:
    premise = str(record["premise"]).strip().rstrip(".")
    link = {"cause": "because", "effect": "therefore"}[str(record["question"])]
    choices = tuple(text[0].lower() + text[1:] for text in (str(record["choice1"]), str(record["choice2"])))
    return _one_context(f"{premise} {link}", choices, _index(record["label"]))


def _winogrande(record: Record) -> Question:
    if "sentence" in record:
        sentence, answer = str(record["sentence"]), _index(record["answer"]) - 1
        choices: tuple[str, ...] = (str(record["option1"]), str(record["option2"]))
    else:
        sentence, choices, answer = _unwrapped(record, "sentence:", "Option")
    before, blank, after = sentence.partition("_")
    if not blank:
        raise ValueError("the sentence has no blank")
    contexts = tuple(before + choice for choice in choices)
    return Question(contexts, (f" {after.strip()}",) * len(choices), answer)


def _plain(record: Record) -> Question:
    context = str(record["context"] if "context" in record else record["question"])
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("`choices` is no list of at least two")
    answer = record["answer"]
    return _one_context(context, [str(choice) for choice in choices], _position(answer, choices))


_READERS: dict[str, Callable[[Record], Question]] = {
    "piqa": _piqa,
    "copa": _copa,
    "openbookqa": _openbookqa,
    "winogrande": _winogrande,
}

TASKS = tuple(_READERS)
"""Sets that are known by name."""


def _unwrapped(record: Record, head: str, word: str) -> tuple[str, tuple[str, ...], int]:
    """Question, choices and answer of LLM-Adapters' form: `... <head> <question> <word>1: ... Answer format: ...`."""
    text = str(record["instruction"])
    body = text[text.index(head) + len(head) : text.rindex("Answer format:")]
    parts = re.split(rf"\s*\b{word}(\d):\s*", body)
    question, choices = parts[0].strip(), tuple(part.strip() for part in parts[2::2])
    match = re.fullmatch(rf"{word.lower()}(\d)", str(record["answer"]))
    if match is None or not 1 <= int(match.group(1)) <= len(choices):
        raise ValueError(f"the answer is {record['answer']!r} of {len(choices)} choices")
    return question, choices, int(match.group(1)) - 1


def _one_context(context: str, choices: Sequence[str], answer: int) -> Question:
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    return Question((context,) * len(choices), tuple(f" {choice.strip()}" for choice in choices), answer)


def _index(value: object) -> int:
    """A label that is a number or a digit."""
    return int(str(value))


def _position(answer: object, choices: Sequence[object]) -> int:
    return answer if isinstance(answer, int) else choices.index(answer)

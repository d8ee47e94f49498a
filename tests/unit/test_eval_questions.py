"""Multiple-choice sets as they are published, and how an answer is chosen."""

import json
from math import log

import pytest
import torch

from alisa import LLM
from alisa.errors import InputError
from alisa.lab.eval.multiple_choice import multiple_choice_of
from alisa.lab.eval.questions import Question, load_questions
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.lab.scoring import ScoredOutput
from tests.shared import shared_path


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRAPPED = {
    "piqa": (
        "Please choose the correct solution to the question: Open a jar\n\nSolution1: twist \n\nSolution2: sing it\n\n"
        "Answer format: solution1/solution2",
        "solution2",
        Question(("Question: Open a jar\nAnswer:",) * 2, (" twist", " sing it"), 1),
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Fog is\n\nAnswer1: a marsh Answer2: wet Answer3: dry "
        "Answer4: hot\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer2",
        Question(("Fog is",) * 4, (" a marsh", " wet", " dry", " hot"), 1),
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann met Bo so _ smiled."
        "\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "option1",
        Question(("Ann met Bo so Ann", "Ann met Bo so Bo"), (" smiled.",) * 2, 0),
    ),
}


@pytest.mark.parametrize("task", WRAPPED)
def test_wrapped_questions_are_unwrapped(task, tmp_path):
    instruction, answer, expected = WRAPPED[task]
    write(tmp_path / task / "test.jsonl", [{"instruction": instruction, "input": "", "answer": answer}])
    assert load_questions(task, tmp_path).questions == (expected,)


def test_copa_joins_premise_and_choice(tmp_path):
    row = {"premise": "It rained.", "choice1": "The road is wet.", "choice2": "Yes.", "question": "effect", "label": 0}
    write(tmp_path / "copa" / "test.jsonl", [row])
    write(tmp_path / "copa" / "train.jsonl", [{**row, "question": "cause", "label": 1}])
    found = load_questions("copa", tmp_path)
    assert found.questions[0] == Question(("It rained therefore",) * 2, (" the road is wet.", " yes."), 0)
    assert found.examples[0].solved == "It rained because yes."


def test_any_file_with_choices_is_a_task(tmp_path):
    path = tmp_path / "mine.jsonl"
    write(path, [{"question": "1 + 1 =", "choices": ["2", "3"], "answer": "3"}])
    assert load_questions(str(path), None).questions[0].answer == 1
    write(path, [{"question": "1 + 1 =", "choices": ["2", "3"], "answer": 2}])
    with pytest.raises(InputError, match="record 1: not a question of this kind"):
        load_questions(str(path), None)
    with pytest.raises(InputError, match="no task or file 'none'; there is piqa"):
        load_questions("none", None)
    with pytest.raises(InputError, match="--data DIR"):
        load_questions("piqa", None)


@pytest.mark.parametrize(
    ("task", "count", "num_choices"),
    [("piqa", 1838, 2), ("copa", 100, 2), ("openbookqa", 500, 4), ("winogrande", 1267, 2)],
)
def test_published_sets_are_read_whole(task, count, num_choices):
    found = load_questions(task, shared_path("data"))
    assert len(found.questions) == count
    assert {len(question.continuations) for question in found.questions} == {num_choices}
    shares = [sum(q.answer == index for q in found.questions) / count for index in range(num_choices)]
    assert max(shares) < 1.3 / num_choices  # no answer is right much more often than by chance


@pytest.fixture(scope="module")
def subject():
    return Subject.of(LLM(dtype="float32"))


def ask(subject, tmp_path, rows, **options):
    path = tmp_path / "rows.jsonl"
    write(path, rows)
    settings = {"data": None, "num_shots": 0, "prefill": 4, "limit": None, "seed": 0} | options
    return multiple_choice_of(subject, str(path), **settings)


ROWS = [
    {"question": "The word for hand is money. The word for hand is", "choices": ["sea", "money"], "answer": 1},
    {"question": "The word for door is sea. The word for door is", "choices": ["sea", "money"], "answer": 0},
    {"question": "The word for fire is sun. The word for fire is", "choices": ["sea", "money", "sun"], "answer": 0},
]


def test_the_likeliest_choice_wins(subject, tmp_path):
    measured = ask(subject, tmp_path, ROWS).measure(subject, BASELINE)
    assert measured.units == [1.0, 1.0, 0.0]
    assert measured.details["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_likelihoods_are_divided_by_the_bytes_of_the_choice(subject, tmp_path, monkeypatch):
    rows = [{"question": "A", "choices": ["sea", "sea and money"], "answer": 1}]
    asked = ask(subject, tmp_path, rows)
    sizes = [choice.num_scored for choice in asked.choices]
    totals = (log(0.5), log(0.3))  # the longer one is less likely, but not for its length

    def score(self, policy, codec, items):
        # what precedes the choice counts for nothing
        return [
            ScoredOutput(torch.tensor([-9.0] * (len(item.output_ids) - size) + [total / size] * size), torch.ones(1), 0)
            for item, size, total in zip(items, sizes, totals, strict=True)
        ]

    monkeypatch.setattr(type(subject.scorer), "score", score)
    measured = asked.measure(subject, BASELINE)
    assert measured.units == [1.0]
    assert measured.details["accuracy_without_normalisation"] == 0.0


def test_examples_stand_in_front_and_never_give_the_question_away(subject, tmp_path):
    plain, shown = (ask(subject, tmp_path, ROWS, num_shots=shots) for shots in (0, 2))
    texts = [subject.tokenizer.decode([*c.item.prompt_ids, *c.item.output_ids]) for c in shown.choices]
    assert all(text.count("\n\n") == 2 for text in texts)
    fire = [text for text in texts if "fire" in text.split("\n\n")[-1]]
    assert len(fire) == 3
    assert not any("fire" in example for text in fire for example in text.split("\n\n")[:-1])
    assert [c.num_scored for c in shown.choices] == [c.num_scored for c in plain.choices]
    assert {len(c.item.prompt_ids) for c in shown.choices} == {4}
    with pytest.raises(InputError, match="2 examples to show"):
        ask(subject, tmp_path, ROWS, num_shots=3)


def test_limit_takes_questions_from_all_over_the_set(subject, tmp_path):
    assert [choice.question for choice in ask(subject, tmp_path, ROWS * 4, limit=3).choices] == [0, 0, 1, 1, 2, 2, 2]
    assert Variant("swa", 0.5, "auto") != BASELINE


def test_a_context_is_a_prompt_and_its_choice_is_decoded(subject, tmp_path):
    whole = ask(subject, tmp_path, ROWS, prefill=None, num_shots=1)
    short = ask(subject, tmp_path, ROWS, num_shots=1)
    assert [len(choice.item.output_ids) for choice in whole.choices] == [choice.num_scored for choice in whole.choices]
    for one, other in zip(whole.choices, short.choices, strict=True):
        assert one.item.num_tokens == other.item.num_tokens
    # Dense attention does not care where a prompt ends.
    assert whole.measure(subject, BASELINE).units == short.measure(subject, BASELINE).units

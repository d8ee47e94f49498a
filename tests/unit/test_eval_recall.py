"""RecallEvaluation tasks: what the texts say, where the answers are, and that forgetting shows."""

import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from alisa import LLM
from alisa.errors import InputError
from alisa.lab.eval.filler import DEFAULT_TEXT, Filler
from alisa.lab.eval.recall import recalls_of
from alisa.lab.eval.recall_tasks import TASKS, Scene
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.lab.eval.wording import NUMBERS, WORDS, choose_wording


@pytest.fixture(scope="module")
def subject():
    return Subject.of(LLM(dtype="float32"))


@pytest.fixture(scope="module")
def filler(subject):
    return Filler(subject.tokenizer, [DEFAULT_TEXT])


def make(subject, tasks=("needle",), wording=WORDS, **options):
    settings = {"lengths": [200], "depths": [0.0, 0.5, 1.0], "repeats": 2, "prefill": None, "text": None, "seed": 0}
    settings["question"] = "decoded"
    return recalls_of(subject, tasks, wording=wording, **settings | options)


@pytest.mark.parametrize("wording", [WORDS, NUMBERS])
@pytest.mark.parametrize("task", TASKS)
def test_every_answer_was_told_before(task, wording, subject, filler):
    for seed in range(5):
        script = TASKS[task](Scene(subject.tokenizer, filler, wording, 500, 0.3), Random(seed))
        assert len(subject.tokenizer.encode(script.text)) <= 500
        for answer in script.answers:
            told = script.text[answer.start : answer.end]
            assert told.startswith(" ")
            assert script.text[answer.told :].startswith(told)
            assert answer.told < script.first_question < answer.start


def test_a_needle_stands_at_its_depth(subject, filler):
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        script = TASKS["needle"](Scene(subject.tokenizer, filler, WORDS, 400, depth), Random(1))
        places.append(script.answers[0].told / script.first_question)
    assert places == sorted(places)
    assert places[0] < 0.1
    assert places[2] == pytest.approx(0.5, abs=0.1)
    assert places[4] > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_tokens_of_the_answers(task, subject):
    [recall] = make(subject, [task], lengths=[500])
    for item in recall.items:
        ids = [*item.item.prompt_ids, *item.item.output_ids]
        for target in item.targets:
            start = len(item.item.prompt_ids) + target.start
            size = target.end - target.start
            answer = ids[start : start + size]
            assert ids[start - target.distance :][:size] == answer
        question = subject.tokenizer.decode(item.item.output_ids)
        heads = {"copy": " The second reading:", "common": "\n The word repeated", "paragraphs": "Question: "}
        assert question.startswith(heads.get(task, " What is the word for"))


def test_prefill_says_how_much_is_read_densely(subject):
    [short], [whole] = (make(subject, prefill=prefill) for prefill in (50, 5000))
    assert {len(item.item.prompt_ids) for item in short.items} == {50}
    assert [item.item for item in whole.items] == [item.item for item in make(subject)[0].items]
    distances = [[target.distance for target in item.targets] for item in short.items]
    assert distances == [[target.distance for target in item.targets] for item in whole.items]


@pytest.mark.parametrize("task", TASKS)
def test_a_question_in_the_prompt_leaves_its_answer_to_be_decoded(task, subject):
    [after], [within] = (make(subject, [task], lengths=[500], question=question) for question in ("decoded", "prompt"))
    assert (after.task, within.task) == (f"{task} 500", f"{task} 500 asked")
    assert "question" not in after.settings  # cells of before there was a choice stay
    for old, new in zip(after.items, within.items, strict=True):
        moved = len(new.item.prompt_ids) - len(old.item.prompt_ids)
        assert moved > 0
        assert new.targets[0].start == 0
        assert [*new.item.prompt_ids, *new.item.output_ids] == [*old.item.prompt_ids, *old.item.output_ids]
        assert [target.start + moved for target in new.targets] == [target.start for target in old.targets]
        assert [target.distance for target in new.targets] == [target.distance for target in old.targets]


def test_variables_are_followed_from_the_end_of_a_chain(subject, filler):
    script = TASKS["variables"](Scene(subject.tokenizer, filler, NUMBERS, 400, 0.0), Random(3))
    facts = {}
    for key, value in re.findall(r"(\w+) (?:leads to|is) (\w+)\.", script.text[: script.first_question]):
        facts.setdefault(key, value)
    answers = [script.text[answer.start + 1 : answer.end] for answer in script.answers]
    assert len(answers) == 6
    for chain in (answers[:3], answers[3:]):
        assert [facts[chain[0]], facts[chain[1]]] == chain[1:]
        assert chain[-1].isdigit()
        told = [answer.told for answer in script.answers][:3]
        assert told == sorted(told, reverse=True)


def test_the_common_word_is_twenty_times_as_common_as_any_other(subject, filler):
    script = TASKS["common"](Scene(subject.tokenizer, filler, WORDS, 800, 0.0), Random(3))
    *examples, asked = script.text[: script.first_question].split(" A list of words:")[1:]
    assert len(examples) == 4
    counts = Counter(asked.replace(",", "").split())
    [answer] = script.answers
    (word, most), (_, second) = counts.most_common(2)
    assert word == script.text[answer.start + 1 : answer.end]
    assert most == 20 * second
    assert min(counts.values()) == second


def test_paragraphs_say_what_is_asked_of_them(subject, filler):
    script = TASKS["paragraphs"](Scene(subject.tokenizer, filler, NUMBERS, 600, 0.0), Random(3))
    questions = re.findall(r"Question: .*? Answer: (.*)\.\n", script.text)
    assert len(questions) == len(script.answers) == 4
    told = script.text[: script.first_question]
    for sentence in questions:
        name = " ".join(sentence.split()[:2])
        [paragraph] = [text for text in told.split("\n\n") if text.startswith(name)]
        assert sentence.removeprefix(name) in paragraph


def test_the_model_recalls_densely_and_a_window_forgets(subject):
    recalls = make(subject, ["needle", "lookup", "copy"], lengths=[400], repeats=3)
    for recall in recalls:
        dense = recall.measure(subject, BASELINE)
        local = recall.measure(subject, Variant("local", 0.8, "auto"))
        assert recall.value(dense.units).value > 0.9
        assert recall.versus(local.units, dense.units).value < -0.3
    needle, window = (
        recalls[0].measure(subject, v).details["by_depth"] for v in (BASELINE, Variant("local", 0.8, "auto"))
    )
    assert needle == [[0.0, 1.0, 3], [0.5, 1.0, 3], [1.0, 1.0, 3]]
    assert window[0][1] < window[-1][1]


def test_an_answer_of_several_tokens_counts_when_all_are_right(subject):
    [recall] = make(subject, wording=NUMBERS)
    assert all(target.end - target.start > 1 for item in recall.items for target in item.targets)
    assert set(recall.measure(subject, BASELINE).units) <= {0.0, 1.0}


def test_impossible_lengths_are_refused(subject):
    with pytest.raises(InputError, match="has 3000 tokens and embedded has 2048 positions"):
        make(subject, lengths=[3000])
    with pytest.raises(InputError, match="lookup does not fit 24 tokens"):
        make(subject, ["lookup"], lengths=[24])


def test_wording_suits_the_model():
    assert choose_wording("auto", "embedded") is WORDS
    assert choose_wording("auto", "facebook/opt-125m") is NUMBERS
    assert choose_wording("numbers", "embedded") is NUMBERS


def test_words_are_those_the_model_was_trained_on(subject):
    """The generator of the training project and this one say the same things."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
    try:
        import recall as training
    finally:
        sys.path.pop(0)
    tokenizer = subject.tokenizer
    vocabulary = training.make_vocabulary(tokenizer._backend)
    lead = len(tokenizer.encode(""))
    for words, ids in ((WORDS.keys, vocabulary.keys), (WORDS.values, vocabulary.values)):
        assert sorted(tokenizer.encode(f" {word}")[lead] for word in words) == sorted(ids.tolist())
    statement = tokenizer.encode(WORDS.statement.format(key="hand", value="moon"))[lead:]
    [hand], [moon] = (tokenizer.encode(f" {word}")[lead:] for word in ("hand", "money"))
    statement = tokenizer.encode(WORDS.statement.format(key="hand", value="money"))[lead:]
    assert statement == [*vocabulary.statement[0], hand, *vocabulary.statement[1], moon, vocabulary.stop]
    question = tokenizer.encode(WORDS.question.format(key="hand"))[lead:]
    assert question == [*vocabulary.question[0], hand, *vocabulary.question[1]]

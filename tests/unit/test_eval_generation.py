"""Long generation: what is counted, and that a policy writes what the engine writes under it."""

import pytest

from alisa import LLM, SamplingParams
from alisa.errors import InputError
from alisa.lab.eval.filler import DEFAULT_TEXT
from alisa.lab.eval.generation import generation_of, repeated_share
from alisa.lab.eval.subject import BASELINE, Subject, Variant


@pytest.fixture(scope="module")
def subject():
    return Subject.of(LLM(dtype="float32"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(DEFAULT_TEXT * 2)
    return path


def make(subject, text, **options):
    settings = {"prompt_len": 60, "max_tokens": 20, "num_texts": 3, "temperature": 0.0, "seed": 0}
    return generation_of(subject, text, **settings | options)


def test_a_sequence_of_four_counts_when_it_occurred_before():
    assert repeated_share([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated_share([1, 2, 1, 2, 1, 2, 1]) == 0.5
    assert repeated_share([9] * 13) == 0.9
    assert repeated_share([1, 2, 3]) == 0


def test_texts_are_those_of_generate_under_the_policy(subject, text):
    evaluation = make(subject, text)
    for variant in (BASELINE, Variant("local", 0.9, "auto")):
        found = evaluation.measure(subject, variant)
        llm = LLM(dtype="float32", policy=variant.policy, sparsity=variant.sparsity)
        outputs = llm.generate(list(evaluation.prompts), SamplingParams(max_tokens=20))
        assert found.units == [repeated_share(output.token_ids) for output in outputs]
        assert found.details["lengths"] == [len(output.token_ids) for output in outputs]


def test_dense_attention_finds_its_own_greedy_text_likeliest(subject, text):
    evaluation = make(subject, text)
    dense, local = (
        evaluation.measure(subject, variant).details["dense_nats"]
        for variant in (BASELINE, Variant("local", 0.95, "auto"))
    )
    assert sum(dense) < sum(local)


def test_seeds_and_temperature_decide_the_texts(subject, text):
    first, again, other = (make(subject, text, temperature=1.5, seed=seed) for seed in (3, 3, 4))
    assert first.settings == again.settings != other.settings
    drawn = [evaluation.measure(subject, BASELINE).details["dense_nats"] for evaluation in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_written_is_refused(subject, text):
    with pytest.raises(InputError, match="--prompt is 0"):
        make(subject, text, prompt_len=0)
    with pytest.raises(InputError, match="has 3060 tokens and embedded has 2048 positions"):
        make(subject, text, max_tokens=3000)

"""Several texts for one prompt."""

from __future__ import annotations

import asyncio

import pytest

from alisa import LLM, SamplingParams
from alisa.engine.async_engine import AsyncEngine
from alisa.engine.builder import build_engine
from alisa.errors import InputError

PROMPTS = ["The ship had been at sea for", "My uncle had a library of"]
RULES = {"max_tokens": 12, "temperature": 1.0, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", max_num_seqs=3, max_model_len=64) as llm:
        yield llm


def test_each_prompt_gets_its_texts_one_after_the_other(llm):
    outputs = llm.generate(PROMPTS, SamplingParams(n=3, **RULES))
    assert [(output.index, output.sample) for output in outputs] == [(i, j) for i in (0, 1) for j in (0, 1, 2)]
    assert [output.prompt for output in outputs] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({output.token_ids for output in outputs}) == 6
    assert outputs.report.summary.num_requests == 6


def test_more_texts_change_none_of_those_that_are_there(llm):
    one, two, three = (llm.generate(PROMPTS, SamplingParams(n=n, **RULES)) for n in (1, 2, 3))
    texts = {(output.index, output.sample): output.token_ids for output in three}
    for output in (*one, *two):
        assert output.token_ids == texts[output.index, output.sample]


def test_samples_of_equal_prompts_all_differ(llm):
    outputs = llm.generate([PROMPTS[0]] * 3, SamplingParams(n=3, **RULES))
    assert len({output.token_ids for output in outputs}) == 9


def test_a_stream_says_which_text_grows(llm):
    with llm.stream(PROMPTS[0], SamplingParams(n=2, **RULES)) as stream:
        events = list(stream)
    for sample in (0, 1):
        mine = [event for event in events if event.sample == sample]
        assert mine[-1].text == "".join(event.text for event in mine[:-1])


def test_a_request_of_the_engine_is_one_text(llm):
    engine, _ = build_engine(llm._model, llm.config)

    async def ask():
        async with AsyncEngine(engine) as running:
            await running.add_request(PROMPTS[0], SamplingParams(n=2, **RULES))

    with pytest.raises(InputError, match="A request is one text, and n is 2"):
        asyncio.run(ask())


def test_no_text_at_all_is_refused():
    with pytest.raises(InputError, match="n is 0, at least 1 is needed"):
        SamplingParams(n=0)

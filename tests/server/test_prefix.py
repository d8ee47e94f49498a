"""Calls that begin alike: the same texts, read once, and never shared between tenants."""

from dataclasses import replace

import httpx2
import pytest

from alisa import LLM, SamplingParams
from tests.server.conftest import ENGINE, running

SYSTEM = [5, 9, 2, 7, 11, 30, 8, 40] * 16


@pytest.fixture(scope="module")
def address():
    with running(replace(ENGINE, prefix_cache=True)) as server:
        yield server.address


def ask(address, prompt, **body):
    reply = httpx2.post(f"{address}/v1/completions", json={"prompt": prompt, "max_tokens": 8, **body}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def cached(body):
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_that_is_known_is_said_and_gives_the_same_text(address):
    prompts = [[*SYSTEM, number] for number in (3, 4, 5)]
    rules = {"temperature": 1.0, "seed": 3}
    with LLM(config=ENGINE) as llm:
        expected = [llm.generate([prompt], SamplingParams(max_tokens=8, **rules))[0].text for prompt in prompts]
    bodies = [ask(address, prompt, **rules) for prompt in prompts]
    assert [body["choices"][0]["text"] for body in bodies] == expected
    assert [cached(body) for body in bodies] == [0, 128, 128]


def test_tenants_share_nothing(address):
    prompt = [*SYSTEM[::-1], 3]
    assert [cached(ask(address, prompt, cache_salt=salt)) for salt in ("a", "b", "a", "", "b")] == [0, 0, 128, 0, 128]


def test_who_wants_the_prompt_scored_has_it_read(address):
    prompt = [*SYSTEM, 9]
    first = ask(address, prompt, echo=True, logprobs=1, temperature=0)
    again = ask(address, prompt, echo=True, logprobs=1, temperature=0)
    assert cached(again) == 0
    assert again["choices"][0]["logprobs"] == first["choices"][0]["logprobs"]
    assert len(first["choices"][0]["logprobs"]["tokens"]) == len(prompt) + 8


def test_the_metrics_count_it(address):
    ask(address, [*SYSTEM, 12])
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(("vllm", "alisa"))}
    assert 128 <= values["vllm:prefix_cache_hits_total"] < values["vllm:prefix_cache_queries_total"]
    assert values["alisa:prefix_cache_bytes"] > 0

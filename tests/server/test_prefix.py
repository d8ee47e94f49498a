"""Calls that begin alike: the same texts, read once, and never shared between tenants."""

import shutil
import time
from dataclasses import replace

import httpx2
import pytest

from alisa import LLM, SamplingParams
from alisa.server.config import ServerConfig
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


def metric(address, name):
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_the_next_turn_of_a_chat_reads_only_what_is_new(chat_model, tmp_path):
    model = shutil.copytree(chat_model, tmp_path / "talker")
    # As real ones do, it writes an answer as the model has said it.
    (model / "chat_template.jinja").write_text(
        "{%- for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
        "{%- if add_generation_prompt %}assistant:{% endif %}"
    )
    engine = replace(ENGINE, model=str(model), prefix_cache=True)
    messages = [{"role": "user", "content": "It was a dark and stormy night, and the ship had been at sea for"}]

    def turn(address):
        body = {"messages": messages, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        reply = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        messages.append(reply["choices"][0]["message"])
        messages.append({"role": "user", "content": "And then?"})
        return reply["usage"]

    with running(engine) as server, LLM(config=engine) as llm:
        first = turn(server.address)
        deadline = time.monotonic() + 60
        while metric(server.address, "alisa:answer_tokens_read_total") < 48 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert httpx2.get(f"{server.address}/state").json()["status"]["requests"] == []
        prompt = llm.chat_prompt(messages)
        second = turn(server.address)
        # The text of the answer may have other tokens than it was said in, from some place on.
        assert cached({"usage": second}) > first["prompt_tokens"] + 16
        rules = SamplingParams(max_tokens=60, ignore_eos=True)
        assert messages[-2]["content"] == llm.generate([prompt], rules)[0].text


def test_no_answer_is_read_where_that_is_turned_off(chat_model):
    engine = replace(ENGINE, model=str(chat_model), prefix_cache=True)
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 40, "ignore_eos": True}
    with running(engine, ServerConfig(port=0, read_answers=False)) as server:
        httpx2.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
        time.sleep(0.3)
        assert metric(server.address, "alisa:answer_tokens_read_total") == 0

"""Completions, as the official client asks for them: the same texts as `LLM.generate`."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import openai
import pytest

from alisa import LLM, SamplingParams
from alisa.config import EngineConfig
from alisa.server.errors import ApiError
from alisa.server.params import completion_params
from alisa.server.protocol import CompletionRequest
from tests.server.conftest import ENGINE

PROMPTS = ["The ship had been at sea for", "My uncle had a library of"]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(address, path="/v1/completions", **body):
    return httpx2.post(address + path, json=body, timeout=60)


def test_a_text_is_that_of_the_library(client, llm):
    [expected] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12))
    reply = client.completions.create(model="embedded", prompt=PROMPTS[0], max_tokens=12, temperature=0)
    assert reply.choices[0].text == expected.text
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == len(expected.prompt_ids)
    assert reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_and_samples_are_those_of_the_library_in_its_order(client, llm):
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=7, n=3)
    expected = llm.generate(PROMPTS, params)
    for prompt in (PROMPTS, [list(output.prompt_ids) for output in expected[::3]]):
        reply = client.completions.create(
            model="embedded", prompt=prompt, max_tokens=8, temperature=0.9, top_p=0.9, seed=7, n=3
        )
        assert [choice.index for choice in reply.choices] == [*range(6)]
        assert [choice.text for choice in reply.choices] == [output.text for output in expected]


def test_a_stream_is_the_same_text(client, llm):
    params = SamplingParams(max_tokens=10, temperature=1, seed=3, n=2)
    expected = llm.generate(PROMPTS, params)
    texts, reasons, usage = ["", "", "", ""], {}, None
    stream = client.completions.create(
        model="embedded",
        prompt=PROMPTS,
        max_tokens=10,
        temperature=1,
        seed=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        assert usage is None, "usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [output.text for output in expected]
    assert reasons == dict.fromkeys(range(4), "length")
    assert usage.completion_tokens == 40


def test_many_at_once_get_what_each_would_get_alone(address, llm):
    prompts = [f"{PROMPTS[i % 2]} {i}" for i in range(12)]
    params = [SamplingParams(max_tokens=4 + i, temperature=1, seed=100 + i) for i in range(12)]
    expected = [llm.generate(prompt, rules)[0].text for prompt, rules in zip(prompts, params, strict=True)]

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt, rules):
                stream = await client.completions.create(
                    model="embedded",
                    prompt=prompt,
                    max_tokens=rules.max_tokens,
                    temperature=1,
                    seed=rules.seed,
                    stream=True,
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts, params))

    assert asyncio.run(run()) == expected


def test_log_probabilities_of_an_echoed_prompt_and_its_text(client, llm):
    [expected] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=2))
    reply = client.completions.create(
        model="embedded", prompt=PROMPTS[0], max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    choice = reply.choices[0]
    assert choice.text == PROMPTS[0] + expected.text
    found = choice.logprobs
    everything = [*expected.prompt_logprobs, *expected.logprobs]
    assert found.token_logprobs == [None, *(token.logprob for token in everything)]
    assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs) == len(expected.prompt_ids) + 3
    assert found.top_logprobs[0] is None
    for token, value, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[token] >= value
        assert 2 <= len(top) <= 3
    # as lm-eval decides whether a text is the greedy one
    assert all(found.token_logprobs[-n] == max(found.top_logprobs[-n].values()) for n in (1, 2, 3))


def test_a_prompt_alone_is_scored(address):
    choice = ask(address, prompt=PROMPTS[0], max_tokens=0, logprobs=1, echo=True).json()["choices"][0]
    assert choice["text"] == PROMPTS[0]
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    assert choice["finish_reason"] == "length"
    assert "".join(choice["logprobs"]["tokens"][1:]).strip() == PROMPTS[0]


def test_the_events_of_a_stream_byte_by_byte(address):
    reply = ask(address, prompt=[5, 6, 7], max_tokens=2, temperature=0, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    events = reply.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-2])
    assert len({(body["id"], body["created"], body["model"]) for body in bodies}) == 1
    assert [body["choices"][0]["finish_reason"] for body in bodies] == [None, None, "length"]
    assert bodies[-1]["choices"][0]["text"] == ""
    assert all("usage" not in body for body in bodies)


def test_usage_of_a_stream_on_every_event(address):
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = ask(address, prompt="a", max_tokens=3, stream=True, stream_options=options).text.splitlines()
    bodies = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [1, 2, 3, 3, 3]
    assert bodies[-1]["choices"] == []


def test_vllm_extras(address, llm):
    [free] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12))
    body = ask(
        address,
        prompt=PROMPTS[0],
        max_tokens=12,
        temperature=0,
        stop_token_ids=[free.token_ids[5]],
        return_token_ids=True,
        prompt_logprobs=0,
        min_tokens=2,
        ignore_eos=True,
        priority=-3,
        cache_salt="me",
        user="nobody",
        unknown_field=1,
        stream_options=None,
        stop=None,
        seed=None,
    ).json()
    choice = body["choices"][0]
    assert choice["token_ids"] == list(free.token_ids[:6])
    assert choice["prompt_token_ids"] == list(free.prompt_ids)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", free.token_ids[5])
    assert choice["prompt_logprobs"][0] is None
    assert list(choice["prompt_logprobs"][1]) == [str(free.prompt_ids[1])]


def test_a_prompt_is_cut_to_its_last_tokens(address, llm):
    [free] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    body = ask(address, prompt=PROMPTS[0], max_tokens=1, truncate_prompt_tokens=3, return_token_ids=True).json()
    assert body["choices"][0]["prompt_token_ids"] == list(free.prompt_ids[-3:])
    assert body["usage"]["prompt_tokens"] == 3
    long = ask(address, prompt=[5] * 1000, max_tokens=1, truncate_prompt_tokens=-1).json()
    assert long["usage"]["prompt_tokens"] == 255


def test_a_text_follows_a_form(address):
    pytest.importorskip("llguidance", reason="llguidance is not installed; pip install 'alisa[grammar]'")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    forms = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"guided_json": json.dumps(schema)},
    ]
    for form in forms:
        text = ask(address, prompt=PROMPTS[0], max_tokens=60, seed=1, **form).json()["choices"][0]["text"]
        assert 0 <= json.loads(text)["age"] <= 99
    for form in ({"guided_regex": "[0-9]{3}"}, {"response_format": {"type": "regex", "regex": "[0-9]{3}"}}):
        text = ask(address, prompt=PROMPTS[0], max_tokens=60, **form).json()["choices"][0]["text"]
        assert len(text) == 3
        assert text.isdigit()


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "There is no model 'gpt-4' here; there is 'embedded'"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"prompt": []}, 400, "prompt", "empty list"),
        ({"prompt": [5, 99999]}, 400, "prompt", "token id 99999; the model knows 0 to 2047"),
        ({"prompt": [[5, 6], [99999]]}, 400, "prompt", "token id 99999"),
        ({"prompt": [5] * 300}, 400, "prompt", "has 300 tokens; the model has 256 positions"),
        ({"prompt": ["a"] * 65}, 400, "prompt", "a list of 65; this server takes 64"),
        ({"prompt": ["a"] * 30, "n": 3}, 400, "n", "90 texts"),
        ({"prompt": None}, 400, "prompt", "prompt"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": "2"}, 400, "n", "valid integer"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "in place of a token id"),
        ({"logit_bias": {"99999": 1}}, 400, None, "logit_bias has token id 99999"),
        ({"stop": [""]}, 400, "stop", "stop: "),
        ({"policy": "dense"}, 400, "policy", "runs with 'sketch' for all calls; leave it out, or ask for a sparsity"),
        ({"min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "allowed is 0 to max_tokens"),
        ({"guided_regex": "("}, 400, None, "regex cannot be used"),
        ({"guided_regex": "a", "guided_json": "{}"}, 400, "response_format", "More than one form"),
        ({"structured_outputs": {"choice": ["a"]}}, 400, "choice", "not supported"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "not which"),
        ({"stream": True, "echo": True, "logprobs": 1}, 400, "stream", "not streamed"),
        ({"stream": True, "prompt": [99999]}, 400, "prompt", "token id 99999"),
        ({"skip_special_tokens": False}, 400, "skip_special_tokens", "Special tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(address, changes, status, param, words):
    reply = ask(address, **{"prompt": "a", "max_tokens": 4, **changes})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b'{"prompt": "a", "n": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "temperature": Infinity}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b"[" * 100000, 400),
        (b'{"prompt": ' + b"[" * 50000 + b"]" * 50000 + b"}", 400),
        (b"[1]", 400),
        (b"", 400),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413),
    ],
)
def test_bodies_that_are_no_calls(address, data, status):
    reply = httpx2.post(f"{address}/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_must_say_that_it_is_json(address):
    reply = httpx2.post(f"{address}/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415


def test_a_message_never_quotes_a_prompt(address):
    for body in ({"prompt": {"secret": 1}}, {"prompt": "secret", "n": "secret"}, {"prompt": ["secret", 1]}):
        assert "secret" not in ask(address, **body).text


def test_the_client_raises_what_the_server_says(client):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="256 positions"):
        client.completions.create(model="embedded", prompt=[5] * 400)


def test_facts(address, client, llm):
    [card] = client.models.list().data
    assert (card.id, card.root, card.owned_by) == ("embedded", "embedded", "alisa")
    assert client.models.retrieve("embedded").max_model_len == 256
    assert httpx2.get(f"{address}/v1/models/other").status_code == 404
    assert httpx2.get(f"{address}/health").status_code == 200
    assert httpx2.get(f"{address}/ready").json() == {"ready": True}
    assert set(httpx2.get(f"{address}/version").json()) == {"version"}
    assert httpx2.get(f"{address}/nowhere").json()["error"]["message"] == "Not Found."
    assert httpx2.get(f"{address}/v1/completions").status_code == 405
    info = httpx2.get(f"{address}/tokenizer_info").json()
    assert info["vocab_size"] == llm.tokenizer.vocab_size


def test_tokens_and_back(address, llm):
    text = "The ship — né — 海"
    body = ask(address, "/tokenize", prompt=text, return_token_strs=True).json()
    assert body["tokens"] == llm.tokenizer.encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    plain = ask(address, "/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert body["tokens"][-len(plain) :] == plain
    assert ask(address, "/detokenize", tokens=plain).json() == {"prompt": text}
    assert ask(address, "/detokenize", tokens=[99999]).status_code == 400
    assert ask(address, "/tokenize").status_code == 400


def test_metrics_count_and_return_to_zero(address):
    def read():
        lines = [line for line in httpx2.get(f"{address}/metrics").text.splitlines() if line[0] != "#"]
        return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "bucket" not in line}

    before = read()
    ask(address, prompt=[5, 6, 7, 8], max_tokens=5, ignore_eos=True)
    after = read()
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == 4
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 5
    counted = "vllm:inter_token_latency_seconds_count"
    assert after[counted] - before[counted] == 4
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert after[name] == 0
    assert all(math.isfinite(value) for value in after.values())


def test_seeds_may_be_negative(address, llm):
    rules = SamplingParams(max_tokens=6, temperature=1, seed=2**64 - 5)
    [expected] = llm.generate(PROMPTS[0], replace(rules))
    body = ask(address, prompt=PROMPTS[0], max_tokens=6, temperature=1, seed=-5).json()
    assert body["choices"][0]["text"] == expected.text


def test_calls_that_read_less_run_beside_the_others(address):
    prompt = list(range(3, 120))
    rules = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = {}
    for sparsity, coverage in ((0.8, None), (0.95, None), (0.8, 0.5)):
        with LLM(config=replace(ENGINE, sparsity=sparsity, coverage=coverage)) as llm:
            expected[sparsity, coverage] = llm.generate([prompt], rules)[0].text

    def text(asked):
        reading = {
            name: value for name, value in zip(("sparsity", "coverage"), asked, strict=True) if value is not None
        }
        reply = ask(address, prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True, **reading)
        return reply.json()["choices"][0]["text"]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(text, [*expected, *expected]))
    assert found == [*expected.values(), *expected.values()]


@pytest.mark.parametrize(
    ("asked", "param"),
    [({"sparsity": 0.5}, "sparsity"), ({"coverage": 0.0}, "coverage"), ({"policy": "swa", "sparsity": 0.9}, "policy")],
)
def test_what_the_engine_cannot_read_is_refused(address, asked, param):
    reply = ask(address, prompt="a", **asked)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_a_way_out_is_only_told_where_there_is_one():
    """With swa all calls are read alike."""
    call = CompletionRequest(prompt="a", policy="sketch")
    with pytest.raises(ApiError, match="for all calls; leave it out, or start a server with another --policy"):
        completion_params(call, {}, EngineConfig(policy="swa"))

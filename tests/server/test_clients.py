"""Calls as other programs send them, field by field: what they want of the reply is there."""

import json
from dataclasses import replace

import httpx2
import pytest

from tests.server.conftest import ENGINE, running

PROMPT = "The ship had been at sea for"


@pytest.fixture(scope="module")
def chat_address(chat_model):
    """A server whose model has a chat template, which knows tools."""
    with running(replace(ENGINE, model=str(chat_model))) as server:
        yield server.address


def post(address, body, path="/v1/completions"):
    return httpx2.post(address + path, json=body, timeout=60, headers={"x-request-id": "bench-1"})


def events(reply):
    assert reply.status_code == 200
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_vllm_bench_serve_on_completions(address):
    body = {
        "model": "embedded",
        "prompt": PROMPT,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    found = events(post(address, body))
    # each event with choices is a token's time, the last one aside
    assert len([event for event in found if event["choices"]]) == 12 + 1
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 12
    card = httpx2.get(f"{address}/v1/models").json()["data"][0]
    assert card["id"]
    assert card["root"]


def test_vllm_bench_serve_on_chat_completions(chat_address):
    body = {
        "model": "talker",
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    found = events(post(chat_address, body, "/v1/chat/completions"))
    assert len([event for event in found if event["choices"]]) == 12 + 1
    assert "content" in found[0]["choices"][0]["delta"]  # none has the role alone
    assert found[-1]["usage"]["completion_tokens"] == 12


def test_guidellm_on_completions(address):
    body = {
        "model": "embedded",
        "prompt": PROMPT,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 8,
        "stop": None,
        "ignore_eos": True,
    }
    found = events(post(address, body))
    assert [event["usage"]["completion_tokens"] for event in found] == [*range(1, 9), 8, 8]
    assert httpx2.get(f"{address}/health").status_code == 200


def test_guidellm_on_chat_completions(chat_address):
    body = {
        "model": "talker",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 8,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    }
    found = events(post(chat_address, body, "/v1/chat/completions"))
    assert [event["usage"]["completion_tokens"] for event in found] == [*range(1, 9), 8, 8]
    assert all("content" in event["choices"][0]["delta"] for event in found[:8])


def test_lm_eval_local_completions(address, llm):
    """It sums the log probabilities behind the context, and asks whether each was the largest."""
    context, continuation = llm.tokenizer.encode(PROMPT), [262, 599]
    body = {
        "model": "embedded",
        "prompt": [context + continuation, context],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = post(address, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    found = choices[0]["logprobs"]
    values = found["token_logprobs"][len(context) : -1]
    tops = found["top_logprobs"][len(context) : -1]
    assert len(values) == len(continuation)
    assert all(value <= max(top.values()) for value, top in zip(values, tops, strict=True))
    assert found["token_logprobs"][0] is None


def test_lm_eval_generates(address):
    body = {
        "prompt": [[262, 599, 600]],
        "model": "embedded",
        "max_tokens": 5,
        "temperature": 0,
        "stop": ["\n", "."],
        "seed": 1234,
    }
    [choice] = post(address, body).json()["choices"]
    assert choice["index"] == 0
    assert not set("\n.") & set(choice["text"])


def test_langchain_on_completions(address):
    body = {
        "model": "embedded",
        "prompt": [PROMPT, "It"],
        "best_of": 2,
        "frequency_penalty": 0,
        "logprobs": None,
        "max_tokens": 5,
        "n": 2,
        "presence_penalty": 0,
        "seed": None,
        "temperature": 0.7,
        "top_p": 1,
    }
    found = post(address, body).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["completion_tokens"] <= 20


CITY = {
    "description": "A city.",
    "properties": {"name": {"type": "string", "maxLength": 4}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "title": "City",
    "type": "object",
    "additionalProperties": False,
}

LANGCHAIN = {
    "model": "talker",
    "stream": False,
    "messages": [{"content": "Which city?", "role": "user"}],
    "max_completion_tokens": 60,
    "temperature": 0.0,
}


def test_langchain_asks_for_a_form(chat_address):
    pytest.importorskip("llguidance", reason="llguidance is not installed; pip install 'alisa[grammar]'")
    body = LANGCHAIN | {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": CITY, "name": "City", "description": "A city.", "strict": True},
        },
    }
    message = post(chat_address, body, "/v1/chat/completions").json()["choices"][0]["message"]
    assert json.loads(message["content"]).keys() == {"name", "size"}
    assert message["refusal"] is None


def test_langchain_forces_a_tool(chat_address):
    body = LANGCHAIN | {
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "City"}},
        "tools": [{"type": "function", "function": {"name": "City", "description": "A city.", "parameters": CITY}}],
    }
    reply = post(chat_address, body, "/v1/chat/completions")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tool_choice"
    reply = post(chat_address, body | {"tool_choice": "auto"}, "/v1/chat/completions")
    assert reply.json()["choices"][0]["message"]["role"] == "assistant"


def test_open_webui(address):
    body = {
        "model": "embedded",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "min_p": 0.05,
        "max_tokens": 5,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "seed": 3,
        "stop": ["###"],
        "logit_bias": {"5": -1},
        "metadata": {"chat_id": "x"},
    }
    reply = post(address, body, "/v1/chat/completions")
    assert reply.status_code == 400  # the model inside the package has no template, and says so
    assert "chat template" in reply.json()["error"]["message"]


@pytest.mark.parametrize("service_tier", ["auto", None])
def test_fields_of_openai_that_mean_nothing_here_are_ignored(address, service_tier):
    body = {
        "model": "embedded",
        "prompt": PROMPT,
        "max_tokens": 2,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": service_tier,
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "verbosity": "low",
        "best_of": 1,
    }
    assert post(address, body).json()["usage"]["completion_tokens"] == 2

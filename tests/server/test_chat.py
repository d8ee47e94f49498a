"""Conversations, as the official client asks for them."""

import json
import threading
from dataclasses import replace

import httpx2
import openai
import pytest

from alisa import LLM, SamplingParams
from alisa.server.tools import ToolReader
from tests.server.conftest import ENGINE, running

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who is there?"}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def engine_config(chat_model):
    return replace(ENGINE, model=str(chat_model))


@pytest.fixture(scope="module")
def address(engine_config):
    with running(engine_config) as server:
        yield server.address


@pytest.fixture(scope="module")
def talker(engine_config):
    with LLM(config=engine_config) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(address, **body):
    return httpx2.post(f"{address}/v1/chat/completions", json={"messages": MESSAGES, **body}, timeout=60)


def test_an_answer_is_that_of_the_library(client, talker):
    prompt = talker.chat_prompt(MESSAGES)
    expected = talker.generate([prompt], SamplingParams(max_tokens=12, temperature=0.8, seed=5, n=2))
    reply = client.chat.completions.create(
        model="talker", messages=MESSAGES, max_completion_tokens=12, temperature=0.8, seed=5, n=2
    )
    assert [choice.message.content for choice in reply.choices] == [output.text for output in expected]
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.choices[0].message.role == "assistant"
    assert reply.object == "chat.completion"


def test_a_stream_is_the_same_answer_and_has_no_event_before_the_first_token(client, address, talker):
    [expected] = talker.generate([talker.chat_prompt(MESSAGES)], SamplingParams(max_tokens=9, temperature=1, seed=5))
    stream = client.chat.completions.create(
        model="talker", messages=MESSAGES, max_tokens=9, temperature=1, seed=5, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].delta.content is None
    assert len(chunks) == 9 + 1


def test_log_probabilities(client, talker):
    [expected] = talker.generate([talker.chat_prompt(MESSAGES)], SamplingParams(max_tokens=4, logprobs=2))
    for stream in (False, True):
        reply = client.chat.completions.create(
            model="talker",
            messages=MESSAGES,
            max_tokens=4,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream=stream,
        )
        if stream:
            found = [
                token for chunk in reply if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
            ]
        else:
            found = reply.choices[0].logprobs.content
        assert [token.logprob for token in found] == [token.logprob for token in expected.logprobs]
        assert [len(token.top_logprobs) for token in found] == [2, 2, 2, 2]
        assert all(bytes(token.bytes).decode(errors="replace") == token.token for token in found)


def test_the_answer_may_go_on_to_the_last_position(address, talker):
    body = ask(address, temperature=0, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 256


def test_messages_of_parts_and_developers(address, talker):
    parts = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    bodies = [
        httpx2.post(f"{address}/tokenize", json={"messages": messages}).json()["tokens"] for messages in (parts, plain)
    ]
    assert bodies[0] == bodies[1] == talker.chat_prompt(plain)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "refused", "content": "x"}]}, "messages", "no such role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "no text"),
        ({"functions": [{}]}, "functions", "send tools"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice", "no call can be forced"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "is a program"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"modalities": ["audio"]}, "modalities", "only text"),
        ({"continue_final_message": True}, "continue_final_message", "not supported"),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "a " * 400}]}, "messages", "256 positions"),
        ({"messages": [{"role": "user", "content": "a " * 400}]}, "messages", "256 positions"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(address, changes, param, words):
    reply = ask(address, **changes)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == param


def test_a_model_without_a_template_has_no_chat_and_one_without_tools_no_tools(server, chat_model, tmp_path):
    reply = httpx2.post(f"{server.address}/v1/chat/completions", json={"messages": MESSAGES})
    assert reply.status_code == 400
    assert "no chat template" in reply.json()["error"]["message"]
    tools = httpx2.post(f"{server.address}/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS})
    assert tools.json()["error"]["param"] == "tools"


CALL = r'<tool_call>\n\{"name": "look", "arguments": \{"at": [0-9]\}\}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_read(client, stream):
    pytest.importorskip("llguidance", reason="llguidance is not installed; pip install 'alisa[grammar]'")
    reply = client.chat.completions.create(
        model="talker",
        messages=MESSAGES,
        tools=TOOLS,
        max_tokens=90,
        stream=stream,
        extra_body={"guided_regex": "So\\. " + CALL},
    )
    if stream:
        deltas = [chunk.choices[0] for chunk in reply]
        text = "".join(choice.delta.content or "" for choice in deltas)
        [found] = [call for choice in deltas for call in choice.delta.tool_calls or []]
        assert found.index == 0
        reason = deltas[-1].finish_reason
    else:
        text, [found] = reply.choices[0].message.content, reply.choices[0].message.tool_calls
        reason = reply.choices[0].finish_reason
    assert text == "So. "
    assert (found.type, found.function.name) == ("function", "look")
    assert set(json.loads(found.function.arguments)) == {"at"}
    assert reason == "tool_calls"


def test_with_tool_choice_none_there_are_no_tools(address, talker):
    body = ask(address, tools=TOOLS, tool_choice="none", max_tokens=1).json()
    assert body["usage"]["prompt_tokens"] == len(talker.chat_prompt(MESSAGES))


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        ('a <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n b', "a  b", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call><tool_call>\n{"name": "g", "arguments": {}}\n', "", 2),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>not json</tool_call>.", "<tool_call>not json</tool_call>.", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    ],
)
def test_a_text_is_divided_the_same_however_it_comes(text, words, calls, step):
    reader, found_words, found = ToolReader(), "", []
    for start in range(0, len(text), step):
        new, more = reader.feed(text[start : start + step])
        found_words += new
        found += more
    new, more = reader.feed("", final=True)
    found += more
    assert found_words + new == words
    if calls == 2:
        assert [call.name for call in found] == ["f", "g"]
    else:
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls


def test_templates_are_rendered_by_many_at_once(address):
    counts = []
    threads = [
        threading.Thread(target=lambda: counts.append(ask(address, max_tokens=1).json()["usage"]["prompt_tokens"]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(counts) == 8
    assert len(set(counts)) == 1

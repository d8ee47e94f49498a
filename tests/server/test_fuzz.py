"""Calls that make no sense: each is refused or answered, and nobody else loses anything."""

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from alisa import SamplingParams

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models/x", "/state", "/nowhere"]
FIELDS = [
    *("prompt", "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "stream", "echo"),
    *(
        "logprobs",
        "logit_bias",
        "stop_token_ids",
        "min_tokens",
        "stream_options",
        "response_format",
        "messages",
        "tools",
    ),
    *("tool_choice", "guided_json", "guided_regex", "structured_outputs", "priority", "cache_salt", "prompt_logprobs"),
    *("truncate_prompt_tokens", "tokens", "best_of", "repetition_penalty", "chat_template_kwargs", "top_logprobs"),
    *("policy", "sparsity", "coverage"),
]


def value(draw, depth=0):
    """Any JSON value, the odd ones most of all."""
    odd = [
        *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, 1e-320),
        *("", "a", "\0", "\x1b[2J", "é海🙂", "a" * 3000, "<|im_end|>", "embedded", "{{ 1/0 }}", "../../etc/passwd"),
        *([], {}, [[]], [[], []], [5, 6], [[5], [6]], ["a", "b"], [0] * 400, {"a": 1}, {"5": 1.5}, {"99999": 1}),
        *([{"role": "user", "content": "hi"}], {"type": "json_object"}, {"type": "regex", "regex": "(a|b){3}"}),
        *(
            {"include_usage": True},
            "[a-z]{2000}{2000}",
            "(((((((((a*)*)*)*)*)*)*)*)*",
            '{"type": "object"}',
            [None],
            [True],
        ),
    ]
    kind = draw.random()
    if depth < 3 and kind < 0.1:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if depth < 3 and kind < 0.2:
        return {draw.choice([*FIELDS, "type", "role"]): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return draw.choice(odd)


def call(draw):
    """Path, headers and body of a call that is more or less wrong."""
    body = {"prompt": "a", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}], "tokens": [5]}
    for _ in range(draw.randrange(1, 5)):
        body[draw.choice(FIELDS)] = value(draw)
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 64:
        body["max_tokens"] = draw.choice([64, body["max_tokens"]])
    data = json.dumps(body, allow_nan=True).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(data) + 1)
        data = data[:place] + draw.choice([b"", b"\xff", b"NaN", b"[" * 2000, b'"', b"\\ud800", b"\0"]) + data[place:]
    headers = {
        "Content-Type": draw.choice(["application/json"] * 9 + ["text/plain", "application/json; charset=x", ""])
    }
    return draw.choice(PATHS), headers, data


def raw(draw, address):
    """Bytes that are hardly HTTP."""
    host, port = address.removeprefix("http://").split(":")
    lines = [
        draw.choice([b"POST /v1/completions HTTP/1.1", b"GET / HTTP/9.9", b"\0\0\0", b"PRI * HTTP/2.0", b"POST", b""]),
        draw.choice([b"Host: localhost", b"Host:", b"Host: evil", b"", b"Host: localhost\0"]),
        draw.choice(
            [b"Content-Length: 99999999999999999999", b"Content-Length: 3", b"Transfer-Encoding: chunked", b": "]
        ),
    ]
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(
            draw.choice([b"\r\n", b"\n"]).join([*lines, b"", b""]) + bytes(draw.randrange(256) for _ in range(9))
        )
        if draw.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)


def fuzz(address, seed, count):
    """Statuses of so many calls."""
    draw, found = random.Random(seed), set()
    with httpx2.Client(base_url=address, timeout=120) as client:
        for _ in range(count):
            if draw.random() < 0.1:
                raw(draw, address)
                continue
            path, headers, data = call(draw)
            method = draw.choice(["POST"] * 18 + ["GET", "PUT"])
            reply = client.request(method, path, content=data, headers=headers)
            found.add(reply.status_code)
            assert reply.status_code < 500 or reply.status_code == 503, (path, data, reply.text)
            if reply.status_code >= 400:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return found


def check(address, llm, count):
    params = SamplingParams(max_tokens=200, temperature=1, seed=9, ignore_eos=True)
    [expected] = llm.generate([[5, 6, 7]], params)
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 1, "seed": 9, "ignore_eos": True}
    victims, stop = [], threading.Event()

    def victim():
        while not stop.is_set():
            reply = httpx2.post(f"{address}/v1/completions", json=body, timeout=300)
            victims.append(reply.json()["choices"][0]["text"])

    thread = threading.Thread(target=victim)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            statuses = set().union(*pool.map(lambda seed: fuzz(address, seed, count // 4), range(4)))
    finally:
        stop.set()
        thread.join(timeout=300)
    assert {200, 400, 404, 405, 415} <= statuses
    assert set(victims) == {expected.text}
    status = httpx2.get(f"{address}/state").json()["status"]
    assert status["requests"] == []
    assert status["device_bytes"] == 0


def test_calls_that_make_no_sense(address, llm):
    check(address, llm, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_calls_that_make_no_sense(address, llm):
    check(address, llm, 10_000)

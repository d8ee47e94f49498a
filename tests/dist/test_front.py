"""The front of a fleet and what goes through it, without Ray."""

from __future__ import annotations

import asyncio
import json
import pickle
from types import SimpleNamespace

import pytest

from alisa.config import EngineConfig
from alisa.dist import serving as serving_module
from alisa.dist.call import Call, answer
from alisa.dist.cluster import ReplicaSize
from alisa.dist.front import Front, OverloadedError, ReplicaDiedError
from alisa.dist.metrics import FORGET_S, MetricsBoard
from alisa.dist.routing import ranked, routing_key
from alisa.dist.share import ReplicaShare
from alisa.engine.status import EngineStatus
from alisa.errors import InputError
from alisa.server.config import ServerConfig
from alisa.server.telemetry import Telemetry

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def key(body=None, **headers) -> str:
    return routing_key(headers, json.dumps(body).encode())


def chat(*messages: str) -> dict:
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]}


def test_calls_that_begin_alike_have_one_key():
    assert key(chat("be brief", "hello")) == key(chat("be brief", "hello", "hi", "and now?")) != ""
    assert key(chat("be brief", "hello")) != key(chat("be brief", "bye"))
    long = "a" * 256
    assert key({"prompt": long + "b"}) == key({"prompt": long + "c"}) != key({"prompt": "b" + long})
    assert key({"prompt": [long, "x"]}) == key({"prompt": long}) != ""
    assert key({"prompt": [*range(64), 1]}) == key({"prompt": [*range(64), 2]}) == key({"prompt": [[*range(70)]]})
    assert key({"prompt": "a", "prompt_cache_key": "k"}) == key({"prompt": "b", "prompt_cache_key": "k"})
    assert key({"prompt": "a"}, **{"x-session-id": "s"}) == key({"prompt": "b"}, **{"x-session-id": "s"})


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[1]", b"{}", b'{"prompt": []}', b'{"messages": []}', b'{"prompt": 3}']
)
def test_what_cannot_be_read_goes_anywhere_and_breaks_nothing(body):
    assert isinstance(routing_key({}, body), str)


def test_a_replica_that_goes_moves_only_its_own_calls():
    replicas = [f"r{number}" for number in range(5)]
    before = {str(call): ranked(str(call), replicas)[0] for call in range(500)}
    after = {call: ranked(call, replicas[1:])[0] for call in before}
    assert {call for call in before if before[call] != after[call]} == {c for c in before if before[c] == "r0"}
    counts = [sum(first == replica for first in before.values()) for replica in replicas]
    assert min(counts) > 60  # a fifth is 100


def get(path: str, expositions=()) -> tuple[int, str]:
    start, body = asyncio.run(sent_to("GET", path, None, [], "", expositions=expositions))
    return start["status"], body["body"].decode()


def call_front(forward, *bodies: bytes, then: str = "", config: ServerConfig | None = None) -> list[dict]:
    """What the front sends to a call whose body comes in pieces; in their middle its client is `gone` or `silent`."""
    pieces = [{"type": "http.request", "body": body, "more_body": True} for body in bodies or (b"{}",)]
    if not then:
        pieces[-1]["more_body"] = False
    return asyncio.run(sent_to("POST", "/v1/completions", forward, pieces, then, config))


async def sent_to(method, path, forward, pieces, then, config=None, expositions=()) -> list[dict]:
    sent: list[dict] = []

    async def receive():
        if pieces:
            return pieces.pop(0)
        if then == "silent":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
    await Front(forward, lambda: expositions, config or ServerConfig())(scope, receive, send)
    return sent


def dies(after: list[dict], error: Exception):
    async def forward(key, call):
        for message in after:
            yield message
        raise error

    return forward


def test_a_replica_that_dies_before_it_answers_is_a_503():
    start, body = call_front(dies([], ReplicaDiedError()))
    assert start["status"] == 503
    assert "has died" in json.loads(body["body"])["error"]["message"]
    start, _ = call_front(dies([], OverloadedError()))
    assert start["status"] == 429


def test_a_replica_that_dies_in_a_stream_ends_it_with_an_error_event():
    begun = [
        {"type": "http.response.start", "status": 200, "headers": STREAM},
        {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True},
    ]
    *first, last = call_front(dies(begun, ReplicaDiedError()))
    assert first == begun
    event, done, _ = last["body"].split(b"\n\n")
    assert "has died" in json.loads(event.removeprefix(b"data: "))["error"]["message"]
    assert done == b"data: [DONE]"
    # What is no stream breaks off: half a JSON object is no answer.
    begun[0] = begun[0] | {"headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ReplicaDiedError):
        call_front(dies(begun, ReplicaDiedError()))


def test_a_body_that_is_too_large_does_not_reach_a_replica():
    start, _ = call_front(dies([], AssertionError()), b"x" * 6, b"x" * 6, config=ServerConfig(max_body="10"))
    assert start["status"] == 413


@pytest.mark.parametrize(("then", "status"), [("gone", 400), ("silent", 408)])
def test_half_a_body_does_not_reach_a_replica(then, status):
    # What has come so far is a call that could be answered.
    config = ServerConfig(receive_timeout_s=0.1)
    start, _ = call_front(dies([], AssertionError()), b'{"prompt": "a"}', then=then, config=config)
    assert start["status"] == status


def test_leaving_the_answer_ends_the_application():
    ended = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"abc"
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()  # nothing more comes
        finally:
            ended.append(scope["path"])

    async def leave():
        messages = answer(app, pickle.loads(pickle.dumps(Call("POST", "/a", b"", ((b"h", b"v"),), b"abc"))))
        first = await anext(messages)
        await messages.aclose()
        return first

    assert asyncio.run(leave())["status"] == 200
    assert ended == ["/a"]


def test_an_application_that_fails_fails_here():
    async def app(scope, receive, send):
        raise ValueError("no")

    async def read():
        return [message async for message in answer(app, Call("GET", "/", b"", (), b""))]

    with pytest.raises(ValueError, match="no"):
        asyncio.run(read())


def exposition(engine: str, num_prompt_tokens: int) -> bytes:
    telemetry = Telemetry("m", 100, engine=engine)
    telemetry._prompt_tokens.inc(num_prompt_tokens)
    return telemetry.exposition(EngineStatus((), 0, 0, 0))


def test_metrics_are_those_of_all_engines():
    first = exposition("a", 3)
    status, text = get("/metrics", (first, exposition("b", 4)))
    assert status == 200
    assert 'vllm:prompt_tokens_total{engine="a",model_name="m"} 3.0' in text
    assert 'vllm:prompt_tokens_total{engine="b",model_name="m"} 4.0' in text
    assert text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    assert text.count("# TYPE vllm:time_to_first_token_seconds histogram") == 1
    assert "alisa:num_engines 2.0" in text
    of_a = [line for line in text.splitlines() if 'engine="a"' in line]
    assert of_a == [line for line in first.decode().splitlines() if 'engine="a"' in line]


def test_a_fleet_is_ready_while_an_engine_answers_and_the_front_is_well_without():
    assert get("/ready", (b"",)) == (200, '{"ready":true}')
    assert get("/ready")[0] == 503
    assert get("/health") == (200, '{"status":"ok"}')
    assert "alisa:num_engines 0.0" in get("/metrics")[1]


def test_an_engine_that_tells_nothing_any_more_is_forgotten():
    now = [0.0]
    board = MetricsBoard(lambda: now[0])
    board.put("a", b"1")
    board.put("b", b"2")
    now[0] = FORGET_S - 1
    board.put("a", b"3")
    assert board.newest() == (b"3", b"2")
    now[0] = FORGET_S + 1
    assert board.newest() == (b"3",)


def test_a_cluster_that_serves_already_is_left_alone(monkeypatch):
    actors = [{"name": "mine", "namespace": "a"}, {"name": serving_module.CONTROLLER, "namespace": "serve"}]
    util = SimpleNamespace(list_named_actors=lambda all_namespaces: actors)
    monkeypatch.setattr(serving_module, "load_ray", lambda: SimpleNamespace(util=util))
    size = ReplicaSize(1, ReplicaShare(1, 0, 2**30))
    with (
        pytest.raises(InputError, match="runs on this cluster already"),
        serving_module.serving(EngineConfig(), ServerConfig(), size, min_replicas=1),
    ):
        raise AssertionError("it is served")


def test_why_a_fleet_cannot_start_is_the_sentence_of_an_engine():
    ours = "Failed. Error:\n  File x\nRuntimeError: Traceback\n  File y\nalisa.errors.ModelError: No model: none.\n"

    def told(engines: str, front: str = "") -> str:
        deployments = {"engines": SimpleNamespace(message=engines), "front": SimpleNamespace(message=front)}
        app = SimpleNamespace(message="Failed to update", deployments=deployments)
        return serving_module._why_not(SimpleNamespace(applications={"alisa": app}))

    assert told(ours) == "No model: none."
    assert told("It died:\n  x\nKeyError: 1") == "KeyError: 1"
    assert told("", "  x\nTypeError: 2") == "TypeError: 2"
    assert told("") == "Failed to update"

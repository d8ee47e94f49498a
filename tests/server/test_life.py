"""Clients that leave, servers that end, engines that fail: nothing is lost and nothing stays."""

import json
import socket
import threading
import time
from dataclasses import replace

import httpx2
import openai
import pytest

from alisa import SamplingParams
from alisa.server.config import ServerConfig
from tests.server.conftest import ENGINE, running

LONG = {"prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True}
OPEN = ("waiting", "prefill", "decode", "swapped")


def post(address, path="/v1/completions", **body):
    return httpx2.post(address + path, json=body, timeout=60)


def requests_of(address):
    return httpx2.get(f"{address}/state", timeout=60).json()["status"]["requests"]


def wait_for(ready, what):
    for _ in range(600):
        if ready():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


def send(address, body, *, path="/v1/completions", headers=()):
    """A call over a bare socket, which stays open."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    connection.sendall("\r\n".join([*head, *headers, "", ""]).encode() + data)
    return connection


def everything(connection):
    """What comes until the server closes."""
    with connection:
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
        return data


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_text_grows_frees_its_rows(address, stream):
    connection = send(address, {**LONG, "stream": stream})
    wait_for(lambda: any(r["status"] == "decode" for r in requests_of(address)), "decoding")
    connection.close()
    wait_for(lambda: not requests_of(address), "the end of the request")
    assert httpx2.get(f"{address}/state").json()["status"]["device_bytes"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_or_is_read_leaves_nothing(stream):
    # One at a time, and prompts that are read in many steps.
    with running(replace(ENGINE, max_num_seqs=1, max_model_len=2048, prefill_chunk=16)) as server:
        first = send(server.address, {**LONG, "max_tokens": 2000, "stream": True})
        wait_for(lambda: requests_of(server.address), "the first request")
        waiting = send(server.address, {**LONG, "stream": stream, "n": 2})
        wait_for(lambda: sum(r["status"] == "waiting" for r in requests_of(server.address)) == 2, "waiting")
        waiting.close()
        wait_for(lambda: len(requests_of(server.address)) == 1, "the end of those that wait")
        read = send(server.address, {"prompt": [5] * 2000, "max_tokens": 40, "stream": stream})
        first.close()
        wait_for(lambda: any(r["status"] == "prefill" for r in requests_of(server.address)), "prefill")
        read.close()
        wait_for(lambda: not requests_of(server.address), "the end of all")
        assert httpx2.get(f"{server.address}/state").json()["status"]["device_bytes"] == 0
        assert post(server.address, prompt="a", max_tokens=2).status_code == 200


def test_those_who_stay_get_their_tokens_while_others_come_and_go(address, llm):
    expected = post(address, **LONG, seed=1, temperature=1).json()["choices"][0]["text"]
    found = []
    thread = threading.Thread(
        target=lambda: found.append(post(address, **LONG, seed=1, temperature=1).json()["choices"][0]["text"])
    )
    thread.start()
    for number in range(12):
        connection = send(address, {**LONG, "stream": bool(number % 2), "n": 1 + number % 3, "seed": number})
        time.sleep(0.01 * number)
        connection.close()
    thread.join(timeout=60)
    assert found == [expected]
    wait_for(lambda: not requests_of(address), "the end of all")


def test_who_has_the_lower_priority_is_served_first():
    with running(replace(ENGINE, max_num_seqs=1, max_model_len=2048)) as server:
        first = send(server.address, {**LONG, "max_tokens": 1500, "stream": True})
        wait_for(lambda: requests_of(server.address), "the first request")
        calls = [{"prompt": "a", "max_tokens": 1, "priority": priority} for priority in (5, -5, 0)]
        threads = [threading.Thread(target=post, args=(server.address,), kwargs=call) for call in calls]
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda n=number: len(requests_of(server.address)) == n + 2, "the next request")
        first.close()
        for thread in threads:
            thread.join(timeout=60)
        ended = httpx2.get(f"{server.address}/state").json()["finished"]
        assert [request["request_id"] for request in ended] == ["async-1", "async-3", "async-2", "async-0"]


def test_too_many_are_told_to_come_back():
    config = ServerConfig(port=0, max_waiting=1)
    with running(replace(ENGINE, max_num_seqs=1), config) as server:
        connections = [send(server.address, {**LONG, "stream": True}) for _ in range(2)]
        wait_for(lambda: len(requests_of(server.address)) == 2, "two requests")
        reply = post(server.address, prompt="a")
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        for connection in connections:
            connection.close()
        wait_for(lambda: post(server.address, prompt="a", max_tokens=1).status_code == 200, "room")


def test_a_server_that_is_told_to_stop_brings_running_calls_to_their_end():
    with running() as server:
        connection = send(server.address, {**LONG, "stream": True})
        wait_for(lambda: requests_of(server.address), "the request")
        server.should_exit = True
        data = everything(connection)
        assert b'"finish_reason":"length"' in data
        assert b"data: [DONE]" in data
        assert server.statuses.get(timeout=60) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.address}/health")


def test_calls_that_do_not_end_in_time_are_told(monkeypatch):
    def slow(service):
        step = service.engine._engine.step
        monkeypatch.setattr(service.engine._engine, "step", lambda: (time.sleep(0.1), step())[1])

    with running(config=ServerConfig(port=0, drain_timeout_s=0.5), prepare=slow) as server:
        connection = send(server.address, {**LONG, "stream": True})
        wait_for(lambda: requests_of(server.address), "the request")
        server.should_exit = True
        assert b"The server is shutting down" in everything(connection)
        assert server.statuses.get(timeout=60) == 0


def test_an_engine_that_fails_tells_everybody_and_the_server_ends(monkeypatch, caplog):
    broken = threading.Event()

    def breaks(service):
        step = service.engine._engine.step
        monkeypatch.setattr(service.engine._engine, "step", lambda: 1 / 0 if broken.is_set() else step())

    with running(prepare=breaks) as server:
        address = server.address
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="embedded", prompt="a", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        broken.set()
        with pytest.raises(openai.APIError, match="engine has stopped"):
            for _ in stream:
                pass
        reply = httpx2.get(f"{address}/ready")
        assert reply.status_code == 503
        assert post(address, prompt="a").status_code == 503
        assert httpx2.get(f"{address}/health").status_code == 200
        assert server.statuses.get(timeout=60) == 1
        client.close()
    assert "the engine has failed" in caplog.text


def test_a_request_that_fails_is_an_error_of_its_own(monkeypatch):
    import alisa.engine.chooser as module

    def one_bad(logits, rows):
        if any(row.params.seed == 13 for row in rows):
            logits[[row.params.seed == 13 for row in rows].index(True)] = float("nan")
        return plain(logits, rows)

    plain = module.sample
    monkeypatch.setattr(module, "sample", one_bad)
    with running() as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="no finite number"):
            client.completions.create(model="embedded", prompt="a", seed=13)
        with pytest.raises(openai.APIError, match="no finite number"):
            list(client.completions.create(model="embedded", prompt="a", seed=13, stream=True))
        assert client.completions.create(model="embedded", prompt="a", max_tokens=3).usage.completion_tokens == 3
        client.close()


@pytest.fixture
def large_events(monkeypatch):
    """Events are larger than all buffers between the two."""
    import alisa.server.frames as module

    def to_json(value, plain=module.to_json):
        return plain(value) + (b" " * (8 << 20) if isinstance(value, dict) else b"")

    monkeypatch.setattr(module, "to_json", to_json)


def test_a_client_that_takes_its_time_loses_nothing(address, llm, large_events):
    connection = send(
        address, {**LONG, "max_tokens": 5, "stream": True, "temperature": 0}, headers=["Connection: close"]
    )
    wait_for(lambda: not requests_of(address), "the last token")
    lines = [line for line in everything(connection).decode().splitlines() if line.startswith("data: {")]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    [expected] = llm.generate([LONG["prompt"]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(texts) == 6  # a token each, and how it ended
    assert "".join(texts) == expected.text


def test_a_client_that_takes_nothing_is_dropped(large_events):
    with running(config=ServerConfig(port=0, send_timeout_s=0.5)) as server:
        connection = send(server.address, {**LONG, "stream": True})
        # By then it is aborted, or, on a slow machine, all of it waits to be taken.
        wait_for(lambda: "vllm:request_success_total{" in httpx2.get(f"{server.address}/metrics").text, "its end")
        # A client that takes nothing cannot tell.
        wait_for(lambda: not server.server_state.connections, "the end of the connection")
        connection.close()


def ask_for_pages(address):
    """A thousand of them, the last on this connection: more than all buffers between the two."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    call = f"GET / HTTP/1.1\r\nHost: {host}\r\n"
    connection.sendall(f"{call}\r\n".encode() * 999 + f"{call}Connection: close\r\n\r\n".encode())
    return connection


def test_replies_that_nobody_takes_do_not_keep_a_connection(monkeypatch):
    import alisa.server.connection as module

    monkeypatch.setattr(module, "TAKE_TIMEOUT_S", 0.5)
    with running() as server:
        connection = ask_for_pages(server.address)
        wait_for(lambda: server.server_state.total_requests, "the first reply")
        wait_for(lambda: not server.server_state.connections, "the end of the connection")
        assert server.server_state.total_requests < 1000
        connection.close()


def test_a_client_that_takes_its_replies_slowly_keeps_its_connection(monkeypatch):
    import alisa.server.connection as module

    monkeypatch.setattr(module, "TAKE_TIMEOUT_S", 0.5)
    with running() as server:
        connection = ask_for_pages(server.address)
        data = b""
        while chunk := connection.recv(4 << 20):
            data += chunk
            time.sleep(0.1)
        assert data.count(b"HTTP/1.1 200") == 1000
        connection.close()


def test_pings_keep_a_silent_stream_alive(monkeypatch):
    import alisa.server.reply as module

    monkeypatch.setattr(module, "PING_S", 0.1)
    with running(replace(ENGINE, max_num_seqs=1)) as server:
        first = send(server.address, {**LONG, "stream": True})
        wait_for(lambda: requests_of(server.address), "the first request")
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        raw = client.completions.with_raw_response.create(model="embedded", prompt="a", max_tokens=3, stream=True)
        chunks = list(raw.parse())
        assert len(chunks) == 4
        first.close()
        client.close()


def test_metrics_say_that_the_event_loop_was_held_up():
    def hold_up(service):
        finished = service.telemetry.finished

        def slow():
            time.sleep(0.6)  # longer than the loop's lag is looked at twice
            return finished()

        service.telemetry.finished = slow

    with running(prepare=hold_up) as server:
        requests_of(server.address)
        lag = "alisa:event_loop_lag_seconds_sum"
        wait_for(lambda: metric(server.address, lag) > 0.3, "a lag of what is left of the time")


def metric(address, name):
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

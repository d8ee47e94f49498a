"""A fleet behind Ray Serve, through the official client; what it says is compared with one engine in this process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection
from importlib.util import find_spec

import pytest

from alisa.config import EngineConfig, SamplingParams
from alisa.llm import LLM
from tests.dist.jobs import ENVIRONMENT, ROOT, replicas, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("ray") and find_spec("openai")), reason="Ray is not installed; `make ray-test` installs it"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ENGINES = "ray::ServeReplica:alisa:engines"
CONFIG = EngineConfig(max_num_seqs=2, max_model_len=512, prefill_chunk=64)
LONG = 400


class Fleet:
    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["serve", "--ray", "local", "--replicas", "2", "--replica-cpus", "1", "--port", str(self.port)]
        words += ["--max-num-seqs", "2", "--max-model-len", "512", "--prefill-chunk", "64"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alisa", *words],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "serve on" in line:
                break
        else:
            raise AssertionError("it ended before it served")
        self.rest: list[str] = []
        threading.Thread(target=lambda: self.rest.extend(self.process.stderr), daemon=True).start()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a plain call, which has to be answered at once."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def engines(self) -> list[int]:
        return [process.pid for process in replicas(self.process.pid, ENGINES)]


@pytest.fixture(scope="module")
def fleet():
    made = Fleet()
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.fixture
def client(fleet):
    import openai

    with openai.OpenAI(base_url=f"http://127.0.0.1:{fleet.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def stream(client, prompt: str, max_tokens: int = LONG, **options):
    return client.completions.create(
        model="embedded", prompt=prompt, max_tokens=max_tokens, stream=True, temperature=0, **options
    )


def test_streams_and_plain_calls_say_what_one_engine_says(client):
    with LLM(config=CONFIG) as llm:
        [expected] = llm.generate("The old ship", SamplingParams(max_tokens=20))
    assert "".join(chunk.choices[0].text for chunk in stream(client, "The old ship", 20)) == expected.text
    plain = client.completions.create(model="embedded", prompt="The old ship", max_tokens=20, temperature=0)
    assert plain.choices[0].text == expected.text
    assert plain.choices[0].finish_reason == expected.finish_reason


def test_errors_are_those_of_the_server(client):
    import openai

    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.completions.create(model="embedded", prompt="a " * 600)


def test_who_leaves_makes_room(client):
    # More streams than the engine works on at once: the last ones are answered only when the first are gone.
    for _ in range(6):
        left = stream(client, "It was a dark night", extra_body={"ignore_eos": True})
        next(iter(left))
        left.close()
    assert client.completions.create(model="embedded", prompt="At sea", max_tokens=4).choices[0].text


def test_a_replica_that_dies_ends_its_streams_with_an_error_and_another_takes_over(fleet, client):
    import openai

    events = iter(stream(client, "The captain", extra_body={"ignore_eos": True}))
    next(events)
    for pid in fleet.engines():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="has died"):
        for _ in events:
            pass

    def is_answered() -> bool:
        try:
            return bool(client.completions.create(model="embedded", prompt="At sea", max_tokens=4).choices)
        except openai.APIError:
            return False

    wait_until(is_answered)


def test_more_calls_start_another_replica(fleet, client):
    wait_until(lambda: len(fleet.engines()) == 1)
    enough = threading.Event()

    def call(number: int) -> None:
        while not enough.is_set():
            for _ in stream(client, f"{number} men sailed home", extra_body={"ignore_eos": True}):
                if enough.is_set():
                    break

    callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: len(fleet.engines()) == 2, 180)
        # With more calls than both take at the same time, what is asked of the fleet is answered.
        wait_until(lambda: "alisa:num_engines 2.0" in fleet.get("/metrics")[1])
        status, text = fleet.get("/metrics")
        assert status == 200
        assert len({*re.findall(r'vllm:num_requests_running{engine="(\w+)"', text)}) == 2
        assert [fleet.get(path)[0] for path in ("/health", "/ready")] == [200, 200]
    finally:
        enough.set()
        for caller in callers:
            caller.join()


def finished_by_engine(fleet) -> dict[str, float]:
    found: dict[str, float] = {}
    lines = re.findall(r'^vllm:request_success_total{engine="(\w+)".*} (\S+)$', fleet.get("/metrics")[1], re.M)
    for engine, count in lines:
        found[engine] = found.get(engine, 0) + float(count)
    return found


def test_calls_of_a_session_meet_at_one_engine_and_sessions_at_both(fleet, client):
    # The two of the test before, once its last calls have ended.
    wait_until(lambda: fleet.get("/metrics")[1].count('num_requests_running{engine="') == 2)
    wait_until(lambda: not re.search(r"^vllm:num_requests_(running|waiting).* [^0]", fleet.get("/metrics")[1], re.M))

    def call(session: str) -> str:
        """The engine that answered."""
        before, changed = finished_by_engine(fleet), []

        def told() -> bool:
            now = finished_by_engine(fleet)
            changed[:] = [name for name in now if now[name] != before.get(name, 0)]
            return bool(changed)

        headers = {"x-session-id": session}
        client.completions.create(model="embedded", prompt="At sea", max_tokens=2, extra_headers=headers)
        wait_until(told)
        assert len(changed) == 1
        return changed[0]

    engines = [{call(f"session {number}") for _ in range(2)} for number in range(12)]
    assert [len(met) for met in engines] == [1] * 12
    assert len(set.union(*engines)) == 2  # all twelve at one: 1 of 2048 pairs of names


def test_sigterm_lets_running_calls_come_to_their_end(fleet, client):
    events = iter(stream(client, "The captain", extra_body={"ignore_eos": True}))
    next(events)
    fleet.process.send_signal(signal.SIGTERM)
    assert sum(1 for _ in events) > LONG // 2
    assert fleet.process.wait(timeout=90) == 0
    assert any("running calls come to their end" in line for line in fleet.rest)


def ended(*options: str) -> str:
    """What `alisa serve --ray local` says where it cannot serve."""
    words = [sys.executable, "-m", "alisa", "serve", "--ray", "local", "--replica-cpus", "1", *options]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=200)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_told_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port} cannot be listened on" in ended("--port", str(port))
    told = ended("--model", "/not/there", "--port", str(port))
    assert "No engine can start" in told
    assert "/not/there" in told

"""`alisa serve` as a user starts it, and as the system ends it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

COMMAND = [sys.executable, "-m", "alisa", "serve", "--max-num-seqs", "2", "--kv-device-memory", "4MiB"]


def start(*words, **environment):
    return subprocess.Popen(
        [*COMMAND, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def address_of(process):
    line = process.stderr.readline()
    found = re.search(r"http://\S+?:\d+", line)
    assert found, line + process.stderr.read()
    return found[0]


def end(process):
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


def test_it_says_what_it_serves_and_sigterm_brings_it_to_its_end():
    process = start("--port", "0")
    address = address_of(process)
    # Where no option says how long a sequence may be, the model does.
    assert httpx2.get(f"{address}/state").json()["model"]["max_model_len"] == 2048
    with httpx2.stream(
        "POST", f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 300, "stream": True}, timeout=60
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    out, err = end(process)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert "leaked" not in err


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", str(taken.getsockname()[1]))
        _, err = end(process)
    assert process.returncode == 2
    assert "address already in use" in err
    assert "Try another --port" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [(("--host", "0.0.0.0"), "there is no key"), (("--port", "99999"), "port is 99999"), (("--max-body", "x"), "size")],
)
def test_bad_options_are_one_sentence(words, problem):
    process = start(*words)
    _, err = end(process)
    assert process.returncode == 2
    assert problem in err
    assert "Traceback" not in err


def test_a_key_from_the_environment_counts():
    process = start("--port", "0", ALISA_API_KEY="secret")
    address = address_of(process)
    assert httpx2.get(f"{address}/v1/models").status_code == 401
    assert httpx2.get(f"{address}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    process.terminate()
    end(process)
    assert process.returncode == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not tell which files are open")
def test_a_server_that_is_killed_leaves_no_files(tmp_path):
    # A cap that one of the two requests fills: the other's rows go to the disk.
    options = ("--port", "0", "--kv-disk-path", str(tmp_path), "--kv-device-memory", "2MiB", "--policy", "dense")
    process = start(*options)
    address = address_of(process)
    body = {"prompt": [5] * 400, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        for _ in range(200):
            metrics = httpx2.get(f"{address}/metrics", timeout=60).text
            if float(re.search(r"alisa:kv_disk_bytes\{.*\} (\S+)", metrics)[1]) > 0:
                break
            next(lines)
            time.sleep(0.05)
        else:
            raise AssertionError("nothing went to the disk")
        process.kill()
    end(process)
    assert list(tmp_path.iterdir()) == []

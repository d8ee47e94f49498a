"""Who may come in, and what comes in."""

import socket
import time

import httpx2
import pytest

from alisa.errors import InputError
from alisa.server import connection as connection_module
from alisa.server.config import ServerConfig
from tests.server.conftest import running

KEY = "a long random key"
OTHER_KEY = "another long random key"


@pytest.fixture(scope="module")
def locked():
    config = ServerConfig(port=0, api_key=(OTHER_KEY, KEY), allowed_hosts=("127.0.0.1", "models.example"))
    with running(config=config) as server:
        yield server.address


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/state", "/tokenizer_info", "/version", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic abc", f"Bearer {KEY}x", "Bearer", KEY])
def test_nothing_is_told_without_the_key(locked, path, header):
    reply = httpx2.get(locked + path, headers={} if header is None else {"Authorization": header})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_every_key_opens(locked, key):
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx2.get(f"{locked}/v1/models", headers=headers).status_code == 200
    reply = httpx2.post(f"{locked}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    assert reply.status_code == 200
    for path in ("/health", "/ready", "/"):
        assert httpx2.get(locked + path).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_a_name_that_is_not_ours_is_refused(address, host):
    reply = httpx2.get(f"{address}/v1/models", headers={"Host": host})
    assert reply.status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:5"])
def test_our_own_names_are_known(address, host):
    assert httpx2.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200


def test_a_name_that_was_given_is_known(locked):
    headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example"}
    assert httpx2.get(f"{locked}/v1/models", headers=headers).status_code == 200


def test_pages_of_others_may_not_call(address):
    reply = httpx2.options(
        f"{address}/v1/completions",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert "access-control-allow-origin" not in reply.headers


def test_pages_that_were_named_may_call():
    with running(config=ServerConfig(port=0, allowed_origins=("https://good.example",))) as server:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            reply = httpx2.get(f"{server.address}/v1/models", headers={"Origin": origin})
            assert ("access-control-allow-origin" in reply.headers) is allowed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"api_key": ("",)}, "api_key is empty or has a comma"),
        ({"max_waiting": 0, "drain_timeout_s": 0.0}, "max_waiting is 0.*drain_timeout_s is 0"),
        ({"max_body": "many"}, "not a memory size"),
    ],
)
def test_options_out_of_range_are_named(options, problem):
    with pytest.raises(InputError, match=problem):
        ServerConfig(**options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example"])
def test_other_machines_need_a_key(host):
    with pytest.raises(InputError, match="there is no key"):
        ServerConfig(host=host).refuse_open_door()
    ServerConfig(host=host, api_key=(KEY,)).refuse_open_door()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1", "[::1]"])
def test_this_machine_needs_none(host):
    ServerConfig(host=host).refuse_open_door()


def test_a_key_is_never_shown():
    assert KEY not in repr(ServerConfig(api_key=(KEY,)))


def talk(address, data, *, timeout=20):
    """Send bytes, and read until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as sock:
        sock.sendall(data)
        found = b""
        try:
            while chunk := sock.recv(65536):
                found += chunk
        except ConnectionResetError:
            pass
        return found


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\nHost: localhost\n\n",
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_call_is_refused_at_once(address, data):
    began = time.monotonic()
    assert b" 200 " not in talk(address, data).split(b"\r\n")[0]
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("data", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_come_is_not_waited_for(address, data, monkeypatch):
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.3)
    assert talk(address, data) == b""


def test_a_body_that_does_not_come_is_not_waited_for():
    with running(config=ServerConfig(port=0, receive_timeout_s=0.3)) as server:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
        )
        found = talk(server.address, head + b"\r\nConnection: close\r\n\r\n{")
    assert found.startswith(b"HTTP/1.1 408 ")

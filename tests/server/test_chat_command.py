"""`alisa chat --url`: the same conversation over HTTP."""

import io
from dataclasses import replace

import pytest

from alisa import LLM, SamplingParams
from alisa.cli.main import main
from alisa.server.config import ServerConfig
from tests.server.conftest import ENGINE, running

KEY = "secret"


@pytest.fixture(scope="module")
def address(chat_model):
    with running(replace(ENGINE, model=str(chat_model)), ServerConfig(port=0, api_key=(KEY,))) as server:
        yield server.address


def chat(monkeypatch, capsys, typed, *words, key=KEY):
    monkeypatch.setenv("ALISA_API_KEY", key)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return (main(["chat", *words]), *capsys.readouterr())


def test_a_server_answers_as_the_library_does(address, chat_model, monkeypatch, capsys):
    with LLM(config=replace(ENGINE, model=str(chat_model))) as llm:
        messages = [{"role": "user", "content": "Who is there?"}]
        params = SamplingParams(max_tokens=9, temperature=0.7, seed=4)
        [expected] = llm.generate([llm.chat_prompt(messages)], params)
    words = ["--url", address, "--max-tokens", "9", "--temperature", "0.7", "--seed", "4"]
    status, out, err = chat(monkeypatch, capsys, "Who is there?\n/policy dense\n", *words)
    assert status == 0
    assert out == expected.text + "\n"
    assert f"9 tokens after {len(expected.prompt_ids)}" in err
    assert "The policy is the server's" in err


def test_what_the_server_refuses_is_one_line(address, monkeypatch, capsys):
    status, out, err = chat(
        monkeypatch, capsys, "long " * 400 + "\nHi\n", "--url", f"{address}/v1/", "--max-tokens", "2"
    )
    assert status == 0
    assert "The server says: The prompt has" in err
    assert out.strip()


def test_a_wrong_key_is_one_sentence(address, monkeypatch, capsys):
    status, _, err = chat(monkeypatch, capsys, "Hi\n", "--url", address, key="wrong")
    assert status == 2
    assert "The API key is missing or wrong" in err

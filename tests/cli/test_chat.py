"""`alisa chat` with the model inside the package, and with one that has a chat template."""

import io
import json
import shutil
from contextlib import closing

import pytest

from alisa import LLM, SamplingParams
from alisa.cli.chat import _shown
from alisa.cli.conversation import Conversation, load
from alisa.cli.main import main
from alisa.cli.talkers import local_talker
from alisa.config import EngineConfig
from alisa.engine.loaded import embedded_model
from alisa.errors import InputError

OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--kv-device-memory", "8MiB", "--max-tokens", "8"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "talker"
    shutil.copytree(embedded_model(), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return str(directory)


def chat(monkeypatch, capsys, typed, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    status = main(["chat", *OPTIONS, *words])
    return (status, *capsys.readouterr())


def answers(model, *turns, system=None):
    """What the library says, turn by turn."""
    found, messages = [], [] if system is None else [{"role": "system", "content": system}]
    config = EngineConfig(model=model, dtype="float32", max_model_len=256, kv_device_memory="8MiB")
    with LLM(config=config) as llm:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            params = llm.own_sampling(SamplingParams(max_tokens=8))
            found.append(llm.generate([llm.chat_prompt(messages)], params)[0].text)
            messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_a_conversation_goes_on(model, monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, "Who is there?\n\nAnd who else?\n", "--model", model)
    assert status == 0
    assert out == "".join(f"{text}\n" for text in answers(model, "Who is there?", "And who else?"))
    assert err.count("tokens/s") == 2


def test_the_answer_is_read_while_the_user_types(model, tmp_path):
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
    )
    config = EngineConfig(
        model=str(plain), dtype="float32", max_model_len=256, kv_device_memory="8MiB", prefix_cache=True
    )
    messages = [{"role": "user", "content": "It was a dark and stormy night, and the ship had been at sea for"}]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with closing(local_talker(config)) as talker, LLM(config=config) as llm:
        first = "".join(talker.answer(messages, params))
        talker._reading.join(timeout=60)
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
        [expected] = llm.generate([llm.chat_prompt(messages)], params)
        second = "".join(talker.answer(messages, params))
        assert second == expected.text
        assert talker._last.cached_tokens > 16 + len(llm.chat_prompt(messages[:1]))
        assert f"({talker._last.cached_tokens} cached)" in talker.stats()


def test_quiet_says_nothing_else(model, monkeypatch, capsys):
    _, out, err = chat(monkeypatch, capsys, "Hi\n", "--model", model, "--quiet", "--system", "Be kind.")
    assert out == answers(model, "Hi", system="Be kind.")[0] + "\n"
    assert err == ""


def test_lines_that_go_on_are_one_text(model, monkeypatch, capsys):
    for typed in ("one \\\ntwo\n", '"""\none \ntwo\n"""\n'):
        _, out, _ = chat(monkeypatch, capsys, typed, "--model", model, "--quiet")
        assert out == answers(model, "one \ntwo")[0] + "\n"


def test_what_was_saved_goes_on(model, monkeypatch, capsys, tmp_path):
    file = tmp_path / "talk.json"
    typed = f"/system Be kind.\nHi\nforget this\n/undo\n/save {file}\n/quit\nnever read\n"
    chat(monkeypatch, capsys, typed, "--model", model)
    saved = json.loads(file.read_text())
    [first] = answers(model, "Hi", system="Be kind.")
    assert [message["content"] for message in saved] == ["Be kind.", "Hi", first]
    _, out, _ = chat(monkeypatch, capsys, "More?\n", "--model", model, "--load", str(file), "--quiet")
    assert out == answers(model, "Hi", "More?", system="Be kind.")[1] + "\n"


def test_mistakes_are_one_line_each_and_end_nothing(model, monkeypatch, capsys, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    lines = ["/nope", "/save", f"/load {other}", f"/save {other}", "/policy", "/policy nope", "/policy swa x"]
    typed = "\n".join([*lines, "long " * 400, "/stats", "Hi", ""])
    status, out, err = chat(monkeypatch, capsys, typed, "--model", model)
    assert status == 0
    assert out == answers(model, "Hi")[0] + "\n"
    for words in (
        "There is no /nope",
        "/save needs a file",
        "holds no conversation",
        "needs a name",
        "'nope' is unknown",
        "'x' is no sparsity",
        "256 positions",
        "Nothing was said yet",
    ):
        assert words in err
    assert other.read_text() == '{"a": 1}'


def test_another_policy_answers_from_then_on(model, monkeypatch, capsys):
    _, out, err = chat(monkeypatch, capsys, "/policy dense\nHi\n/policy swa 0.5\n/help\n", "--model", model)
    assert "dense at sparsity 0.8" in err
    assert "swa at sparsity 0.5" in err
    assert "read 100% of K and V" in err
    assert "/system TEXT" in err
    assert out.strip()


def test_a_model_without_a_template_continues_the_text(monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, "The ship\n")
    assert status == 0
    assert "no chat template" in err
    assert out.strip()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--n", "2"], "--n is 2"),
        (["--url", "http://127.0.0.1:9"], "leave the others out"),
        (["--load", "/nowhere.json"], "cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(words, problem, monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, "", *words)
    assert (status, out) == (2, "")
    assert problem in err


def test_nobody_at_the_address(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['[{"role": "user"}]', '[{"role": "king", "content": ""}]', "[1]", "3", "{", '"a"'])
def test_what_is_no_conversation_is_refused(text, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"talk\.json"):
        load(file)


def test_a_conversation_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        Conversation().save(tmp_path / "no" / "such" / "folder.json")


def test_an_answer_steers_no_terminal():
    assert _shown("a\x1b[2Jb\n\tc\x07\x9bé海") == "a�[2Jb\n\tc��é海"

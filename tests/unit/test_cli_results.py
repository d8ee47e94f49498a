from __future__ import annotations

import json

import pytest

from alisa.cli.prompts import Prompt, each_sample
from alisa.cli.results import ResultFile, settings_digest
from alisa.errors import InputError

PROMPTS = each_sample([Prompt(text=text, name=text) for text in ("zero", "one", "two")], 1)
RUN = "0123456789ab"


def record(index: int, *, prompt: str | None = None, run: str = RUN) -> dict[str, object]:
    return {"index": index, "prompt": PROMPTS[index].text if prompt is None else prompt, "text": "é\n", "run": run}


def line(index: int, *, prompt: str | None = None, run: str = RUN) -> bytes:
    return json.dumps(record(index, prompt=prompt, run=run)).encode() + b"\n"


def test_each_result_is_in_the_file_when_append_returns(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, PROMPTS, RUN) as results:
        assert results.finished == frozenset()
        results.append(2, record(2))
        assert json.loads(path.read_text()) == record(2)
        results.append(0, record(0))
    assert [json.loads(text)["index"] for text in path.read_text().splitlines()] == [2, 0]


def test_a_later_run_knows_what_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(1) + line(2))
    with ResultFile(path, PROMPTS, RUN) as results:
        assert results.finished == {1, 2}
        results.append(0, record(0))
    assert path.read_bytes().count(b"\n") == 3


def test_more_or_fewer_texts_for_a_prompt_keep_those_that_are_there(tmp_path):
    path = tmp_path / "out.jsonl"
    three = each_sample([Prompt(text="zero", name="zero"), Prompt(text="one", name="one", settings={"n": 1})], 3)
    assert [(prompt.index, prompt.sample) for prompt in three] == [(0, 0), (0, 1), (0, 2), (1, None)]
    path.write_bytes(line(0))  # of a run with one text each
    with ResultFile(path, three, RUN) as results:
        assert results.finished == {0}
        results.append(2, record(0) | {"sample": 2})
    with ResultFile(path, three, RUN) as results:
        assert results.finished == {0, 2}
    with ResultFile(path, PROMPTS[:1], RUN) as results:
        assert results.finished == {0}


@pytest.mark.parametrize("length", [1, 5, 20])
def test_a_torn_last_line_is_cut_off(tmp_path, length):
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(1) + line(2)[:length])
    with ResultFile(path, PROMPTS, RUN) as results:
        assert results.finished == {1}
    assert path.read_bytes() == line(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(0, run="another"), r"line 1: comes from a run with another model, policy or sampling settings"),
        (line(0) + line(1, prompt="else"), r"line 2: its prompt or its settings are not those of prompt 1 of this run"),
        (line(0)[:-1].replace(b": 0", b": 3") + b"\n", r"line 1: its prompt or its settings are not those of prompt 3"),
        (line(0)[:-2] + b', "sample": [1]}\n', r"line 1: its prompt or its settings are not those of prompt 0"),
        (b"my notes\n", r"line 1: not a result of alisa generate"),
        (b'{"index": 0}\n', r"line 1: not a result"),
        (b"[1]\n", r"line 1: not a result"),
        (b"\xff\n", r"line 1: not a result"),
        (b"my notes, no line end", r"its last line is not a result"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        ResultFile(path, PROMPTS, RUN)
    assert "choose another --output, or delete the file" in str(caught.value)
    assert path.read_bytes() == content


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        ResultFile(tmp_path / "none" / "out.jsonl", PROMPTS, RUN)
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        ResultFile(tmp_path, PROMPTS, RUN)


def test_digest_changes_with_every_setting():
    settings = {"model": None, "sparsity": 0.8, "sampling": {"seed": 0, "stop": ("a",)}}
    digest = settings_digest(settings)
    assert digest == settings_digest(dict(reversed(settings.items())))
    assert digest != settings_digest(settings | {"sparsity": 0.9})
    assert digest != settings_digest(settings | {"sampling": {"seed": 1, "stop": ("a",)}})


def result(prompt: Prompt, index: int, **changes) -> bytes:
    own = {"id": prompt.id, "settings": prompt.settings} if prompt.id else {}
    return json.dumps({"index": index, **own, "prompt": prompt.text, "run": RUN, **changes}).encode() + b"\n"


def test_a_prompt_with_an_id_is_known_by_it_wherever_it_stands(tmp_path):
    a, b, c = (Prompt(text=text, name=text, id=text.upper(), settings={"seed": 1}) for text in "abc")
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(a, 0) + result(b, 1))
    with ResultFile(path, (c, b, a), RUN) as results:
        assert results.finished == {1, 2}
    other = Prompt(text="a", name="a", id="A", settings={"seed": 2})
    for prompts, message in (
        ((other, b), r"line 1: its prompt or its settings are not those of the prompt with the id 'A'"),
        ((a, c), r"line 2: .* the prompt with the id 'B' of this run"),
    ):
        with pytest.raises(InputError, match=message):
            ResultFile(path, prompts, RUN)


def test_a_prompt_that_was_not_usable_is_done_again_once_it_is_mended(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(PROMPTS[0], 0) + result(Prompt(text="", name=""), 1, finish_reason="error"))
    with ResultFile(path, PROMPTS, RUN) as results:
        assert results.finished == {0}
    with ResultFile(path, each_sample([PROMPTS[0], Prompt(text="", name="")], 1), RUN) as results:
        assert results.finished == {0, 1}

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from alisa.cli.files import STANDARD_INPUT
from alisa.cli.prompts import gather_prompts, read_prompts
from alisa.errors import InputError


def texts(prompts) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts)


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two \r\nthree", ("one", "two", "three")),
        ("a.TXT", "\ufeffbyte order mark\n", ("byte order mark",)),
        ("a.jsonl", '{"prompt": "one\\nline"}\n\n"two"\n', ("one\nline", "two")),
        ("a.jsonl", '{"instruction": "Add.", "input": "1 2", "output": "3"}\n', ("Add.\n\n1 2",)),
        ("a.jsonl", '{"instruction": "Tell.", "input": ""}\n{"instruction": "Say."}\n', ("Tell.", "Say.")),
        ("a.json", '[\n {"prompt": "one"},\n "two",\n {"instruction": "three"}\n]', ("one", "two", "three")),
    ],
)
def test_each_format_is_read(tmp_path, name, content, expected):
    assert texts(read_prompts(written(tmp_path, name, content))) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": \n', r'a\.jsonl, line 2: not valid JSON .*\{"prompt": "\.\.\."\}'),
        ("a.jsonl", '{"text": "one"}\n', r"line 1: found text \(string\), expected"),
        ("a.jsonl", '\n{"prompt": 3}\n', r"line 2: found prompt \(number\), expected"),
        ("a.jsonl", "{}\n", r"line 1: found no fields, expected"),
        ("a.jsonl", "[1]\n", r"line 1: a JSON list, expected"),
        ("a.jsonl", '{"instruction": "x", "input": null}\n', r"input \(null\), expected"),
        ("a.jsonl", "[" * 100_000 + "\n", r"line 1: not valid JSON"),
        ("a.jsonl", b'{"prompt": "ok"}\n{"prompt": "\xff"}\n', r"line 2: not UTF-8"),
        ("a.json", '{"prompt": "one"}', r"holds a JSON object, expected a list"),
        ("a.json", '["one", true]', r"entry 2: a JSON boolean"),
        ("a.json", "[", r"not valid JSON"),
        ("a.csv", "one\n", r"ends in none of \.jsonl, \.json and \.txt"),
        ("a.txt", "\n \n", r"holds no prompt"),
        ("a.json", "[]", r"holds no prompt"),
        ("a.jsonl", '"\\ud800"\n', r"line 1: the prompt is not valid Unicode"),
    ],
)
def test_each_fault_names_its_place_and_what_is_expected(tmp_path, name, content, message):
    source = written(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        gather_prompts((), source)
    assert source.name in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        read_prompts(folder)


def test_limit_takes_the_first_prompts(tmp_path):
    source = written(tmp_path, "a.txt", "one\ntwo\nthree\n")
    assert texts(gather_prompts((), source, 2)) == ("one", "two")
    assert texts(gather_prompts((), source, 9)) == ("one", "two", "three")
    with pytest.raises(InputError, match="--limit is 0"):
        gather_prompts((), source, 0)


def test_standard_input_holds_one_prompt_a_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    assert texts(gather_prompts((), STANDARD_INPUT)) == ("one", "two")


def test_exactly_one_source_of_prompts(tmp_path):
    assert texts(gather_prompts(("a", "b"), None)) == ("a", "b")
    with pytest.raises(InputError, match="give one of the two"):
        gather_prompts(("a",), STANDARD_INPUT)
    with pytest.raises(InputError, match=re.escape("or give --input FILE")):
        gather_prompts((), None)


def test_a_line_may_say_more_than_the_prompt(tmp_path):
    line = (
        '{"prompt": "one", "id": "a7", "max_tokens": 5, "stop": "x", "seed": null, "topic": "sea",'
        ' "metadata": {"page": 3}}'
    )
    [prompt] = read_prompts(written(tmp_path, "a.jsonl", line))
    assert prompt.id == "a7"
    assert prompt.settings == {"max_tokens": 5, "stop": "x"}
    assert prompt.metadata == {"topic": "sea", "page": 3}
    [plain] = read_prompts(written(tmp_path, "b.jsonl", '{"instruction": "two", "input": "", "output": "x"}'))
    assert (plain.id, plain.settings, plain.metadata) == (None, {}, {"output": "x"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b", "max_tokens": 1.5}', r"line 2: max_tokens is 1\.5, a whole number is needed"),
        ('{"prompt": "b", "top_p": 2, "seed": -1}', r"line 2: top_p is 2\.0, .*; seed is -1, allowed is 0 up to"),
        ('{"prompt": "b", "id": true}', r"line 2: its id is a JSON boolean, a string or a whole number is needed"),
        ('{"prompt": "b", "id": 1}', r"line 2: the id 1 is also that of .*a\.jsonl, line 1; ids must differ"),
    ],
)
def test_what_a_line_says_is_checked_with_its_number(tmp_path, line, message):
    source = written(tmp_path, "a.jsonl", '{"prompt": "a", "id": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_prompts(source)


def test_lines_that_cannot_be_used_are_kept_with_their_problem_when_asked_for(tmp_path):
    source = written(tmp_path, "a.jsonl", b'{"prompt": "ok"}\n{"promt": "x"}\n\xff\n{"prompt": "fine"}\n')
    first, second, third, last = read_prompts(source, keep_invalid=True)
    assert (first.problem, last.text) == (None, "fine")
    assert "line 2: found promt (string), expected" in second.problem
    assert "line 3: not UTF-8 text" in third.problem

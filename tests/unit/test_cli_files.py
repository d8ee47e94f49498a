"""S3, S9 and the JSON half of S2: files that a command writes, as kinds."""

from __future__ import annotations

import fcntl
import json
import os
import resource
from pathlib import Path

import pytest

from alisa.cli.files import STANDARD_INPUT, JsonLinesFile, json_line, refuse_same_file, to_json, write_whole
from alisa.cli.main import main
from alisa.errors import InputError


def opened(path: Path) -> JsonLinesFile:
    return JsonLinesFile(path, line_start=b'{"n": ', writer="number", way_out="choose another")


def test_one_file_under_two_names_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("x")
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    pairs = [(file, tmp_path / name) for name in ("a.jsonl", "soft", "hard", "folder/a.jsonl")]
    pairs += [(tmp_path / "new", tmp_path / "folder" / "new"), (tmp_path / "dangling", tmp_path / "new")]
    for one, other in pairs:
        with pytest.raises(InputError, match=r"--output and --report are the same file, .*; give each a file of its"):
            refuse_same_file({"--output": one, "--report": other})
    refuse_same_file({"--output": file, "--report": tmp_path / "b", "--input": None})
    refuse_same_file({"--output": Path("/dev/null"), "--report": Path("/dev/null")})


def test_standard_input_may_be_a_file_too(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("x")
    with file.open() as opened_file:
        saved = os.dup(0)
        os.dup2(opened_file.fileno(), 0)
        try:
            with pytest.raises(InputError, match="same file"):
                refuse_same_file({"--input": STANDARD_INPUT, "--output": file})
        finally:
            os.dup2(saved, 0)
            os.close(saved)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("generate --input {0} --output {0}", "--input and --output"),
        ("generate --input {0} --report {0}", "--input and --report"),
        ("generate a --output {1} --report {1}", "--output and --report"),
        ("generate a --report {0} --schedule {0}", "--report and --schedule"),
        ("plan --shape opt-125m --hardware {0} --save {0}", "--hardware and --save"),
        ("plan --shape opt-125m --hardware h200 --save {1} --plot {1}", "--save and --plot"),
        ("plot {0} --output {0}", "A file to draw and the figure"),
        ("eval ppl --text {0} --output {0}", "--text and --output"),
        ("eval recall --text {0} --output {0}", "--text and --output"),
        ("eval sparsity --text {0} --output {0}", "--text and --output"),
        ("eval qa --task copa,{0} --output {0}", "--task and --output"),
        ("bench run {0} --output {0}", "The experiment and --output"),
        ("bench plot {0} --output {0}", "The file of records and the figure"),
    ],
)
def test_no_command_writes_over_a_file_of_its_own(tmp_path, capsys, words, names):
    there, new = tmp_path / "there.jsonl", tmp_path / "new.jsonl"
    there.write_text('{"prompt": "keep me"}\n')
    assert main(words.format(there, new).split()) == 2
    error = capsys.readouterr().err
    assert f"{names} are the same file" in error
    assert error.count("\n") == 1
    assert there.read_text() == '{"prompt": "keep me"}\n'
    assert not new.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, "new")
    assert (target.read_text(), link.is_symlink()) == ("new", True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            write_whole(target, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link"]
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_whole(tmp_path / "none" / "a", "x")
    write_whole(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_lines_are_appended_by_one_at_a_time(tmp_path):
    path = tmp_path / "n.jsonl"
    with opened(path) as lines:
        lines.append({"n": 1})
        with pytest.raises(InputError, match=r"Another process is writing to .*n\.jsonl; wait until it has finished"):
            opened(path)
        lines.append({"n": 2})
    with opened(path) as lines:
        assert [record for _, record in lines.read()] == [{"n": 1}, {"n": 2}]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with opened(tmp_path / "n.jsonl") as lines:
        lines.append({"n": 1})
    assert (tmp_path / "n.jsonl").read_text() == '{"n": 1}\n'


def test_a_torn_line_is_cut_off_only_on_request(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2')
    with opened(path) as lines:
        assert [record for _, record in lines.read()] == [{"n": 1}]
        assert path.read_bytes().endswith(b'{"n": 2')
        lines.cut_torn_line()
        lines.append({"n": 3})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'


def test_json_has_no_nan_and_no_infinity():
    value = {"kl": float("nan"), "nested": [float("inf"), (1.5, -float("inf"))], "path": Path("a"), "set": {"b", "a"}}
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kl": None,
        "nested": [None, [1.5, None]],
        "path": "a",
        "set": ["a", "b"],
    }
    with pytest.raises(TypeError):
        to_json(object())


def test_half_a_surrogate_pair_survives():
    line = json_line({"text": "é \ud83d"})
    assert json.loads(line.decode("utf-8")) == {"text": "é \ud83d"}

"""The store of JSON lines: nothing is lost, nothing foreign is touched, and what is wrong is said in a sentence."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from alisa.errors import InputError
from alisa.lab.bench.compare import read_runs
from alisa.lab.eval.record_file import EVAL_LINES, eval_line, eval_record
from alisa.records.jsonl import JsonlFile, LineFormat, line_of, read_records
from alisa.records.structure import structure, structure_record

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LINES = LineFormat(
    what="a result of the test",
    first="index",
    key="index",
    complaint=lambda record: "it is the thirteenth" if record["index"] == 13 else None,
)


def record(index: int, **more: object) -> dict[str, object]:
    return {"index": index, "text": "é\n", **more}


def test_a_record_is_in_the_file_when_append_returns(tmp_path):
    path = tmp_path / "out.jsonl"
    with JsonlFile(path, LINES, sync=True) as file:
        file.append(record(2))
        assert path.read_bytes() == line_of(record(2))
        file.append(record(0))
    with JsonlFile(path, LINES) as file:
        assert file.keys == {0, 2}
        assert file.get(2) == record(2)
        file.append(record(2, text="newer"))
        assert file.get(2) == record(2, text="newer")
    assert read_records(path, LINES) == [record(2), record(0), record(2, text="newer")]


def test_without_a_path_records_are_remembered():
    with JsonlFile(None, LINES, lock=True) as file:
        file.append(record(1))
        assert file.get(1) == record(1)
        assert file.get(2) is None


@pytest.mark.parametrize("length", range(1, len(line_of(record(1))) - 1))
def test_a_torn_last_line_is_cut_off(tmp_path, length):
    path = tmp_path / "out.jsonl"
    path.write_bytes(line_of(record(0)) + line_of(record(1))[:length])
    assert read_records(path, LINES) == [record(0)]
    with JsonlFile(path, LINES) as file:
        assert file.keys == {0}
    assert path.read_bytes() == line_of(record(0))


def test_a_last_line_that_lacks_only_its_end_is_completed(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(line_of(record(0)) + line_of(record(1))[:-1])
    assert read_records(path, LINES) == [record(0), record(1)]
    with JsonlFile(path, LINES) as file:
        assert file.keys == {0, 1}
        file.append(record(2))
    assert path.read_bytes() == b"".join(line_of(record(index)) for index in range(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes\n", "line 1: not a result of the test"),
        (line_of(record(0)) + b"[1]\n", "line 2: not a result of the test"),
        (b"\xff\n", "line 1: not a result of the test"),
        (line_of(record(0)) + line_of(record(13)), "line 2: it is the thirteenth"),
        (b"my notes", "its last line is not a result of the test"),
        (b'{"index": null}', "its last line is not a result of the test"),
        (b'{"index": [1]', None),
    ],
)
def test_a_file_of_somebody_else_is_left_as_it_was(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    if message is None:  # it begins as ours do
        JsonlFile(path, LINES).close()
        assert path.read_bytes() == b""
        return
    with pytest.raises(InputError, match=message) as raised:
        JsonlFile(path, LINES)
    assert "choose another --output, or delete the file to start again." in str(raised.value)
    assert path.read_bytes() == content
    with pytest.raises(InputError, match=message):
        read_records(path, LINES)


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path):
    path = tmp_path / "out.jsonl"
    with JsonlFile(path, LINES, lock=True) as file:
        file.append(record(0))
        with pytest.raises(InputError, match="is being written by another process; wait for it, or choose another"):
            JsonlFile(path, LINES, lock=True)
        file.append(record(1))
    with JsonlFile(path, LINES, lock=True) as file:
        assert file.keys == {0, 1}


HOLDER = """
import sys
from pathlib import Path
from alisa.records.jsonl import JsonlFile, LineFormat
file = JsonlFile(Path(sys.argv[1]), LineFormat(what="a result", first="index", key="index"), lock=True)
file.append({"index": 0})
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(InputError, match="another process"):
                JsonlFile(path, LINES, lock=True)
        finally:
            process.kill()
    with JsonlFile(path, LINES, lock=True) as file:
        assert file.keys == {0}


def test_faults_of_the_system_are_sentences(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        JsonlFile(tmp_path / "none" / "out.jsonl", LINES)
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        JsonlFile(tmp_path, LINES)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_records(tmp_path / "none.jsonl", LINES)
    if Path("/dev/full").exists():
        with (
            JsonlFile(Path("/dev/full"), LINES, lock=True) as file,
            pytest.raises(InputError, match="No space left on device; 0 records are in it"),
        ):
            file.append(record(0))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named_and_not_written(tmp_path, number):
    path = tmp_path / "out.jsonl"
    with JsonlFile(path, LINES) as file, pytest.raises(InputError, match=rf"its parts\.times\[1\] is {number}, and"):
        file.append(record(0, parts={"times": [1.0, number]}))
    assert path.read_bytes() == b""


@dataclass(frozen=True)
class Point:
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Shape:
    name: str
    size: int
    kind: Literal["line", "area"]
    points: tuple[Point, ...]
    range: tuple[int, float] | None = None
    options: dict[str, int | float | str] | None = None
    more: dict[str, Any] | None = None

    def __post_init__(self):
        if self.size < 0:
            raise InputError(f"size is {self.size}, it must not be negative.")


SHAPE = {"name": "a", "size": 1, "kind": "area", "points": [{"x": 1}, {"x": 2, "y": 0.5}]}


def test_values_become_dataclasses():
    options = {"a": 1, "b": 1.0, "c": "d"}
    shape = structure(Shape, SHAPE | {"range": [1, 2], "options": options, "more": {"z": [None]}})
    assert shape == Shape("a", 1, "area", (Point(1.0), Point(2.0, 0.5)), (1, 2.0), options, {"z": [None]})
    assert [type(value) for value in shape.options.values()] == [int, float, str]
    assert type(shape.points[0].x) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "1"}, "size is '1', a whole number is needed"),
        ({"size": True}, "size is True, a whole number is needed"),
        ({"size": 1.0}, "size is 1.0, a whole number is needed"),
        ({"size": -1}, "size is -1, it must not be negative"),
        ({"name": None}, "name is None, a text is needed"),
        ({"kind": "dot"}, "kind is 'dot', there is line, area"),
        ({"points": "ab"}, "points is 'ab', a list is needed"),
        ({"points": [{"x": 1}, {"x": "2"}]}, "points[1].x is '2', a number is needed"),
        ({"points": [3]}, "points[0] is 3, a table is needed"),
        ({"range": [1]}, "range is [1], a list of 2 is needed"),
        ({"options": {"a": None}}, "options.a is None, a text is needed"),
        ({"sice": 2}, "does not know sice (is size meant?)"),
        ({"points": [{"z": 1}]}, "points[0].x is missing; points[0] does not know z"),
        ({"size": "1", "kind": "dot"}, "size is '1', a whole number is needed; kind is 'dot', there is line, area"),
    ],
)
def test_every_fault_is_told_with_its_place(change, message):
    with pytest.raises(InputError) as raised:
        structure(Shape, SHAPE | change)
    assert str(raised.value) == message
    with pytest.raises(InputError) as raised:
        structure(Shape, SHAPE | change, "shape[3]")
    assert "shape[3]" in str(raised.value) or "size" in change


def test_what_a_newer_version_wrote_is_read_without_what_is_new():
    assert structure_record(Point, {"x": 1.0, "z": 2}) == Point(1.0)
    with pytest.raises(InputError, match="x is missing"):
        structure_record(Point, {})


def test_records_of_earlier_versions_are_read():
    runs = sorted((RESULTS / "runs").glob("*.jsonl"))
    cells = sorted((RESULTS / "accuracy").glob("*.jsonl"))
    assert runs
    assert cells
    for path in runs:
        records = read_runs(path)
        assert records
        assert all(record.status != "ran" or record.figures is not None for record in records)
    for path in cells:
        lines = read_records(path, EVAL_LINES)
        assert [json.loads(json.dumps(eval_line(eval_record(line)))) for line in lines] == lines

import json

import pytest

from alisa.cli import bench
from alisa.cli.bench import BenchKernels, kernels_table
from alisa.cli.main import main, parse
from alisa.cli.screen import output_console
from alisa.errors import InputError
from alisa.kernels.native import library
from alisa.lab.bench.cases import CASES, DEFAULT_CASES, PolicyCase
from tests.unit.test_bench import OUTCOME, small

needs_kernels = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


def options(*words: str) -> BenchKernels:
    command = parse(["bench", "kernels", *words])
    assert isinstance(command, BenchKernels)
    return command


def test_cases_by_name():
    assert options().names == DEFAULT_CASES
    assert options("--case", "select", "f32-20", "select").names == ("select", "f32-20")
    assert options("--case", "all").names == tuple(CASES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "bf16-2"], "There is no case 'bf16-2'; did you mean bf16-20?"),
        (["--case", "nothing"], "There is no case 'nothing'; see --help?"),
        (["--runs", "1"], "runs is 1, at least 2"),
    ],
)
def test_values_out_of_range(words, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        options(*words)


def test_the_group_lists_its_commands(capsys):
    for argv in (["bench"], ["bench", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        out = capsys.readouterr().out
        assert "kernels  Time the native CPU kernels" in out
        assert "Every contender" not in out, "one line each"
    assert main(["bench", "kernel"]) == 2
    assert "did you mean bench kernels?" in capsys.readouterr().err


def test_the_table_leaves_out_what_nobody_measured(capsys):
    output_console().print(kernels_table({"bf16-20": OUTCOME}))
    head, line = capsys.readouterr().out.splitlines()
    assert "dense SDPA" in head
    assert "torch reference" not in head
    assert line.split() == ["bf16-20", "200", "(200", "300)", "1.3", "50%", "1000", "5.0x"]


@needs_kernels
def test_a_run_ends_in_a_record_on_the_screen_and_in_the_file(capsys, tmp_path, monkeypatch):
    cases = {"select": small(PolicyCase(work="select")), "bf16-20": small(CASES["bf16-20"])}
    monkeypatch.setattr(bench, "CASES", cases)
    path = tmp_path / "kernels.jsonl"
    words = ["bench", "kernels", "--case", "all", "--runs", "2", "--json", "--isa", "portable", "--output", str(path)]
    for runs in (1, 2):
        assert main(words) == 0
        *screen, last = capsys.readouterr().out.splitlines()
        assert screen[0].startswith("portable kernels")
        record = json.loads(last)
        assert [case["case"] for case in record["cases"]] == ["select", "bf16-20"]
        assert record["isa"] == "portable"
        assert len(path.read_text().splitlines()) == runs
        assert json.loads(path.read_text().splitlines()[-1]) == record


@needs_kernels
def test_a_file_that_cannot_be_written_is_said_before_the_work(capsys, tmp_path):
    assert main(["bench", "kernels", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"alisa: error: {tmp_path} cannot be written: Is a directory.\n"

"""The command as a process of its own, with a model that needs no weights: signals, pipes, full disks, statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C reaches the programs that are started, even where the tests run in the background of a script: there a
    shell has it ignored, and what is ignored is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*options: str, word_s: float = 0.0, stdout: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.fake", "generate", *options],
        cwd=ROOT,
        env={
            **os.environ,
            "FAKE_WORD_S": str(word_s),
            "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        },
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "no result was written"
        time.sleep(0.01)


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    path, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ("a", "b", "c", "d", "e", "--max-tokens", "4", "--report", str(tmp_path / "report.jsonl"))
    process = start(*options, "--output", str(path), "--json", word_s=0.05)
    wait_for_lines(path, 2)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130
    num_kept = path.read_bytes().count(b"\n")
    assert 2 <= num_kept < 5
    assert f"interrupted: {num_kept} of 5 prompts are in {path}; run the same command again to go on." in err
    assert "Traceback" not in err
    record = json.loads(out.splitlines()[-1])
    assert (record["complete"], record["num_finished"]) == (False, num_kept)
    last = json.loads((tmp_path / "report.jsonl").read_text().splitlines()[-1])
    assert last == {"kind": "summary", "complete": False}

    assert finish(start(*options, "--output", str(path)))[0] == 0
    assert finish(start(*options, "--output", str(whole)))[0] == 0
    assert sorted(path.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    process = start("a", "b", "c", "--max-tokens", "4", "--output", str(path), word_s=0.05)
    wait_for_lines(path, 1)
    process.kill()
    finish(process)
    assert finish(start("a", "b", "c", "--max-tokens", "4", "--output", str(path)))[0] == 0
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2]


def test_ctrl_c_without_a_file_counts_what_was_shown():
    process = start("a", "--max-tokens", "400", word_s=0.05)
    assert process.stdout is not None
    assert process.stdout.read(4) == "a A "
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert "interrupted: 0 of 1 prompts were finished." in err


def test_full_disk_is_one_sentence_and_status_2():
    status, _, err = finish(start("a", "--output", "/dev/full"))
    assert status == 2
    assert err.splitlines()[-1].startswith("alisa: error: /dev/full cannot be written: No space left on device")
    assert "Traceback" not in err


def test_standard_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        status, _, err = finish(start("a", "--quiet", stdout=full.fileno()))
    assert status == 2
    assert err == "alisa: error: standard output: No space left on device.\n"


def test_a_reader_that_goes_away_ends_the_run_quietly():
    with start("a", "--max-tokens", "2000", word_s=0.001) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_text_appears_while_it_is_made():
    process = start("a", "--max-tokens", "4000", word_s=0.05)
    assert process.stdout is not None
    assert process.stdout.read(6) == "a A w0"
    assert process.poll() is None, "it still runs"
    process.kill()
    finish(process)

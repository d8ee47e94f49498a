"""The command as a process of its own, with a model that needs no weights: signals, pipes, full disks, statuses."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.forks import ROOT, Forks


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def start(forks):
    return forks.start


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "no result was written"
        time.sleep(0.01)


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(start, tmp_path):
    path, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ("a", "b", "c", "d", "e", "--max-tokens", "4", "--report", str(tmp_path / "report.jsonl"))
    process = start(*options, "--output", str(path), "--json", word_s=0.05)
    wait_for_lines(path, 2)
    process.send_signal(signal.SIGINT)
    status, out, err = process.finish()
    assert status == 130
    num_kept = path.read_bytes().count(b"\n")
    assert 2 <= num_kept < 5
    assert f"interrupted: {num_kept} of 5 prompts are in {path}; run the same command again to go on." in err
    assert "Traceback" not in err
    record = json.loads(out.splitlines()[-1])
    assert (record["complete"], record["num_finished"]) == (False, num_kept)
    last = json.loads((tmp_path / "report.jsonl").read_text().splitlines()[-1])
    assert last == {"kind": "summary", "complete": False}

    assert start(*options, "--output", str(path)).finish()[0] == 0
    assert start(*options, "--output", str(whole)).finish()[0] == 0
    assert sorted(path.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_sigterm_keeps_what_is_finished_as_ctrl_c_does(start, tmp_path):
    path, report = tmp_path / "out.jsonl", tmp_path / "report.jsonl"
    options = ("a", "b", "c", "d", "e", "--max-tokens", "4", "--output", str(path), "--report", str(report))
    process = start(*options, word_s=0.05)
    wait_for_lines(path, 2)
    process.send_signal(signal.SIGTERM)
    status, _, err = process.finish()
    assert status == 143
    assert "of 5 prompts are in" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert json.loads(report.read_text().splitlines()[-1]) == {"kind": "summary", "complete": False}
    assert start(*options).finish()[0] == 0
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2, 3, 4]


def test_a_second_writer_is_refused_and_nothing_is_there_twice(start, tmp_path):
    path = tmp_path / "out.jsonl"
    options = ("a", "b", "c", "--max-tokens", "4", "--output", str(path))
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a process holds it that is at work
        status, out, err = start(*options).finish()
    assert (status, out) == (2, "")
    assert err == (
        f"alisa: error: Another process is writing to {path}; wait until it has finished, or choose another file.\n"
    )
    assert start(*options).finish()[0] == 0
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2]


def test_a_run_at_work_holds_the_lock(start, tmp_path):
    path = tmp_path / "out.jsonl"
    process = start("a", "b", "c", "--max-tokens", "1000", "--output", str(path), word_s=0.002)
    wait_for_lines(path, 1)
    process.send_signal(signal.SIGSTOP)
    with path.open("ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.send_signal(signal.SIGKILL)
    process.finish()
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_that_fills_up_loses_nothing_that_is_finished(start, tmp_path):
    path, report = tmp_path / "out.jsonl", tmp_path / "report.jsonl"
    options = ("a", "b", "c", "d", "--max-tokens", "3", "--output", str(path), "--report", str(report))
    status, _, err = start(*options, file_bytes=1000).finish()
    assert status == 2
    message = err.splitlines()[-1]
    num_kept = path.read_bytes().count(b"\n")
    assert 1 <= num_kept < 4
    assert f"{path} cannot be written: File too large; {num_kept} of 4 prompts are in it." in message
    assert report.read_text().splitlines()
    assert start(*options).finish()[0] == 0
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2, 3]
    assert json.loads(report.read_text().splitlines()[-1])["complete"] is True


def closed(redirection: str, *options: str) -> tuple[int, str, str]:
    """A run whose standard streams are as the shell's `redirection` makes them."""
    command = f'exec "$0" -m tests.cli.fake generate "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    assert forks.start("a", "b", "--output", str(path)).finish()[0] == 0
    return path.read_text()


@pytest.mark.parametrize(
    "redirection",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-")), "<&- >&- 2>&-", "2>/dev/full"],
)
def test_results_do_not_depend_on_standard_streams(tmp_path, undisturbed, redirection):
    path = tmp_path / "out.jsonl"
    status, _, err = closed(redirection, "a", "b", "--json", "--output", str(path))
    assert status == 0, err
    assert "Traceback" not in err
    assert path.read_text() == undisturbed


def test_text_is_on_standard_output_when_standard_error_is_closed():
    assert closed("2>&-", "a", "--max-tokens", "2") == (0, "a A w0\n", "")
    assert closed(">&-", "a", "--polcy", "x")[0] == 2


def test_a_killed_run_goes_on(start, tmp_path):
    path = tmp_path / "out.jsonl"
    process = start("a", "b", "c", "--max-tokens", "4", "--output", str(path), word_s=0.05)
    wait_for_lines(path, 1)
    process.send_signal(signal.SIGKILL)
    process.finish()
    assert start("a", "b", "c", "--max-tokens", "4", "--output", str(path)).finish()[0] == 0
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2]


def test_ctrl_c_without_a_file_counts_what_was_shown(start):
    process = start("a", "--max-tokens", "400", word_s=0.05)
    assert process.stdout is not None
    assert process.stdout.read(4) == "a A "
    process.send_signal(signal.SIGINT)
    status, _, err = process.finish()
    assert status == 130
    assert "interrupted: 0 of 1 prompts were finished." in err


def test_full_disk_is_one_sentence_and_status_2(start):
    status, _, err = start("a", "--output", "/dev/full").finish()
    assert status == 2
    assert err.splitlines()[-1].startswith("alisa: error: /dev/full cannot be written: No space left on device")
    assert "Traceback" not in err


def test_standard_output_on_a_full_disk(start):
    with open("/dev/full", "w") as full:
        status, _, err = start("a", "--quiet", stdout=full.fileno()).finish()
    assert status == 2
    assert err == "alisa: error: standard output: No space left on device.\n"


def test_a_reader_that_goes_away_ends_the_run_quietly(start):
    with start("a", "--max-tokens", "2000", word_s=0.001) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_text_appears_while_it_is_made(start):
    process = start("a", "--max-tokens", "4000", word_s=0.05)
    assert process.stdout is not None
    assert process.stdout.read(6) == "a A w0"
    assert process.is_running()
    process.send_signal(signal.SIGKILL)
    process.finish()

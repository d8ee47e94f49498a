import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import alisa
from alisa.cli.doctor import report
from alisa.cli.main import main
from alisa.doctor.finding import Finding, Status


def test_one_screen_and_one_json_line(capsys, tmp_path):
    assert main(["doctor", "--kv-disk-path", str(tmp_path), "--json"]) == 0
    *screen, last = capsys.readouterr().out.splitlines()
    assert 10 < len(screen) < 40
    record = json.loads(last)
    assert record["command"] == "doctor"
    assert not record["broken"]
    assert [finding["topic"] for finding in record["findings"]][:2] == ["versions", "model"]
    assert record["facts"]["disk_tier"]["path"] == str(tmp_path)
    assert f"{tmp_path}" in "".join("".join(screen).split())


def test_a_place_that_is_not_there_is_a_problem(capsys, tmp_path):
    assert main(["doctor", "--kv-disk-path", str(tmp_path / "missing")]) == 1
    assert "problem" in capsys.readouterr().out


def test_a_given_model_is_looked_at(capsys, tmp_path):
    embedded = str(Path(alisa.__file__).parent / "embedded")
    assert main(["doctor", "--model", embedded, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"][-1]
    assert (last["status"], last["topic"]) == ("ok", "given model")
    assert re.search(r": llama, \d+ million parameters, .* no chat template$", last["text"])
    assert main(["doctor", "--model", str(tmp_path), "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"][-1]
    assert last["status"] == "problem"
    assert "no config.json" in last["text"]


@pytest.mark.parametrize(("status", "expected"), [(Status.OK, 0), (Status.NOTE, 0), (Status.PROBLEM, 1)])
def test_only_what_is_broken_changes_the_exit_status(status, expected, capsys):
    findings = [Finding(Status.OK, "a", "fine"), Finding(status, "b", "[b]text[/b]", "do [this]")]
    assert report(findings, None, json_record=False) == expected
    out = capsys.readouterr().out
    assert "[b]text[/b]" in out
    assert "-> do [this]" in out


def test_a_torch_that_cannot_be_imported_is_a_finding_too(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from alisa.cli.main import main
sys.exit(main(["doctor", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["broken"]
    assert record["facts"] is None
    [finding] = record["findings"]
    assert "libcudart.so" in finding["text"]
    assert "reinstall" in finding["way_out"]

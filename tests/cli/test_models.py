"""`alisa generate` from end to end, on real weights: a tiny random checkpoint, and the trained model of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import alisa as alisa_package
from alisa.cli.main import main
from tests import tiny_models

ROOT = Path(__file__).parents[2]
EMBEDDED = Path(alisa_package.__file__).with_name("embedded") / "model.safetensors"
needs_embedded = pytest.mark.skipif(not EMBEDDED.exists(), reason="the model inside the package is not there")


def alisa(*options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alisa", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A checkpoint whose tokenizer knows the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tiny_models.save(tiny_models.build("llama-gqa-tied"), tmp_path_factory.mktemp("model"))
    words = {f"w{index}": index for index in range(tiny_models.config_of("llama-gqa-tied").vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"unk_token": "w0"}))
    return str(directory)


def test_a_batch_with_report_verify_and_json(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": " ".join(f"w{n}" for n in range(size))}) + "\n" for size in (3, 40, 9))
    )
    output, report = tmp_path / "out.jsonl", tmp_path / "report.jsonl"
    options = ("generate", "--model", model, "--input", str(prompts), "--output", str(output), "--ignore-eos")
    done = alisa(
        *options, "--max-tokens", "20", "--report", str(report), "--verify", "--json", "--kv-device-memory", "1MB"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    assert all(len(result["token_ids"]) == 20 for result in results)
    summary = record["summary"]
    assert summary["output_tokens"] == 60
    assert 0 < summary["kv_peak_bytes"] <= summary["kv_cap_bytes"] == 1_000_000
    assert 0 < summary["tokens_attended"] < summary["tokens_dense"]
    assert 0 <= record["verified"]["top1_agreement"] <= 1
    kinds = [json.loads(line)["kind"] for line in report.read_text().splitlines()]
    assert kinds == ["run", *["step"] * (len(kinds) - 2), "summary"]
    assert len(kinds) > 20
    assert "KV read" in done.stderr


def test_continuing_with_another_batch_size_gives_the_same_lines(model, tmp_path):
    prompts = "w1 w2 w3\nw9 w8 w7 w6 w5\nw4\n"
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = (
        "generate",
        "--model",
        model,
        "--input",
        "-",
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--ignore-eos",
    )
    assert alisa(*options, "--output", str(whole), stdin=prompts).returncode == 0
    part.write_bytes(whole.read_bytes().splitlines(keepends=True)[0] + b'{"index": ')
    done = alisa(*options, "--output", str(part), "--max-num-seqs", "1", stdin=prompts)
    assert done.returncode == 0, done.stderr

    def answers(path: Path) -> dict[int, list[int]]:
        records = map(json.loads, path.read_text().splitlines())
        return {record["index"]: record["token_ids"] for record in records}

    assert answers(part) == answers(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such-model-here", "w1"], "no/such-model-here"),
        (["--model", "{model}", "w1 " * 200], "128 positions"),
        (["--model", "{model}", "w1", "--kv-device-memory", "10B"], "--kv-device-memory"),
        (["--model", "{model}", "w1", "--chat"], "chat template"),
        (["--model", str(ROOT / "tests"), "w1"], str(ROOT / "tests")),
    ],
)
def test_what_the_caller_can_mend(model, options, message, capsys):
    assert main(["generate", *[option.format(model=model) for option in options]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("alisa: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_user_without_a_home_gets_results_all_the_same(model, tmp_path):
    """As in a container with an unknown user id: neither HOME nor a line in the list of users."""
    path = tmp_path / "out.jsonl"
    code = (
        "import pwd, sys\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from alisa.cli.main import run\n"
        "run()\n"
    )
    hidden = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    words = ("generate", "w1 w2", "--model", model, "--max-tokens", "3", "--ignore-eos", "--output", str(path))
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads(path.read_text())["token_ids"]) == 3


@needs_embedded
def test_the_model_of_the_package_continues_a_prompt():
    done = alisa("generate", "The old house stood at the end of the", "--max-tokens", "24", "--verify", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["engine"]["model"] == "embedded"
    assert record["results"][0]["text"].strip()
    assert "verified" in done.stderr


@needs_embedded
@pytest.mark.slow
def test_the_demo_runs():
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "same next token as dense" in done.stdout

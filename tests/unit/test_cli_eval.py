"""The command line of the evaluations, with the model inside the package."""

import json

import pytest

from alisa.cli.main import main, parse
from alisa.config import EngineConfig, PolicyName

TEXT = "The ship had been at sea for many days. The captain came on deck in the morning and looked at the sky. " * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return str(path)


def test_lists_are_read_from_commas():
    args = parse(
        ["eval", "ppl", "--text", "a.txt", "--policy", "swa, sketch", "--sparsity", "0,.5", "--kv-dtype", "int8"]
    )
    assert args.sweep.policies == ("swa", "sketch")
    assert args.sweep.sparsities == (0.0, 0.5)
    assert args.sweep.kv_dtypes == ("int8",)
    assert parse(["eval", "ppl", "--text", "a.txt"]).sweep.policies == PolicyName.__args__


def test_ppl_writes_cells_resumes_and_prints_a_table(text, tmp_path, capsys):
    output = tmp_path / "cells.jsonl"
    options = ["eval", "ppl", "--text", text, "--policy", "swa", "--context", "80", "--prefill", "30", "--windows", "2"]
    options += ["--output", str(output), "--json"]
    assert main([*options, "--sparsity", "0.5"]) == 0
    first = output.read_text()
    assert main([*options, "--sparsity", "0.5,0.8"]) == 0
    assert output.read_text().startswith(first)
    assert len(output.read_text().splitlines()) == len(first.splitlines()) + 1 == 3
    out = capsys.readouterr().out
    assert "book.txt, embedded: perplexity over that of dense attention" in out
    record = json.loads(out.splitlines()[-1])
    assert [(cell["policy"], cell["sparsity"]) for cell in record["cells"]] == [
        ("dense", 0),
        ("swa", 0.5),
        ("swa", 0.8),
    ]
    assert record["command"] == "eval ppl"


def test_recall_qa_generation_and_sparsity_run(text, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "The sky is", "choices": ["blue", "made of wood"], "answer": 0}\n')
    sweep = ["--policy", "sketch", "--sparsity", "0.5", "--json"]
    for words in (
        ["recall", "--task", "needle,copy", "--length", "150", "--depth", "0,1", "--repeats", "1"],
        ["qa", "--task", str(questions)],
        ["generation", "--text", text, "--prompt", "30", "--max-tokens", "8", "--texts", "1"],
        ["sparsity", "--text", text, "--context", "80", "--prefill", "30", "--windows", "1"],
    ):
        assert main(["eval", *words, *sweep]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(record["cells"]) == (4 if words[0] == "recall" else 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "pp"], "There is no command 'eval pp'; did you mean eval ppl?"),
        (["eval", "ppl", "--text", "none.txt"], "There is no file or directory none.txt"),
        (["eval", "ppl", "--text", "x", "--policy", "swa,best"], "There is no policy 'best'; there is dense, local"),
        (["eval", "ppl", "--text", "x", "--sparsity", "0.5,1"], "sparsity is 1.0"),
        (["eval", "ppl", "--text", "x", "--sparsity", "half"], "'half' is no list of sparsities"),
        (["eval", "recall", "--task", "chess"], "There is no recall task 'chess'; there is needle, multi"),
        (["eval", "qa", "--task", "piqa"], "--data DIR"),
    ],
)
def test_what_the_caller_can_mend_is_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_family_has_its_own_list(capsys):
    for words in (["eval"], ["eval", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        out = capsys.readouterr().out
        assert "recall" in out
        assert "generate" not in out.split("subcommands")[1]


def test_evaluations_offer_the_engine_options_that_they_use(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["eval", "ppl", "--help"])
    out = capsys.readouterr().out
    assert "--policy NAME[,NAME...]" in out
    assert "{dense," not in out, "the engine's own choice of one policy"
    assert "--kv-device-memory" in out
    assert "--schedule " not in out
    engine = parse(["eval", "ppl", "--text", "a", "--model", "x", "--max-num-seqs", "3"]).sweep.engine
    assert (engine.model, engine.max_num_seqs, engine.policy) == ("x", 3, EngineConfig().policy)

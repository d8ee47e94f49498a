from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from alisa.cli.generate import Generate, run_generate
from alisa.cli.main import parse
from alisa.cli.results import settings_digest
from alisa.cli.screen import ResultList
from alisa.config import EngineConfig, SamplingParams
from alisa.errors import InputError
from alisa.model.own_sampling import with_own_sampling
from alisa.planner.cost import StepCost
from tests.cli.fake import FakeLLM, FakeVerifyReport


@pytest.fixture(autouse=True)
def _the_fake_verifies(monkeypatch):
    monkeypatch.setattr("alisa.lab.verify.verify_outputs", lambda llm, outputs: llm.verify(outputs))
    monkeypatch.setattr("alisa.lab.predict.predict", lambda report, hardware: StepCost(linear_s=0.4, attention_s=0.2))


def generate(*options: str) -> tuple[int, list[FakeLLM]]:
    """Exit status of `alisa generate` with these options, and the models it made."""
    made: list[FakeLLM] = []

    def make_llm(config, progress) -> FakeLLM:
        made.append(FakeLLM(config, progress))
        return made[-1]

    args = parse(["generate", *options])
    assert isinstance(args, Generate)
    return run_generate(args, make_llm), made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_is_followed_by_its_text(capsys):
    status, _ = generate("one", "--max-tokens", "3", "--seed", "7")
    captured = capsys.readouterr()
    assert status == 0
    assert captured.out == "one ONE w7 w7\n"
    assert "sketch, sparsity 0.8" in captured.err
    assert "20% of what dense attention reads" in captured.err


def test_many_prompts_are_printed_in_their_order(capsys):
    generate("a", "b", "c", "--max-tokens", "2", "--quiet")
    captured = capsys.readouterr()
    assert captured.out == (
        "--- prompt 1 of 3: 2 tokens, length\na A w0\n\n"
        "--- prompt 2 of 3: 2 tokens, length\nb B w1\n\n"
        "--- prompt 3 of 3: 2 tokens, length\nc C w2\n\n"
    )
    assert captured.err == ""


def test_chat_frames_the_prompt_and_sets_the_answer_apart(capsys):
    generate("hi", "--chat", "--max-tokens", "1", "--quiet")
    assert capsys.readouterr().out == "hi\n\n <USER>HI\n"


@pytest.mark.parametrize("prompts", [("one",), ("one", "two")])
def test_json_is_the_last_line_and_complete(capsys, prompts):
    generate(*prompts, "--max-tokens", "2", "--json", "--verify")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["command"] == "generate"
    assert record["complete"] is True
    assert record["num_finished"] == record["num_prompts"] == len(prompts)
    assert [result["prompt"] for result in record["results"]] == list(prompts)
    assert record["summary"]["output_tokens"] == 2 * len(prompts)
    assert record["verified"]["top1_agreement"] == 0.975


def test_verify_looks_at_the_outputs_and_reports(capsys):
    _, [llm] = generate("a", "b", "--verify")
    assert llm.num_verified == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "97.5% of 40 next tokens as dense attention picks them" in error
    assert "attention mass lost 4.0%" in error


def test_results_go_to_the_file_as_records(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    generate("a", "b", "--max-tokens", "2", "--output", str(path), "--json")
    first, second = lines(path)
    assert (first["index"], second["index"]) == (1, 0), "in the order of finishing"
    assert first["text"] == " B w1"
    assert first["token_ids"] == [0, 1]
    assert first["finish_reason"] == "length"
    assert set(first["timings"]) == {"queue_s", "prefill_s", "first_token_s", "decode_s"}
    assert first["tokens_dense"] == 100
    [record] = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["output"] == str(path)
    assert record["results"] is None
    assert record["run"] == first["run"]


def test_a_continued_run_gives_what_an_uninterrupted_one_gives(tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = ("a", "b", "c", "d", "--max-tokens", "3")
    generate(*options, "--output", str(whole))
    kept = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(kept[0] + kept[1] + kept[2][:30])
    _, [llm] = generate(*options, "--output", str(part), "--max-num-seqs", "1")
    assert len(llm.records) == 2, "only the two missing prompts were run"

    def by_index(path: Path) -> list[dict]:
        return sorted(lines(path), key=lambda record: record["index"])

    assert by_index(part) == by_index(whole)


def test_nothing_left_to_do_loads_no_model(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    generate("a", "--output", str(path))
    capsys.readouterr()
    status, made = generate("a", "--output", str(path), "--json")
    captured = capsys.readouterr()
    assert status == 0
    assert not made
    assert f"All 1 prompts are already in {path}" in captured.err
    assert json.loads(captured.out)["num_finished"] == 1


@pytest.mark.parametrize(
    "change",
    [
        ("--seed", "1"),
        ("--sparsity", "0.5"),
        ("--model", "x"),
        ("--stop", "a"),
        ("--chat",),
        ("--dtype", "float32"),
        ("--weight-dtype", "int8"),
        ("--max-model-len", "70"),
    ],
)
def test_other_settings_do_not_continue_a_file(tmp_path, change):
    path = tmp_path / "out.jsonl"
    generate("a", "--output", str(path))
    before = path.read_bytes()
    with pytest.raises(InputError, match="another model, policy or sampling settings"):
        generate("a", "b", "--output", str(path), *change)
    assert path.read_bytes() == before


def test_settings_that_never_change_a_token_may_differ(tmp_path):
    path = tmp_path / "out.jsonl"
    generate("a", "--output", str(path))
    generate(
        "a",
        "b",
        "--output",
        str(path),
        "--max-num-seqs",
        "2",
        "--prefill-chunk",
        "7",
        "--kv-device-memory",
        "1GiB",
        "--quiet",
    )
    assert [record["prompt"] for record in lines(path)] == ["a", "b"]


def test_report_has_the_run_its_steps_and_the_summary(tmp_path):
    path = tmp_path / "report.jsonl"
    generate("a", "b", "--report", str(path))
    run, *steps, summary = lines(path)
    sampling = {**asdict(SamplingParams()), "stop": [], "stop_ids": [], "logit_bias": []}
    assert run == {"kind": "run", **EngineConfig().describe(), "model": "fake", "sampling": sampling}
    assert [(step["kind"], step["step"]) for step in steps] == [("step", 0), ("step", 1)]
    assert steps[0]["phase"] == "device"
    assert summary["kind"] == "summary"
    assert summary["complete"] is True
    assert summary["kv_peak_bytes"] == 2**20


def test_a_report_is_continued_and_never_emptied(tmp_path):
    path, output = tmp_path / "report.jsonl", tmp_path / "out.jsonl"
    options = ("a", "b", "--output", str(output), "--report", str(path))
    generate(*options)
    first = path.read_bytes()
    status, made = generate(*options)
    assert (status, made) == (0, [])
    assert path.read_bytes() == first, "nothing was left to do"
    output.write_bytes(output.read_bytes().splitlines(keepends=True)[0])
    path.write_bytes(first + b'{"kind": "st')
    generate(*options)
    assert path.read_bytes().startswith(first)
    assert [record["kind"] for record in lines(path)] == ["run", "step", "step", "summary", "run", "step", "summary"]


@pytest.mark.parametrize("content", ["my notes\n", '{"index": 0}\n', "notes without an end"])
def test_a_report_over_something_else_is_refused(tmp_path, content):
    path = tmp_path / "report.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="not a record of alisa generate; choose another --report"):
        generate("a", "--report", str(path))
    assert path.read_text() == content


def test_the_report_says_every_option_and_the_seed(tmp_path):
    path = tmp_path / "report.jsonl"
    generate(
        "a",
        "--report",
        str(path),
        "--max-model-len",
        "50",
        "--kv-device-memory",
        "1GiB",
        "--schedule",
        "x.json",
        "--seed",
        "9",
    )
    run = lines(path)[0]
    assert {option.name for option in fields(EngineConfig)} <= run.keys()
    assert run["sampling"]["seed"] == 9
    assert (run["max_model_len"], run["kv_device_memory"], run["schedule"]) == (50, "1GiB", "x.json")


def test_equal_prompts_have_seeds_of_their_own(capsys):
    generate("a", "a", "a", "--max-tokens", "2", "--seed", "7", "--quiet")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("a ")] == [
        "a A w7",
        "a A w8",
        "a A w9",
    ]


def written(tmp_path: Path, *records: dict) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_line_has_settings_an_id_and_other_fields_of_its_own(tmp_path):
    source = written(
        tmp_path,
        {"prompt": "a", "id": "x", "max_tokens": 2, "seed": 5, "topic": "sea"},
        {"prompt": "b", "id": 7, "max_tokens": None},
        {"prompt": "c", "metadata": {"page": 1}},
    )
    output = tmp_path / "out.jsonl"
    generate("--input", source, "--output", str(output), "--max-tokens", "3", "--seed", "100")
    first, second, third = sorted(lines(output), key=lambda record: record["index"])
    assert (first["text"], second["text"], third["text"]) == (" A w5", " B w101 w101", " C w102 w102")
    assert (first["id"], second["id"], "id" in third) == ("x", 7, False)
    assert (first["settings"], "settings" in second) == ({"max_tokens": 2, "seed": 5}, False)
    assert (first["metadata"], third["metadata"]) == ({"topic": "sea"}, {"page": 1})


def test_a_file_is_resumed_by_its_ids(tmp_path):
    a, b, c = ({"prompt": name, "id": name} for name in "abc")
    output = tmp_path / "out.jsonl"
    generate("--input", written(tmp_path, a, b), "--output", str(output))
    generate("--input", written(tmp_path, c, b, a), "--output", str(output))
    assert sorted((record["id"], record["index"]) for record in lines(output)) == [("a", 0), ("b", 1), ("c", 0)]


def test_invalid_prompts_are_refused_with_their_line(tmp_path):
    source = written(tmp_path, {"prompt": "fine"}, {"prompt": "b" * 2000})
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 2: the prompt is too long"):
        generate("--input", source)


def test_invalid_prompts_are_skipped_on_request(tmp_path, capsys):
    source = Path(written(tmp_path, {"prompt": "a"}, {"promt": "x"}, {"prompt": "b" * 2000, "id": 3}, {"prompt": "c"}))
    output = tmp_path / "out.jsonl"
    options = ("--input", str(source), "--skip-invalid", "--output", str(output), "--quiet", "--json")
    status, [llm] = generate(*options)
    captured = capsys.readouterr()
    assert status == 0
    assert len(llm.records) == 2
    assert captured.err.startswith("skipped 2 of 4 prompts; first: ")
    assert set(json.loads(captured.out)["skipped"]) == {"1", "2"}
    unread, long = (record for record in lines(output) if record["finish_reason"] == "error")
    assert "line 2: found promt (string), expected" in unread["error"]
    assert (long["id"], long["index"], long["text"]) == (3, 2, None)
    assert long["error"] == f"{source}, line 3: the prompt is too long."
    before = output.read_bytes()
    assert generate(*options) == (0, []), "a later run does not try them again"
    assert output.read_bytes() == before
    source.write_text(source.read_text().replace('{"promt"', '{"prompt"'))
    generate(*options)
    assert lines(output)[-1]["prompt"] == "x"


def test_skipped_prompts_are_shown_in_their_place(tmp_path, capsys):
    source = written(tmp_path, {"prompt": "a"}, {"prompt": "b" * 2000}, {"prompt": "c"})
    assert generate("--input", source, "--skip-invalid", "--max-tokens", "1")[0] == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert heads == [
        "--- prompt 1 of 3: 1 tokens, length",
        "--- prompt 2 of 3: skipped",
        "--- prompt 3 of 3: 1 tokens, length",
    ]


def test_nothing_but_invalid_prompts_is_no_error(tmp_path, capsys):
    assert generate("--input", written(tmp_path, {"prompt": "b" * 2000}), "--skip-invalid")[0] == 0
    assert "skipped 1 of 1 prompts" in capsys.readouterr().err


def test_no_line_of_json_has_nan(tmp_path, capsys, monkeypatch):
    report = FakeVerifyReport(float("nan"), float("inf"), 0.04, 1, 40)
    monkeypatch.setattr("alisa.lab.verify.verify_outputs", lambda llm, outputs: report)
    generate("a", "--verify", "--json")
    record = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert record["verified"]["mean_kl"] is None


def test_a_run_without_new_options_has_the_digest_of_version_0_1():
    settings = {
        "model": None,
        "policy": "sketch",
        "sparsity": 0.8,
        "dtype": "auto",
        "kv_dtype": "auto",
        "device": "auto",
    }
    sampling = {
        "max_tokens": 128,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": ("a",),
        "stop_ids": (),
        "ignore_eos": False,
        "seed": 0,
    }
    args = parse(["generate", "a", "--temperature", "0.5", "--stop", "a", "--n", "3"])
    assert args.digest() == settings_digest({**settings, "chat": False, "sampling": sampling})


def test_tools_and_template_arguments_reach_the_template(tmp_path, capsys):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "look"}]')
    extra = '{"enable_thinking": false}'
    generate("hi", "--chat", "--tools", str(tools), "--chat-template-kwargs", extra, "--max-tokens", "1", "--quiet")
    said = capsys.readouterr().out.upper()
    assert "<USER>HI[{'NAME': 'LOOK'}]{'ENABLE_THINKING': FALSE}" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tools", "FILE"], "--tools is for a chat model's template; add --chat"),
        (["--chat-template-kwargs", "{}"], "--chat-template-kwargs is for a chat model's template; add --chat"),
        (["--chat", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs holds a JSON list, a JSON object is"),
        (["--chat", "--chat-template-kwargs", "{"], "--chat-template-kwargs is not readable JSON"),
        (["--chat", "--tools", "FILE"], "holds a JSON dict, a JSON list is needed"),
        (["--chat", "--tools", "/nowhere/tools.json"], "/nowhere/tools.json cannot be read: No such file"),
    ],
)
def test_template_arguments_that_cannot_be_used_are_refused(words, sentence, tmp_path):
    (tmp_path / "tools.json").write_text("{}")
    words = [word.replace("FILE", str(tmp_path / "tools.json")) for word in words]
    with pytest.raises(InputError, match=re.escape(sentence)):
        generate("hi", *words)


def test_a_chat_is_sampled_as_the_model_asks():
    def chosen(*words):
        args = parse(["generate", "a", *words])
        sampling = args.sampling
        if args.takes_own_sampling:
            sampling = with_own_sampling(sampling, {"temperature": 0.6, "top_k": 20})
        return sampling.temperature, sampling.top_k

    assert chosen() == (0.0, 0)
    assert chosen("--chat") == chosen("--sampling", "model") == (0.6, 20)
    assert chosen("--chat", "--sampling", "greedy") == (0.0, 0)
    assert chosen("--chat", "--temperature", "0.9") == (0.9, 20)
    digests = {parse(["generate", "a", *words]).digest() for words in ([], ["--chat"], ["--sampling", "model"])}
    assert len(digests) == 3


def test_several_texts_for_a_prompt_are_lines_of_their_own(tmp_path):
    output, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "n": 1}\n')
    options = ("--input", str(source), "--output", str(output), "--max-tokens", "2", "--quiet")
    generate(*options)
    generate(*options, "--n", "2")
    found = lines(output)
    assert sorted((line["index"], line.get("sample", 0)) for line in found) == [(0, 0), (0, 1), (1, 0)]
    assert len({line["run"] for line in found}) == 1


def test_wrong_paths_are_found_before_a_model_is_loaded(tmp_path):
    for option in ("--output", "--report"):
        with pytest.raises(InputError, match=r"none/x\.jsonl cannot be written"):
            generate("a", "--model", "missing", option, str(tmp_path / "none" / "x.jsonl"))


def test_errors_of_the_model_and_of_the_prompts_pass_through(tmp_path):
    with pytest.raises(InputError, match="no model 'missing'"):
        generate("a", "--model", "missing")
    with pytest.raises(InputError, match="Prompt 2 is too long"):
        generate("a", "b" * 2000)


def test_full_disk_is_an_error_that_counts_what_is_kept():
    with pytest.raises(InputError, match=r"/dev/full cannot be written: No space left on device; 0 of 1 prompts"):
        generate("a", "--output", "/dev/full")
    with pytest.raises(InputError, match=r"/dev/full cannot be written: No space left.*results are not affected"):
        generate("a", "--report", "/dev/full")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_on_a_terminal_and_results_survive_it(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    generate("a", "b", "--max-tokens", "2")
    assert "2/2" in terminal.getvalue()
    assert "loading" in terminal.getvalue()
    assert capsys.readouterr().out.count("--- prompt") == 2


def test_results_held_back_for_their_order_are_shown_when_interrupted(capsys):
    screen = ResultList(total=2, already=0, show_bar=False, print_results=True, separator="")
    args = parse(["generate", "a", "b"])
    assert isinstance(args, Generate)
    llm = FakeLLM(args.engine, lambda done, total: None)
    with screen:
        output = next(event for event in llm.stream(["a", "b"], [args.sampling] * 2) if hasattr(event, "report"))
        screen.finished(output.index, "b", output)
        assert capsys.readouterr().out == ""
    assert "prompt 2 of 2" in capsys.readouterr().out


def test_parts_of_the_input_give_what_one_command_gives(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("a\nb\nc\nd\ne\n")
    options = ("--input", str(source), "--max-tokens", "2", "--quiet", "--output")
    generate(*options, str(tmp_path / "whole.jsonl"))
    for part in range(2):
        generate(*options, str(tmp_path / f"{part}.jsonl"), "--shard", f"{part}/2")
    found = [line for part in range(2) for line in lines(tmp_path / f"{part}.jsonl")]
    assert [line["index"] for line in found] == [2, 0, 4, 3, 1]
    by_index = {line["index"]: line["text"] for line in found}
    assert by_index == {line["index"]: line["text"] for line in lines(tmp_path / "whole.jsonl")}

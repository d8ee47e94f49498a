"""The GPU check's flow, gone through on a CPU with a tiny shape: stages, records, limits of time."""

import json

import gpu_check
import pytest
import torch
from table_blocks import gpu

SMALL = ["--device", "cpu", "--batch", "2", "--prompt-len", "48", "--output-len", "8"]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_stages_end_in_records_and_a_table(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    stages = ["kernels", "alisa swa, three phases", "FlexGen 0.1.8"]
    assert gpu_check.main([*SMALL, "--output", str(path), "--stages", *stages]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "cpu, opt-tiny, batch 2, 48 + 8 tokens"
    assert shown[1].startswith("kernels bf16-20 ")
    kernels, ours, flexgen = records(path)
    assert [kernels["kind"], ours["kind"], flexgen["kind"]] == ["gpu-kernels", "gpu-run", "gpu-run"]
    assert ours["figures"]["tokens_per_s"] == pytest.approx(16 / ours["figures"]["wall_s"])
    assert ours["details"]["host_peak_bytes"] > 0
    assert ours["details"]["kv_peak_bytes"] <= ours["details"]["kv_cap_bytes"] < ours["details"]["kv_need_bytes"]
    assert flexgen["status"] == "unavailable"
    text = gpu(tmp_path)
    assert "| alisa swa, three phases (cpu) |" in text
    assert "| FlexGen 0.1.8 (cpu) |  |  |  |  | unavailable: it keeps rows off a GPU" in text
    assert "bf16-20 (" in text


def test_when_the_time_is_over_stages_say_so(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    assert gpu_check.main([*SMALL, "--minutes", "0.1", "--output", str(path)]) == 0
    assert [record["status"] for record in records(path)] == ["skipped"] * len(gpu_check.STAGES)
    assert "the 0.1 minutes are over" in capsys.readouterr().out


def test_a_stage_that_fails_gives_its_reason(capsys, monkeypatch):
    monkeypatch.setitem(gpu_check.OURS, "alisa swa, three phases", {"policy": "swa", "schedule": {}})
    assert gpu_check.main([*SMALL, "--stages", "alisa swa, three phases"]) == 1
    assert "failed: alisa.errors.InputError: " in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence(capsys):
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.startswith("There is no NVIDIA GPU that this torch can use")

"""Placement never changes the tokens: any caps, any schedule, any phase give what everything on the device gives."""

import json

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.outputs import Phase

PROMPT_LENGTHS = (3, 41, 17, 60, 33, 25)
NEW_TOKENS = 60


def prompts_for(llm):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def tokens(llm):
    outputs = llm.generate(prompts_for(llm), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["length"] * len(outputs)
    return [output.token_ids for output in outputs]


def schedule_file(directory, **values):
    path = directory / "schedule.json"
    path.write_text(json.dumps(values))
    return path


THREE_PHASES = {
    "schedule": "three-phase",
    "offload_from": 8,
    "recompute_from": 24,
    "offload_ratio": 0.7,
    "recompute_ratio": 0.6,
}


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied"])
def test_no_placement_changes_a_token(family, policy, kv_dtype, tiny_model, tmp_path):
    options = {"policy": policy, "sparsity": 0.6, "dtype": "float32", "kv_dtype": kv_dtype, "prefill_chunk": 32}
    everything = LLM(tiny_model(family), **options)
    expected = tokens(everything)
    cached = sum(PROMPT_LENGTHS) + len(PROMPT_LENGTHS) * (NEW_TOKENS - 1)
    token_bytes = everything.describe()["kv_token_bytes"]
    quarter = cached * token_bytes // 4

    capped = LLM(tiny_model(family), **options, kv_device_memory=quarter)
    assert tokens(capped) == expected
    summary = capped.summary()
    assert summary.kv_peak_bytes <= quarter
    assert summary.disk_peak_bytes > 0
    assert summary.phase_steps[Phase.DEVICE_HOST] > 0

    tiny = LLM(tiny_model(family), **options, kv_device_memory=24 * token_bytes)
    assert tokens(tiny) == expected
    assert tiny.summary().kv_peak_bytes <= 24 * token_bytes

    phases = LLM(tiny_model(family), **options, schedule=schedule_file(tmp_path, **THREE_PHASES))
    assert tokens(phases) == expected
    assert set(phases.summary().phase_steps) == set(Phase)
    assert phases.summary().traffic.deleted_rows > 0

    static = schedule_file(tmp_path, schedule="static", offload_ratio=0.75)
    split = LLM(tiny_model(family), **options, schedule=static)
    assert tokens(split) == expected


@pytest.mark.parametrize("policy", ["dense", "swa"])
def test_deleted_rows_are_rebuilt_when_they_are_read(policy, tiny_model, tmp_path):
    everything = LLM(tiny_model("opt"), policy=policy, dtype="float32")
    token_bytes = everything.describe()["kv_token_bytes"]
    phases = LLM(
        tiny_model("opt"),
        policy=policy,
        dtype="float32",
        kv_device_memory=120 * token_bytes,
        schedule=schedule_file(tmp_path, **THREE_PHASES),
    )
    assert tokens(phases) == tokens(everything)
    if policy == "dense":  # reads every deleted row in every step
        assert phases.summary().traffic.rebuilt_rows > 100


def test_too_little_disk_preempts_and_changes_no_token(tiny_model):
    everything = LLM(tiny_model("llama-gqa-tied"), dtype="float32")
    expected = tokens(everything)
    token_bytes = everything.describe()["kv_token_bytes"]
    short = LLM(
        tiny_model("llama-gqa-tied"),
        dtype="float32",
        kv_device_memory=150 * token_bytes,
        kv_disk_memory=100 * token_bytes,
    )
    assert tokens(short) == expected
    assert short.summary().num_preempted > 0
    waiting = LLM(tiny_model("llama-gqa-tied"), dtype="float32", kv_device_memory=250 * token_bytes, kv_disk_memory=0)
    assert tokens(waiting) == expected
    assert waiting.summary().num_preempted > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied"])
def test_weights_in_8_bits_know_neither_place_nor_company(family, dtype, tiny_model, tmp_path):
    options = {"policy": "dense", "dtype": dtype, "weight_dtype": "int8", "prefill_chunk": 32}
    everything = LLM(tiny_model(family), **options)
    expected = tokens(everything)
    alone = LLM(tiny_model(family), **options, max_num_seqs=1)
    cap = 120 * everything.describe()["kv_token_bytes"]
    schedule = schedule_file(tmp_path, **THREE_PHASES)
    phases = LLM(tiny_model(family), **options, kv_device_memory=cap, schedule=schedule)
    assert tokens(alone) == expected
    assert tokens(phases) == expected
    assert phases.summary().traffic.rebuilt_rows > 0
    described = everything.describe()
    assert (described["dtype"], described["weight_dtype"]) == (dtype, "int8")

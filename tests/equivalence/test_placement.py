"""Placement never changes the tokens: any caps, any schedule, any phase give what everything on the device gives."""

import json
from dataclasses import replace

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.cache.offload.store import TieredStore
from alisa.cache.store import KVStore
from alisa.outputs import Phase
from tests.caps import device_cap
from tests.combinations import each

PROMPT_LENGTHS = (3, 41, 17, 60, 33, 25)
NEW_TOKENS = 60
FEW_TOKENS = 36  # enough for all three phases, in the test with the most runs


def prompts_for(llm):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


SIZES = {"max_num_seqs": len(PROMPT_LENGTHS), "max_model_len": max(PROMPT_LENGTHS) + NEW_TOKENS}


def run(llm, max_tokens=NEW_TOKENS):
    """Tokens of every prompt, and the totals of the run."""
    outputs = llm.generate(prompts_for(llm), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["length"] * len(outputs)
    return [output.token_ids for output in outputs], outputs.report.summary


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


@each(2, family=["opt", "llama-gqa-tied"], policy=["dense", "swa", "sketch"], kv_dtype=["float32", "int8", "int4"])
def test_no_placement_changes_a_token(family, policy, kv_dtype, tiny_model, tmp_path):
    options = {
        "policy": policy,
        "sparsity": 0.6,
        "dtype": "float32",
        "kv_dtype": kv_dtype,
        "prefill_chunk": 32,
        **SIZES,
    }
    everything = LLM(tiny_model(family), **options)
    expected, _ = run(everything, FEW_TOKENS)
    cached = sum(PROMPT_LENGTHS) + len(PROMPT_LENGTHS) * (FEW_TOKENS - 1)

    for num_tokens in (cached // 4, 20):
        cap = device_cap(everything, num_tokens)
        capped, summary = run(LLM(tiny_model(family), **options, kv_device_memory=cap), FEW_TOKENS)
        assert capped == expected
        assert summary.kv_peak_bytes + summary.policy_state_bytes <= cap
        assert summary.disk_peak_bytes > 0
        assert summary.phase_steps[Phase.DEVICE_HOST] > 0

    schedule = schedule_file(tmp_path, **THREE_PHASES)
    phases, summary = run(LLM(tiny_model(family), **options, schedule=schedule), FEW_TOKENS)
    assert phases == expected
    assert set(summary.phase_steps) == set(Phase)
    assert summary.traffic.deleted_rows > 0

    static = schedule_file(tmp_path, schedule="static", offload_ratio=0.75)
    split, summary = run(LLM(tiny_model(family), **options, schedule=static), FEW_TOKENS)
    assert split == expected
    assert summary.disk_peak_bytes > 0


@pytest.mark.parametrize("policy", ["dense", "swa"])
def test_deleted_rows_are_rebuilt_when_they_are_read(policy, tiny_model, tmp_path):
    options = {"policy": policy, "dtype": "float32", **SIZES}
    everything = LLM(tiny_model("opt"), **options)
    cap, schedule = device_cap(everything, 120), schedule_file(tmp_path, **THREE_PHASES)
    phases, summary = run(LLM(tiny_model("opt"), **options, kv_device_memory=cap, schedule=schedule))
    assert phases == run(everything)[0]
    if policy == "dense":  # reads every deleted row in every step
        assert summary.traffic.rebuilt_rows > 100


def test_too_little_disk_preempts_and_changes_no_token(tiny_model):
    directory = tiny_model("llama-gqa-tied")
    everything = LLM(directory, dtype="float32", **SIZES)
    expected, _ = run(everything)
    token_bytes = everything.describe()["kv_token_bytes"]
    for num_tokens, disk_tokens in ((150, 100), (250, 0)):
        cap = device_cap(everything, num_tokens)
        short = LLM(directory, dtype="float32", kv_device_memory=cap, kv_disk_memory=disk_tokens * token_bytes, **SIZES)
        found, summary = run(short)
        assert found == expected
        assert summary.num_preempted > 0


@each(family=["opt", "llama-gqa-tied"], dtype=["float32", "bfloat16"])
def test_weights_in_8_bits_know_neither_place_nor_company(family, dtype, tiny_model, tmp_path):
    options = {"policy": "dense", "dtype": dtype, "weight_dtype": "int8", "prefill_chunk": 32}
    everything = LLM(tiny_model(family), **options, **SIZES)
    expected, _ = run(everything)
    alone, _ = run(LLM(tiny_model(family), **options, max_num_seqs=1))
    cap, schedule = device_cap(everything, 120), schedule_file(tmp_path, **THREE_PHASES)
    phases, summary = run(LLM(tiny_model(family), **options, **SIZES, kv_device_memory=cap, schedule=schedule))
    assert alone == expected
    assert phases == expected
    assert summary.traffic.rebuilt_rows > 0
    described = everything.describe()
    assert (described["dtype"], described["weight_dtype"]) == (dtype, "int8")


def test_nothing_is_chosen_ahead_before_a_row_has_moved(tiny_model, monkeypatch):
    """Choosing early is worth its time only where rows must be loaded."""
    asked = []
    for store in (KVStore, TieredStore):
        monkeypatch.setattr(store, "prefetch", lambda self, *_: asked.append(type(self)))  # a hint may be ignored
    free = LLM(tiny_model("opt"), policy="swa", dtype="float32", sparsity=0.6, **SIZES)
    expected, _ = run(free)
    assert not asked
    capped = LLM(free.config.model, config=replace(free.config, kv_device_memory=device_cap(free, 120)))
    assert run(capped)[0] == expected
    assert set(asked) == {TieredStore}

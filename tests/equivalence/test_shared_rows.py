"""The texts of a prompt hold its rows once, and are what they are with rows of their own, to the last bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.engine.builder import build_engine
from alisa.outputs import Medium
from tests.caps import device_cap

SIZES = {"max_num_seqs": 8, "max_model_len": 330}
PROMPT = 300
WHOLE_BLOCKS = 288
"""Tokens of the prompt that the prefix cache keeps; `swa` watches its last ones computed, and takes fewer."""
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=10, ignore_eos=True)


def prompt_of(llm, length=PROMPT):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist()


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("policy", "shared"),
    [("dense", WHOLE_BLOCKS), ("sketch", WHOLE_BLOCKS), ("swa", 288 - 64), ("local", WHOLE_BLOCKS)],
)
@pytest.mark.parametrize("kv_disk_memory", [None, 0])
def test_eight_texts_hold_the_rows_of_their_prompt_once(policy, shared, kv_disk_memory):
    options = {"policy": policy, "dtype": "bfloat16", "sparsity": 0.6, "kv_disk_memory": kv_disk_memory, **SIZES}
    plain, keeps = LLM(**options), LLM(**options, prefix_cache=True)
    prompt, params = prompt_of(plain), replace(SAMPLED, n=8)
    outputs = keeps.generate([prompt], params)
    assert tokens(outputs) == tokens(plain.generate([prompt], params))
    most = max(record.kv_rows for record in outputs.report.records)
    assert most <= shared + 8 * (PROMPT - shared + 10)
    summary = outputs.report.summary
    assert summary.kv_peak_bytes == most * keeps.describe()["kv_token_bytes"]


def test_greedy_texts_are_the_single_text():
    llm = LLM(prefix_cache=True, speculative="lookup", **SIZES)
    prompt = prompt_of(llm)
    [single] = LLM(**SIZES).generate([prompt], SamplingParams(max_tokens=25, ignore_eos=True))
    outputs = llm.generate([prompt], SamplingParams(n=5, max_tokens=25, ignore_eos=True))
    assert tokens(outputs) == [single.token_ids] * 5


@pytest.mark.parametrize("seed", range(3))
def test_who_leaves_takes_only_its_own_rows_along(seed):
    plain = LLM(policy="sketch", dtype="bfloat16", **SIZES)
    expected = {}
    for number in range(6):
        params = replace(SAMPLED, seed=number, max_tokens=20)
        [expected[str(number)]] = tokens(plain.generate([prompt_of(plain)], params))
    engine, _ = build_engine(plain._model, replace(plain.config, prefix_cache=True))
    store = engine._session.cache.store
    for name in expected:
        params = replace(SAMPLED, seed=int(name), max_tokens=20)
        engine.add_request(prompt_of(plain), params, request_id=name)
    draw, found = random.Random(seed), {}
    while not all(request.output_ids for request in engine.scheduler.requests.values()):
        engine.step()
    assert store.used_rows == WHOLE_BLOCKS + sum(
        request.num_cached - WHOLE_BLOCKS for request in engine.scheduler.running
    )
    for name in draw.sample(sorted(expected), 3):
        before, own = store.used_rows, engine.scheduler.requests[name].num_cached - WHOLE_BLOCKS
        engine.abort(name)
        store.check()
        assert store.used_rows == before - own
        assert engine.status().device_bytes == store.nbytes(Medium.DEVICE) == store.used_rows * store.token_bytes
        found |= {output.request_id: output.token_ids for output in engine.step().finished}
    while engine.has_requests:
        found |= {output.request_id: output.token_ids for output in engine.step().finished}
        store.check()
    assert len(found) == 3
    assert all(expected[name] == found[name] for name in found)
    assert (store.used_rows, store.num_rows) == (0, len(store._free_slots))


def test_a_cap_for_one_prompt_is_enough_for_its_texts():
    options = {"policy": "dense", "kv_disk_memory": 0, **SIZES}
    plain = LLM(**options)
    prompt, params = prompt_of(plain), replace(SAMPLED, n=4)
    prefix_bytes = 400 * plain.describe()["kv_token_bytes"]
    room = WHOLE_BLOCKS + 4 * (PROMPT - WHOLE_BLOCKS + 9)
    cap = prefix_bytes + device_cap(plain, room)
    llm = LLM(**options, prefix_cache=True, prefix_cache_memory=prefix_bytes, kv_device_memory=cap)
    outputs = llm.generate([prompt], params)
    assert tokens(outputs) == tokens(plain.generate([prompt], params))
    records, summary = outputs.report.records, outputs.report.summary
    assert max(record.num_sequences for record in records if not record.prefill) == 4
    assert summary.num_preempted == 0
    assert max(record.kv_rows for record in records) == room
    assert summary.kv_peak_bytes + summary.prefix_peak_bytes <= cap


@pytest.mark.parametrize("policy", ["dense", "sketch", "swa"])
def test_rows_that_have_to_move_are_everyones_own_first(policy):
    options = {"policy": policy, "dtype": "bfloat16", **SIZES}
    plain = LLM(**options)
    prompts = [prompt_of(plain, 100)]
    params = replace(SAMPLED, n=4, max_tokens=60)
    prefix_bytes = 400 * plain.describe()["kv_token_bytes"]
    cap = prefix_bytes + device_cap(plain, 500)
    llm = LLM(**options, prefix_cache=True, prefix_cache_memory=prefix_bytes, kv_device_memory=cap)
    outputs = llm.generate(prompts, params)
    assert tokens(outputs) == tokens(plain.generate(prompts, params))
    rows = [record.kv_rows for record in outputs.report.records]
    decode = [record for record in outputs.report.records if not record.prefill]
    assert decode[0].disk_bytes == 0
    assert decode[0].kv_rows < 2 * 100
    assert max(record.disk_bytes for record in decode) > 0
    assert max(rows) > 500
    assert outputs.report.summary.kv_peak_bytes <= cap - prefix_bytes

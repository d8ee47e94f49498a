"""The batch that benchmarks run: what it switches off must change the time only, never the tokens."""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from alisa.cache.offload.transfer import Transfers
from alisa.config import EngineConfig
from alisa.engine.builder import CacheOptions
from alisa.errors import CapacityError
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_for, device_cap_within, device_tokens, run_batch
from alisa.lab.bench.shapes import SHAPES
from alisa.model.loader import random_decoder
from alisa.planner.footprint import kv_token_bytes
from alisa.scheduler.placement.static import StaticSplit

SPEC = SHAPES["llama-tiny"]


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(SPEC, torch.float32, torch.device("cpu"))


def prompts():
    rng = random.Random(0)
    return [[rng.randrange(10, SPEC.vocab_size) for _ in range(length)] for length in (60, 11, 35)]


def run(decoder, share=1.0, **options):
    config = EngineConfig(policy="swa", sparsity=0.5, kv_disk_memory=None if share < 1 else 0, max_num_seqs=3)
    config = batch_config(config, list(map(len, prompts())), 30)
    run_spec = RunSpec(config, CacheOptions(**options))
    cap = device_cap_for(decoder, run_spec, int(share * sum(len(ids) + 29 for ids in prompts())))
    run_spec = replace(run_spec, config=replace(config, kv_device_memory=cap))
    firsts, tokens = [], {}

    def on_step(record):
        tokens[record.step] = record.tokens_attended

    ran = run_batch(decoder, run_spec, prompts(), 30, on_first=firsts.append, on_step=on_step)
    assert sorted(firsts) == [0, 1, 2]
    assert len(tokens) == len(ran.records)
    assert ran.num_output == 90
    return ran, list(tokens.values())


def test_switches_change_what_is_hidden_and_nothing_else(decoder):
    plain, expected = run(decoder)
    assert plain.details()["stored_rows"] == 0
    for changes in ({}, {"prefetch": False}, {"overlap": False}, {"placement": StaticSplit(0.4)}):
        ran, attended = run(decoder, 0.7, **changes)
        assert attended == expected
        details = ran.details()
        assert details["num_preempted"] == 0
        assert details["stored_rows"] > 0
        assert details["kv_peak_bytes"] <= 0.7 * plain.details()["kv_peak_bytes"] * 1.01
        if changes == {"overlap": False}:
            assert details["hidden_share"] == 0, "every transfer is waited for from before its beginning"
        assert sum(details["phases"].values()) == len(ran.decode)
        assert set(details["parts_ms"]) == {"linear", "attention", "selection", "transfer", "sampling", "other"}


@pytest.mark.parametrize("policy", ["dense", "sketch"])
@pytest.mark.parametrize("disk", [0, None])
def test_the_cap_for_some_tokens_has_room_for_these_and_a_byte_less_has_not(decoder, policy, disk):
    config = EngineConfig(policy=policy, kv_disk_memory=disk, max_num_seqs=3, max_model_len=90)
    for num_tokens in (1, 100, 3 * 90):
        cap = device_cap_for(decoder, RunSpec(config), num_tokens)
        assert cap > num_tokens * kv_token_bytes(SPEC, "float32"), "there is more under it than rows"
        assert device_tokens(decoder, RunSpec(config), cap) == num_tokens
        with pytest.raises(CapacityError) if num_tokens == 1 else nullcontext():
            assert device_tokens(decoder, RunSpec(config), cap - 1) == num_tokens - 1
    assert device_cap_for(decoder, RunSpec(config), 10_000) == cap, "sequences of 90 tokens have no more"


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0, 5.0])
@pytest.mark.parametrize("disk", [0, None])
def test_a_budget_for_k_and_v_is_kept_and_used(decoder, share, disk):
    run_spec = RunSpec(EngineConfig(policy="sketch", kv_disk_memory=disk, max_num_seqs=3, max_model_len=90))
    token_bytes = kv_token_bytes(SPEC, "float32")
    cap = device_cap_within(decoder, run_spec, int(share * 3 * 90 * token_bytes))
    num_tokens, budget = device_tokens(decoder, run_spec, cap), share * 3 * 90
    assert num_tokens <= budget
    if disk == 0:
        assert num_tokens == min(int(budget), 3 * 90), "nothing is staged where nothing moves"
    else:
        # A sixteenth is for staging, or one piece of one layer for the kernel, here a whole sequence.
        assert num_tokens >= min(budget, 3 * 90) - max(budget / 16, 90 / SPEC.num_layers) - 2
    if share == 5.0:
        assert cap == device_cap_for(decoder, run_spec, 3 * 90)


def test_without_overlap_a_transfer_is_done_when_it_has_been_started():
    import numpy as np

    done = []
    transfers = Transfers(overlap=False)
    ticket = transfers.start(lambda some: done.append(some), np.zeros(3, np.int64))
    assert done == [slice(None)]
    assert ticket.is_done
    assert transfers.wait_s > 0
    transfers.wait(ticket)
    assert transfers.busy_s > 0
    transfers.close()

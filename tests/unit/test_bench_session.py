"""The batch that benchmarks run: what it switches off must change the time only, never the tokens."""

import random

import pytest
import torch

from alisa.cache.offload.transfer import Transfers
from alisa.engine.builder import Caps
from alisa.lab.bench.session import RunSpec, run_batch
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


def run(decoder, share=1.0, *, overlap=True, **changes):
    need = sum(len(ids) + 29 for ids in prompts()) * kv_token_bytes(SPEC, "float32")
    caps = Caps(int(share * need), 0, None if share < 1 else 0, None, overlap=overlap)
    run_spec = RunSpec(policy="swa", sparsity=0.5, caps=caps, max_batch=3, **changes)
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
    for changes in ({}, {"prefetch": False}, {"overlap": False}, {"scheduler": StaticSplit(0.4)}):
        ran, attended = run(decoder, 0.7, **changes)
        assert attended == expected
        details = ran.details()
        assert details["num_preempted"] == 0
        assert details["stored_rows"] > 0
        assert details["kv_peak_bytes"] <= 0.7 * plain.details()["kv_peak_bytes"] * 1.01
        if changes == {"overlap": False}:
            # Every transfer is waited for from its beginning; the clock of the wait starts a moment earlier.
            assert details["hidden_share"] < 0.2
        assert sum(details["phases"].values()) == len(ran.decode)
        assert set(details["parts_ms"]) == {"linear", "attention", "selection", "transfer", "sampling", "other"}


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

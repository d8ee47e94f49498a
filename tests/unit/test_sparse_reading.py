"""What the planner takes to be left of prompts that are read sparsely."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.budget import DENSE_TOKENS
from alisa.errors import InputError
from alisa.outputs import Phase
from alisa.planner.cost import CostModel
from alisa.planner.load import RunConfig, loads
from alisa.planner.presets import PRESETS
from alisa.planner.sparse_reading import MEASURED_ALPHA, SparseReading, causal_pairs
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from tests.specs import small_spec

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "sparse_prompts.jsonl"


def test_what_is_taken_to_be_left_is_what_was_measured():
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    measured = [
        (record["context"], record["read"])
        for record in records
        if record["model"].startswith("SmolLM2") and "read" in record
    ]
    assert {context for context, _ in measured} == {4096, 8192}
    for context, read in measured:
        pairs = SparseReading(MEASURED_ALPHA).pairs(context)
        assert pairs / causal_pairs(context) == pytest.approx(read, abs=0.03)


@given(st.integers(1, 200_000), st.integers(1, 5000), st.none() | st.floats(0.01, 1))
def test_longer_prompts_multiply_more_pairs_and_never_more_than_all(length, more, share):
    sparse = SparseReading(MEASURED_ALPHA, share)
    assert sparse.pairs(length) < sparse.pairs(length + more)
    assert sparse.pairs(length) <= causal_pairs(length) * (1 + 1e-12)
    assert sparse.share_left(length + more) <= sparse.share_left(length)


@given(st.integers(1, 100_000))
def test_the_first_tokens_are_read_densely_and_alpha_0_reads_all(length):
    assert SparseReading(MEASURED_ALPHA).pairs(min(length, DENSE_TOKENS)) == causal_pairs(min(length, DENSE_TOKENS))
    for everything in (SparseReading(0), SparseReading(0.03, 1.0)):
        assert everything.pairs(length) == causal_pairs(length)


def test_what_nobody_measured_must_be_said():
    with pytest.raises(InputError, match=r"--sparse-prompts 0\.1 leaves .* --sparse-share"):
        SparseReading(0.1)
    with pytest.raises(InputError, match="--sparse-share is 0, allowed"):
        SparseReading(0.1, 0.0)
    assert SparseReading(0.1, 0.3).share_left(4096) == 0.3


def prompt_loads(way, cuts):
    """The work of one prompt, read in pieces that end at these tokens."""
    chunks = [ScheduledChunk(0, start, end - start) for start, end in zip((0, *cuts), cuts, strict=False)]
    plans = [StepPlan(step, Phase.DEVICE, True, (chunk,), ()) for step, chunk in enumerate(chunks)]
    return list(loads(plans, Limits(10**5), way, prompt_lens=cuts[-1]))


def test_pieces_of_a_prompt_multiply_what_the_whole_does_and_windows_save_nothing():
    way = RunConfig("dense", 0.0, "float16", "float16", sparse=SparseReading(MEASURED_ALPHA))
    whole, *_ = prompt_loads(way, (8192,))
    pieces = prompt_loads(way, (1024, 2048, 3072, 8192))
    assert sum(load.read_pairs for load in pieces) == pytest.approx(whole.read_pairs)
    assert [load.read_pairs == load.pairs for load in pieces] == [True, True, False, False]
    dense = RunConfig("dense", 0.0, "float16", "float16")
    densely, *_ = prompt_loads(dense, (8192,))
    assert densely.read_pairs == densely.pairs == whole.pairs
    for windows, saves in (((None, None), True), ((100, 100), False)):
        spec = replace(small_spec(), windows=windows)
        sparse_s, dense_s = (CostModel(spec, way, PRESETS["h200"]).step(load).attention_s for load in (whole, densely))
        assert (sparse_s < dense_s) == saves

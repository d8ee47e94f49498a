"""Requests of one batch that read less than the engine allows: each as in an engine of its own, whoever else runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa import LLM, SamplingParams
from alisa.engine.budgets import ReadingParams
from alisa.engine.builder import build_engine
from alisa.errors import InputError
from alisa.policy.registry import POLICIES
from tests.caps import device_cap
from tests.equivalence.test_prefix_cache import ids

SIZES = {"max_num_seqs": 4, "max_model_len": 200, "dtype": "float32", "sparsity": 0.5}
RULES = SamplingParams(max_tokens=24, ignore_eos=True)
PLAIN = [
    ReadingParams(),
    ReadingParams(0.8),
    ReadingParams(0.95),
    ReadingParams(0.9),
    ReadingParams(),
    ReadingParams(0.5),
]
COVERED = [
    ReadingParams(),
    ReadingParams(coverage=0.5),
    ReadingParams(0.8, 0.9),
    ReadingParams(0.9),
    ReadingParams(coverage=1.0),
]


def run(engine, prompts, asked, rules=RULES):
    """(tokens, tokens attended) of each request, all at once."""
    for number, (prompt, reading) in enumerate(zip(prompts, asked, strict=True)):
        engine.add_request(prompt, rules, request_id=str(number), reading=reading)
    found = {}
    while engine.has_requests:
        for output in engine.step().finished:
            assert output.finish_reason == "length", output.error
            found[output.request_id] = output.token_ids, output.report.tokens_attended
    return [found[str(number)] for number in range(len(prompts))]


def alone(llm, prompt, reading):
    """The same of an engine whose own options ask for it."""
    options = {name: value for name in ("sparsity", "coverage") if (value := getattr(reading, name)) is not None}
    with LLM(config=replace(llm.config, **options), loaded=llm.model) as own:
        [output] = own.generate([prompt], RULES)
    return output.token_ids, output.report.tokens_attended


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        ("sketch", PLAIN),
        ("sketch", COVERED),
        ("sketch-mean", COVERED),
        ("h2o", PLAIN),
        ("streaming", PLAIN),
        *(
            pytest.param(policy, PLAIN, marks=pytest.mark.slow)
            for policy in ("sketch-head", "oracle", "local", "strided")
        ),
    ],
)
def test_each_reads_what_it_asked_for(policy, asked):
    with LLM(policy=policy, **SIZES) as llm:
        prompts = [ids(llm, 30 + 25 * number, number) for number in range(len(asked))]
        engine, _ = build_engine(llm.model, llm.config)
        found = run(engine, prompts, asked)
        assert found == [alone(llm, prompt, reading) for prompt, reading in zip(prompts, asked, strict=True)]
        assert engine._session._budgets == {}


def test_some_ask_for_less_of_an_engine_with_a_coverage():
    with LLM(policy="sketch", coverage=0.8, **SIZES) as llm:
        asked = [ReadingParams(), ReadingParams(coverage=0.3), ReadingParams(0.9), ReadingParams(coverage=1.0)]
        prompts = [ids(llm, 100 + 9 * number, number) for number in range(len(asked))]
        engine, _ = build_engine(llm.model, llm.config)
        found = run(engine, prompts, asked)
        assert found == [alone(llm, prompt, reading) for prompt, reading in zip(prompts, asked, strict=True)]


@pytest.fixture(scope="module")
def small(tiny_model):
    """What each prompt gets with each sparsity, alone: filled as it is asked for."""
    with LLM(tiny_model("llama-gqa-tied"), policy="sketch", max_num_seqs=3, max_model_len=120, sparsity=0.3) as llm:
        yield llm, {}


@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(1, 90), st.sampled_from([None, 0.3, 0.6, 0.9]), st.sampled_from([None, 0.6])
        ),
        min_size=1,
        max_size=7,
    ),
    room=st.sampled_from([None, 70, 110]),
    disk=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_no_cap_and_no_company_changes_a_token(small, requests, room, disk):
    llm, expected = small
    options = {}
    if room is not None:
        options = {"kv_device_memory": device_cap(llm, room), "kv_disk_memory": None if disk else 0}
    prompts = [tuple(ids(llm, length, seed)) for seed, length, _, _ in requests]
    asked = [ReadingParams(sparsity, coverage) for _, _, sparsity, coverage in requests]
    engine, _ = build_engine(llm.model, replace(llm.config, **options))
    fitting = [number for number, prompt in enumerate(prompts) if room is None or disk or len(prompt) + 24 <= room]
    prompts, asked = [prompts[n] for n in fitting], [asked[n] for n in fitting]
    for key in zip(prompts, asked, strict=True):
        if key not in expected:
            expected[key] = alone(llm, *key)
    found = run(engine, prompts, asked)
    assert [tokens for tokens, _ in found] == [expected[key][0] for key in zip(prompts, asked, strict=True)]
    engine.close()


@pytest.mark.parametrize(
    ("options", "reading", "message"),
    [
        ({}, ReadingParams(0.4), "sparsity is 0.4, and this engine has memory for what 0.5 reads; ask for 0.5 up to"),
        ({}, ReadingParams(1.0), "sparsity is 1.0, and this engine has memory"),
        ({}, ReadingParams(coverage=1.5), "coverage is 1.5, and allowed is above 0 up to 1"),
        ({"policy": "swa"}, ReadingParams(0.8), "with the policy swa all requests are read alike; leave it out"),
        ({"policy": "dense"}, ReadingParams(0.8), "with the policy dense all requests are read alike"),
        ({"policy": "oracle"}, ReadingParams(coverage=0.5), "oracle does not know the weight of what it does not read"),
        ({"exact": True}, ReadingParams(0.8), "this engine is exact: each step reads everything"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options, reading, message):
    with LLM(**SIZES | options) as llm:
        engine, _ = build_engine(llm.model, llm.config)
        with pytest.raises(InputError, match=message):
            engine.add_request([1, 2, 3], RULES, reading=reading)
        assert not engine.has_requests
        engine.add_request([1, 2, 3], RULES, reading=ReadingParams(0.5))  # what all have may be said
        engine.close()


def test_the_registry_says_who_mixes():
    assert {name for name, entry in POLICIES.items() if not entry.mixes} == {"dense", "swa", "swa-head"}

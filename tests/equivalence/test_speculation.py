"""Drafts change nothing: tokens, texts, ends and log probabilities are those of one token at a time, to the last bit.

Drafts are taken from the run without them and spoilt at random, so that every number of them comes true.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.config import EngineConfig, SamplingParams
from alisa.engine.loaded import load_model
from alisa.engine.speculator import MeasuredSpeculator
from alisa.errors import InputError
from alisa.lab.bench.session import RunSpec, device_cap_for
from alisa.policy.registry import POLICIES
from tests.combinations import each
from tests.speculation import Run, ScriptedDrafts

LENGTHS = (3, 290, 41, 130, 17)
NEW = 24
SIZES = {"max_num_seqs": len(LENGTHS), "max_model_len": max(LENGTHS) + NEW, "prefill_chunk": 64}
CAN_DRAFT = sorted(name for name, entry in POLICIES.items() if entry.can_truncate)

_MODELS = {}


def model_of(config):
    key = (config.model, config.dtype, config.weight_dtype)
    if key not in _MODELS:
        _MODELS[key] = load_model(config)
    return _MODELS[key]


def prompts_of(model, lengths=LENGTHS, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, model.spec.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def params_of(count, **options):
    greedy = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=2, **options)
    return [replace(greedy, temperature=0.9 * (n % 2), seed=n) for n in range(count)]


def spoilt(truth, model, most=5, **options):
    return ScriptedDrafts(most, truth=truth, vocab_size=model.spec.vocab_size, **options)


def cap_for(model, config, num_tokens):
    return device_cap_for(model.decoder, RunSpec(config), num_tokens)


@each(policy=CAN_DRAFT, dtype=["bfloat16", "float32"])
def test_right_and_wrong_drafts_change_no_bit(policy, dtype):
    config = EngineConfig(policy=policy, sparsity=0.5, dtype=dtype, **SIZES)
    model = model_of(config)
    prompts, params = prompts_of(model), params_of(len(LENGTHS))
    plain = Run(model, config, prompts, params)
    drafts = spoilt(plain.truth, model)
    drafted = Run(model, config, prompts, params, drafts)
    assert drafted.results == plain.results
    assert 0 < drafts.came < drafts.tried
    assert len(drafted.records) < len(plain.records)


@each(
    family=["embedded", "gemma3", "gpt-oss-tiny", "mistral-window", "qwen3-moe", "opt"],
    policy=["sketch", "streaming", "sketch-head"],
)
def test_exact_is_dense(policy, family, tiny_model):
    directory = None if family == "embedded" else str(tiny_model({"gpt-oss-tiny": "gpt-oss"}.get(family, family)))
    lengths = LENGTHS if family == "embedded" else (3, 75, 41)
    sizes = SIZES | {"max_model_len": max(lengths) + NEW}
    dense = EngineConfig(model=directory, policy="dense", **sizes)
    model = model_of(dense)
    prompts, params = prompts_of(model, lengths), params_of(len(lengths))
    plain = Run(model, dense, prompts, params)
    exact = replace(dense, policy=policy, sparsity=0.5, exact=True)
    drafts = ScriptedDrafts(4, vocab_size=model.spec.vocab_size)
    drafted = Run(model, exact, prompts, params, drafts)
    assert drafted.results == plain.results
    assert drafts.tried > 0
    from_both = spoilt(plain.truth, model)
    assert Run(model, exact, prompts, params, from_both).results == plain.results


@each(
    options=[{"policy": "dense"}, {"policy": "sketch", "exact": True}, {"policy": "streaming"}, {"policy": "sketch"}],
    place=["a third", "in pieces", "preempted", "no disk"],
)
def test_caps_and_tiers_change_no_bit(options, place):
    config = EngineConfig(**SIZES, sparsity=0.5, **options)
    model = model_of(config)
    prompts, params = prompts_of(model), params_of(len(LENGTHS))
    plain = Run(model, replace(config, policy=config.reading_policy, exact=False), prompts, params)
    total = sum(LENGTHS) + len(LENGTHS) * NEW
    tokens = {"a third": total // 3, "in pieces": 40, "preempted": total // 2}
    capped = replace(config, kv_device_memory=cap_for(model, config, tokens.get(place, max(LENGTHS) + 2 * NEW)))
    token_bytes = model.spec.num_layers * 2 * model.spec.kv_size * model.decoder.dtype.itemsize
    if place == "preempted":
        capped = replace(capped, kv_disk_memory=total // 4 * token_bytes)
    if place == "no disk":
        capped = replace(capped, kv_disk_memory=0)
    for seed in range(2):
        drafts = ScriptedDrafts(4, seed) if config.exact else spoilt(plain.truth, model, seed=seed)
        drafted = Run(model, capped, prompts, params, drafts)
        assert drafted.results == plain.results
        assert place == "in pieces" or drafts.tried > 0
        assert place != "preempted" or sum(record.num_preempted for record in drafted.records) > 0
        assert place == "no disk" or max(record.disk_bytes for record in drafted.records) > 0


def test_deleted_rows_are_rebuilt_after_drafts(tmp_path):
    schedule = tmp_path / "schedule.json"
    schedule.write_text(
        '{"schedule": "three-phase", "offload_from": 2, "recompute_from": 4, "offload_ratio": 0.7, '
        '"recompute_ratio": 0.6}'
    )
    for options in ({"policy": "sketch"}, {"policy": "sketch", "exact": True}):
        config = EngineConfig(**SIZES, sparsity=0.5, **options)
        model = model_of(config)
        prompts, params = prompts_of(model), params_of(len(LENGTHS))
        plain = Run(model, replace(config, policy=config.reading_policy, exact=False), prompts, params)
        drafts = ScriptedDrafts(4) if config.exact else spoilt(plain.truth, model)
        drafted = Run(model, replace(config, schedule=schedule), prompts, params, drafts)
        assert drafted.results == plain.results
        assert sum(record.traffic.deleted_rows for record in drafted.records) > 0
        assert drafts.tried > 0


@pytest.mark.parametrize("exact", [False, True])
def test_prefix_hits_and_late_arrivals_change_no_bit(exact):
    config = EngineConfig(**SIZES, policy="sketch", sparsity=0.5, exact=exact)
    model = model_of(config)
    shared = prompts_of(model, (192,))[0]
    prompts = [[*shared, *rest] for rest in prompts_of(model, (3, 40, 17, 3))]
    prompts[3] = prompts[0]
    params = params_of(len(prompts))
    plain = Run(model, replace(config, policy=config.reading_policy, exact=False), prompts, params)
    drafts = ScriptedDrafts(4) if exact else spoilt(plain.truth, model)
    drafted = Run(model, replace(config, prefix_cache=True), prompts, params, drafts, arrive_after=3)
    assert drafted.results == plain.results
    assert sum(record.cached_tokens for record in drafted.records) > 0
    assert drafts.tried > 0


def test_what_ends_a_request_ends_it_among_drafts():
    """Stop strings, stop ids, end tokens and the last token, each in the middle of what a step gives."""
    config = EngineConfig(**SIZES, policy="dense")
    model = model_of(config)
    [prompt] = prompts_of(model, (41,))
    free = Run(model, config, [prompt], [SamplingParams(max_tokens=NEW, ignore_eos=True)]).outputs["0"]
    text = free.text
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    cases = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, stop=(middle,)),
        SamplingParams(max_tokens=NEW, ignore_eos=True, stop=(middle,), min_tokens=NEW),
        SamplingParams(max_tokens=NEW, ignore_eos=True, stop_ids=(free.token_ids[NEW // 2],)),
        SamplingParams(max_tokens=NEW, ignore_eos=True, stop_ids=(free.token_ids[NEW // 2],), min_tokens=NEW - 2),
        *(SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 2, 7)),
        SamplingParams(max_tokens=NEW, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
        SamplingParams(max_tokens=NEW, logit_bias=((free.token_ids[0], 5.0),), temperature=0.7),
    ]
    prompts = [prompt] * len(cases)
    plain = Run(model, config, prompts, cases)
    assert {output.finish_reason for output in plain.outputs.values()} == {"stop", "length"}
    for seed in range(4):
        drafts = spoilt(plain.truth, model, most=8, seed=seed, wrong=0.1)
        assert Run(model, config, prompts, cases, drafts).results == plain.results
    exact = replace(config, policy="sketch", exact=True)
    assert Run(model, exact, prompts, cases, ScriptedDrafts(6)).results == plain.results


def test_a_grammar_is_followed_among_drafts():
    pytest.importorskip("llguidance")
    config = EngineConfig(**SIZES, policy="dense")
    model = model_of(config)
    prompts = ["It was", "The sea is"]
    cases = [
        SamplingParams(max_tokens=40, regex=r"( [a-z]{1,8}){3,6}\."),
        SamplingParams(max_tokens=40, temperature=0.8, json_schema='{"type": "object", "properties": {"a": {}}}'),
    ]
    plain = Run(model, config, prompts, cases)
    drafts = spoilt(plain.truth, model)
    assert Run(model, config, prompts, cases, drafts).results == plain.results
    assert drafts.came > 0
    exact = replace(config, policy="sketch", exact=True)
    assert Run(model, exact, prompts, cases, ScriptedDrafts(4)).results == plain.results


def test_measured_drafts_change_no_bit():
    """As users get them: how many are tried follows the clock."""
    config = EngineConfig(**SIZES, policy="dense")
    model = model_of(config)
    [once] = prompts_of(model, (30,))
    prompts = [once * 3, *prompts_of(model, (41, 130))]
    params = params_of(3)
    plain = Run(model, config, prompts, params)
    for changes in ({"speculative": "lookup"}, {"policy": "sketch", "exact": True}):
        assert Run(model, replace(config, **changes), prompts, params).results == plain.results


class FreeDrafts(MeasuredSpeculator):
    """Believes that drafts cost nothing, so that it tries all it may."""

    def learn(self, requests, step):
        super().learn(requests, step._replace(wall_s=1.0 if step.num_tokens == step.num_sequences else 1e-9))


@pytest.mark.parametrize("exact", [False, True])
def test_drafts_of_a_text_that_repeats_itself_come(exact):
    config = EngineConfig(**SIZES, policy="sketch", sparsity=0.5, exact=exact)
    model = model_of(config)
    prompts = ["one two three four five six seven eight " * 4]
    params = [SamplingParams(max_tokens=60, ignore_eos=True, logit_bias=())]
    plain = Run(model, replace(config, policy=config.reading_policy, exact=False), prompts, params)
    drafted = Run(model, config, prompts, params, FreeDrafts(8, (lambda: 0.1) if exact else None))
    assert drafted.results == plain.results
    report = drafted.outputs["0"].report
    assert report.drafted_tokens >= report.accepted_tokens > 20
    assert sum(record.accepted_tokens for record in drafted.records) == report.accepted_tokens


@pytest.mark.parametrize("policy", ["swa", "h2o", "sketch-mean"])
@pytest.mark.parametrize("option", [{"exact": True}, {"speculative": "lookup"}])
def test_policies_that_cannot_forget_are_refused(policy, option):
    with pytest.raises(InputError, match=f"the policy {policy} cannot forget"):
        EngineConfig(policy=policy, **option)


@st.composite
def cases(draw):
    count = draw(st.integers(1, 4))
    return {
        "lengths": draw(st.lists(st.integers(1, 150), min_size=count, max_size=count)),
        "policy": draw(st.sampled_from(["dense", "sketch", "streaming", "strided"])),
        "exact": draw(st.booleans()),
        "most": draw(st.integers(1, 9)),
        "wrong": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "seed": draw(st.integers(0, 10**6)),
        "cap": draw(st.sampled_from([None, 0.8, 0.4, 0.1])),
        "disk": draw(st.sampled_from([None, 0.5, 0.0])),
        "max_num_seqs": draw(st.sampled_from([1, 2, 4])),
        "prefix_cache": draw(st.booleans()),
        "arrive_after": draw(st.sampled_from([0, 0, 2])),
        "temperature": draw(st.sampled_from([0.0, 0.8])),
        "penalty": draw(st.sampled_from([1.0, 1.2])),
        "new": draw(st.integers(1, 20)),
    }


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_drafts_in_any_setting_change_no_bit(case):
    longest = max(case["lengths"]) + case["new"]
    config = EngineConfig(policy="dense" if case["exact"] else case["policy"], sparsity=0.6, max_model_len=longest)
    model = model_of(config)
    prompts = prompts_of(model, case["lengths"], case["seed"])
    params = [
        SamplingParams(
            max_tokens=case["new"],
            temperature=case["temperature"],
            repetition_penalty=case["penalty"],
            logprobs=1,
            seed=n,
        )
        for n in range(len(prompts))
    ]
    plain = Run(model, config, prompts, params)
    changed = replace(config, policy=case["policy"], exact=case["exact"], max_num_seqs=case["max_num_seqs"])
    if case["cap"] is not None:
        total = sum(case["lengths"]) + len(prompts) * case["new"]
        # What is refused when it is added says nothing about drafts.
        needed = max(int(case["cap"] * total), longest if case["disk"] is not None else 1)
        changed = replace(changed, kv_device_memory=cap_for(model, changed, needed))
        if case["disk"] is not None:
            token_bytes = model.spec.num_layers * 2 * model.spec.kv_size * model.decoder.dtype.itemsize
            changed = replace(changed, kv_disk_memory=int(case["disk"] * total) * token_bytes)
    elif case["prefix_cache"]:
        changed = replace(changed, prefix_cache=True, kv_device_memory="64MiB")
    truth = None if case["exact"] and case["seed"] % 2 else plain.truth
    drafts = ScriptedDrafts(case["most"], case["seed"], truth, case["wrong"], model.spec.vocab_size)
    drafted = Run(model, changed, prompts, params, drafts, arrive_after=case["arrive_after"])
    assert drafted.results == plain.results

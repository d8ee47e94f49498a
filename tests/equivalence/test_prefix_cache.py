"""A prompt that begins like an earlier one gets the same tokens and logits, to the last bit, as if it came alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from alisa import LLM, SamplingParams
from alisa.engine.builder import build_engine
from alisa.errors import CapacityError, InputError
from alisa.policy.registry import POLICIES
from tests.caps import device_cap
from tests.equivalence.test_company import run

SIZES = {"max_num_seqs": 4, "max_model_len": 330}
NEW_TOKENS = 8


def ids(llm, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist()


def prompts_of(llm, shared=(0, 40, 150, 300, 299, 160)):
    """Prompts that share so many tokens with the first, and then go on in their own way."""
    first = ids(llm, 310, 1)
    return [first[:length] + ids(llm, 7 + index, 2 + index) for index, length in enumerate(shared)]


def cached(outputs):
    return [output.report.cached_tokens for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "dense", "dtype": "bfloat16"},
        {"policy": "sketch", "dtype": "bfloat16"},
        {"policy": "sketch", "dtype": "float32"},
        {"policy": "swa", "dtype": "bfloat16"},
        {"policy": "streaming", "dtype": "float32", "weight_dtype": "int8"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"policy": "dense", "dtype": "float32"},
                {"policy": "dense", "dtype": "float16"},
                {"policy": "sketch-mean", "dtype": "bfloat16"},
                {"policy": "swa", "dtype": "float32"},
                {"policy": "swa-head", "dtype": "bfloat16"},
            )
        ),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_policy_and_dtype_gives_the_same_bits(options):
    options = {"sparsity": 0.5, **SIZES} | options
    plain, keeps = LLM(**options), LLM(**options, prefix_cache=True)
    prompts = prompts_of(plain)
    expected = run(plain, prompts, new_tokens=NEW_TOKENS)
    assert run(keeps, prompts, new_tokens=NEW_TOKENS) == expected
    assert run(keeps, prompts[::-1], num_threads=2, new_tokens=NEW_TOKENS).tokens == expected.tokens[::-1]
    outputs = keeps.generate(prompts, SamplingParams(max_tokens=1))
    entry = POLICIES[options["policy"]]
    usable = [min(entry.usable_prefix(0.5, len(prompt)), len(prompt) - 1) for prompt in prompts]
    assert cached(outputs) == [count // 16 * 16 for count in usable]
    assert outputs.report.summary.cached_tokens == sum(cached(outputs))


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "qwen3-moe",
        "phi3-longrope",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "mistral-window", "gpt2", "opt", "olmo2")),
    ],
)
def test_families_give_the_same_bits(name, tiny_model):
    """Windows, caps of scores, experts, learned positions, rotations that depend on the length of the sequence."""
    options = {"sparsity": 0.5, "max_num_seqs": 3, "prefill_chunk": 32, "dtype": "float32"}
    plain, keeps = LLM(tiny_model(name), **options), LLM(tiny_model(name), **options, prefix_cache=True)
    first = ids(plain, 90, 1)
    prompts = [first, first[:70] + ids(plain, 20, 2), first[:33] + ids(plain, 40, 3), first[:80]]
    expected = run(plain, prompts, new_tokens=NEW_TOKENS)
    assert run(keeps, prompts, new_tokens=NEW_TOKENS) == expected
    assert run(keeps, prompts, new_tokens=NEW_TOKENS) == expected
    hits = cached(keeps.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS)))
    assert hits == [80, 80, 64, 64]


def test_a_policy_that_sees_every_row_keeps_nothing(caplog):
    llm = LLM(policy="h2o", prefix_cache=True, **SIZES)
    prompts = prompts_of(llm)
    assert cached(llm.generate(prompts + prompts, SamplingParams(max_tokens=2))) == [0] * 12
    assert "--policy h2o looks at every row of a prompt" in caplog.text


@pytest.mark.parametrize(("policy", "kv_dtype"), [("sketch", "int8"), ("swa", "int4"), ("sketch", "k8v4")])
def test_rounded_rows_take_whole_sections(policy, kv_dtype):
    options = {"policy": policy, "kv_dtype": kv_dtype, "dtype": "bfloat16", "max_model_len": 1300}
    plain, keeps = LLM(**options), LLM(**options, prefix_cache=True)
    first = ids(plain, 1200, 1)
    prompts = [first, first[:1150] + ids(plain, 50, 2), first[:1000]]
    expected = [run(plain, [prompt], num_threads=2, new_tokens=4) for prompt in prompts]
    assert [run(keeps, [prompt], num_threads=2, new_tokens=4) for prompt in prompts] == expected
    assert cached(keeps.generate(prompts[1:], SamplingParams(max_tokens=1))) == [1024, 0]


def test_the_texts_of_a_prompt_read_it_once():
    llm = LLM(prefix_cache=True, **SIZES)
    prompt = ids(llm, 300, 1)
    outputs = llm.generate([prompt], SamplingParams(n=6, temperature=1.0, max_tokens=5, ignore_eos=True))
    assert cached(outputs) == [0] + [288] * 5
    read = sum(record.num_tokens for record in outputs.report.records if record.prefill)
    assert read == 300 + 5 * 12
    expected = LLM(**SIZES).generate([prompt], SamplingParams(n=6, temperature=1.0, max_tokens=5, ignore_eos=True))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_a_conversation_reads_what_is_new():
    llm = LLM(prefix_cache=True, **SIZES)
    said = ids(llm, 100, 1)
    known = 0
    for turn in range(3):
        [output] = llm.generate([said], SamplingParams(max_tokens=10, ignore_eos=True))
        assert output.report.cached_tokens == known // 16 * 16
        known = len(said)
        said = [*said, *output.token_ids, *ids(llm, 20, turn)]


def test_salts_share_nothing():
    llm = LLM(prefix_cache=True, **SIZES)
    engine, _ = build_engine(llm._model, llm.config)
    prompt = ids(llm, 64, 1)
    found = []
    for salt in ("", "a", "b", "a", ""):
        engine.add_request(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        while engine.has_requests:
            found += [output.report.cached_tokens for output in engine.step().finished]
    assert found == [0, 0, 0, 48, 48]


def test_a_directory_serves_the_next_run_of_the_same_model(tmp_path, tiny_model):
    options = {"prefix_cache": True, "prefix_cache_disk": tmp_path / "kv", **SIZES}
    expected = run(LLM(**SIZES), prompts := prompts_of(LLM(**SIZES)), new_tokens=NEW_TOKENS)
    assert run(LLM(**options), prompts, new_tokens=NEW_TOKENS) == expected

    def starts_with(**changed):
        return cached(LLM(**(options | changed)).generate([prompts[3]], SamplingParams(max_tokens=1)))[0] > 0

    again = LLM(**options)
    assert cached(again.generate([prompts[3]], SamplingParams(max_tokens=1))) == [304]
    assert run(again, prompts, new_tokens=NEW_TOKENS) == expected
    assert starts_with(policy="dense"), "K and V of a prompt are those of every policy"
    assert not starts_with(dtype="bfloat16")
    assert not starts_with(weight_dtype="int8")
    assert not starts_with(kv_dtype="bfloat16")
    small = LLM(tiny_model("llama"), prefix_cache=True, prefix_cache_disk=tmp_path / "kv")
    assert cached(small.generate([[*range(50)]] * 2, SamplingParams(max_tokens=1))) == [0, 48]


def test_damaged_files_change_no_token(tmp_path):
    options = {"prefix_cache": True, "prefix_cache_disk": tmp_path, **SIZES}
    prompts = prompts_of(LLM(**SIZES))
    expected = run(LLM(**options), prompts, new_tokens=NEW_TOKENS)
    draw = random.Random(1)
    for path in sorted(tmp_path.glob("*/*")):
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            path.write_bytes(content)
    assert run(LLM(**options), prompts, new_tokens=NEW_TOKENS).tokens == expected.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache_disk": "kv"}, "prefix_cache is off, and an option says how it is kept"),
        ({"prefix_cache": True, "prefix_cache_disk_memory": "1GiB"}, "is of the directory prefix_cache_disk"),
        ({"prefix_cache": True, "prefix_cache_memory": "much"}, "prefix_cache_memory: 'much' is not a memory size"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LLM(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache_memory": "2GiB", "kv_device_memory": "1GiB"}, "leaves nothing of a cap of 1.0 GiB"),
        ({"prefix_cache_memory": "1KiB"}, "has no room for a block of 16 tokens, which is 64.0 KiB"),
    ],
)
def test_a_cache_without_room_is_refused(options, message):
    with pytest.raises(CapacityError, match=message):
        LLM(prefix_cache=True, **options, **SIZES).generate(["a"])


# --- under pressure --------------------------------------------------------------------------------------------------

THREE_PHASES = {
    "schedule": "three-phase",
    "offload_from": 3,
    "recompute_from": 8,
    "offload_ratio": 0.7,
    "recompute_ratio": 0.6,
}
SMALL = {"max_num_seqs": 3, "max_model_len": 120, "sparsity": 0.5}
FAMILIES = 3
"""Prompts of a family begin alike."""


class PrefixMachine(RuleBasedStateMachine):
    """Requests that begin alike come, are aborted and run, under any caps; each says what it says alone, and nothing
    is left in the end. `expected` remembers what a model without a cache said, by policy and prompt."""

    directory = None
    schedule = None
    models: ClassVar[dict] = {}
    expected: ClassVar[dict] = {}

    @classmethod
    def model(cls, **options):
        key = json.dumps(options, sort_keys=True)
        if key not in cls.models:
            cls.models[key] = LLM(cls.directory, **options)
        return cls.models[key]

    @initialize(draw=st.randoms())
    def set_up(self, draw):
        policy, dtype = (
            draw.choice(("dense", "sketch", "sketch-mean", "swa", "local")),
            draw.choice(("float32", "bfloat16")),
        )
        self.plain = self.model(policy=policy, dtype=dtype, **SMALL)
        options = {"prefill_chunk": draw.choice((16, 40, 1024)), "prefix_cache": True}
        kind = draw.choice(("roomy", "few blocks", "tiers", "no disk", "phases"))
        token_bytes = self.plain.describe()["kv_token_bytes"]
        # With phases, blocks keep the layers' inputs as well.
        spec = self.plain.spec
        hidden_bytes = spec.num_layers * spec.hidden_size * 4
        keeps = draw.randint(1, 9) * 16 * (token_bytes + hidden_bytes) + 4000
        cap = keeps + device_cap(self.plain, draw.randint(60, 200))
        if kind != "roomy":
            options["prefix_cache_memory"] = keeps
        if kind in ("tiers", "no disk"):
            options |= {"kv_device_memory": cap, "kv_disk_memory": None if kind == "tiers" else 0}
        if kind == "phases":
            options["schedule"] = self.schedule
        self.engine, _ = build_engine(self.plain._model, replace(self.plain.config, **options))
        self.policy, self.dtype = policy, dtype
        self.asked, self.said, self.hits = {}, {}, 0
        self.count = 0

    @rule(
        family=st.integers(0, FAMILIES - 1),
        shared=st.integers(0, 80),
        own=st.integers(1, 20),
        seed=st.integers(0, 1),
        new=st.integers(1, 12),
        priority=st.integers(0, 1),
    )
    def add(self, family, shared, own, seed, new, priority):
        prompt = (*ids(self.plain, 80, family)[:shared], *ids(self.plain, own, 100 + seed))
        name = f"r{self.count}"
        self.count += 1
        try:
            self.engine.add_request(
                prompt, SamplingParams(max_tokens=new, ignore_eos=True), request_id=name, priority=priority
            )
        except CapacityError:
            return
        self.asked[name] = prompt, new

    @rule(draw=st.randoms())
    def abort(self, draw):
        if self.asked:
            name = draw.choice(sorted(self.asked))
            self.engine.abort(name)
            del self.asked[name]

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step().finished:
                prompt, new = self.asked.pop(output.request_id)
                assert output.finish_reason == "length", output.error
                assert output.token_ids == self.alone(prompt)[:new]
                self.hits += output.report.cached_tokens

    @invariant()
    def books_are_sound(self):
        if hasattr(self, "engine"):
            self.engine._session.cache.store.check()
            self.engine._session.prefix.check()

    def alone(self, prompt):
        key = self.policy, self.dtype, prompt
        if key not in self.expected:
            params = SamplingParams(max_tokens=12, ignore_eos=True)
            self.expected[key] = self.plain.generate([prompt], params)[0].token_ids
        return self.expected[key]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.has_requests:
            self.step(1)
        session = self.engine._session
        assert (session.cache.store.used_rows, session.state.nbytes) == (0, 0)
        self.engine.close()


@pytest.fixture
def machine(tiny_model, tmp_path):
    PrefixMachine.directory = tiny_model("llama-gqa-tied")
    PrefixMachine.schedule = tmp_path / "three-phase.json"
    PrefixMachine.schedule.write_text(json.dumps(THREE_PHASES))
    yield PrefixMachine
    PrefixMachine.models.clear()
    PrefixMachine.expected.clear()


def test_no_pressure_and_no_company_changes_a_token(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=15, deadline=None))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_pressure_and_no_company_changes_a_token_in_many_runs(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))

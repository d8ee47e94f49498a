"""What was said is read while nobody waits: the next turn knows it, and gets the tokens it gets without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from alisa import LLM, SamplingParams
from alisa.engine.answers import MAX_ANSWERS
from alisa.engine.builder import build_engine
from alisa.errors import CapacityError
from tests.caps import device_cap
from tests.combinations import each
from tests.equivalence.test_prefix_cache import ids

SIZES = {"max_num_seqs": 3, "max_model_len": 400, "sparsity": 0.5}


def engine_of(llm, **options):
    return build_engine(llm.model, replace(llm.config, prefix_cache=True, **options))[0]


def finish(engine):
    outputs = []
    while engine.has_requests:
        outputs += engine.step().finished
    return outputs


def read_all(engine, most=1000):
    count = 0
    while engine.read_answer():
        count += 1
        assert count < most
    return count


def ask(engine, prompt, new=40, *, continues=True, cache_salt=""):
    rules = SamplingParams(max_tokens=new, ignore_eos=True)
    engine.add_request(prompt, rules, continues=continues, cache_salt=cache_salt)
    [output] = finish(engine)
    return output


@each(policy=["sketch", "dense", "sketch-mean", "swa", "local"], dtype=["bfloat16", "float32"])
def test_the_next_turn_reads_only_what_is_new(policy, dtype):
    llm = LLM(policy=policy, dtype=dtype, **SIZES)
    engine, said, known = engine_of(llm), [], 0
    for turn in range(4):
        said += ids(llm, 25 + turn, turn)
        output = ask(engine, said)
        assert output.token_ids == llm.generate([said], SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids
        if turn:
            # Of swa, what its observation window has to see is read again.
            assert output.report.cached_tokens == min(known, engine._prefix_rules.most(len(said)))
        said += output.token_ids
        known = (len(said) - 1) // 16 * 16  # the last token has no row
        assert read_all(engine) > 0
        session = engine._session
        assert (session.cache.store.used_rows, session.state.nbytes) == (0, 0)


def test_a_step_of_nobody_leaves_what_is_being_read_alone():
    llm = LLM(policy="dense", **SIZES)
    engine = engine_of(llm)
    ask(engine, ids(llm, 60, 0), 300)
    assert engine.read_answer()
    before = engine.status().answer
    assert before is not None
    assert engine.step().plan is None
    assert engine.status().answer == before
    read_all(engine)


def test_the_status_says_what_is_being_read():
    llm = LLM(policy="dense", **SIZES)
    engine = engine_of(llm)
    for turn in range(2):
        ask(engine, ids(llm, 60, turn))
    assert engine.status().answer is None
    assert engine.read_answer()
    answer = engine.status().answer
    assert 0 < answer.tokens_read < answer.num_tokens == 96
    assert answer.num_waiting == 1
    read_all(engine)
    assert engine.status().answer is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_decode_steps_are_not_those_of_prompts(dtype):
    """Why answers are read once more: if this fails, their rows could be kept."""
    llm = LLM(policy="dense", dtype=dtype, **SIZES)
    engine = build_engine(llm.model, llm.config)[0]
    engine.add_request(ids(llm, 50, 1), SamplingParams(max_tokens=20, ignore_eos=True), request_id="said")
    request = engine.scheduler.requests["said"]
    while request.num_cached < 60:
        engine.step()
    store = engine._session.cache.store
    last = llm.spec.num_layers - 1
    said = store.read(last, request.req_idx, 50, 60)
    tokens = request.token_ids[:61]
    engine.abort("said")
    engine.add_request(tokens, SamplingParams(max_tokens=2, ignore_eos=True), request_id="read")
    engine.step()
    read = store.read(last, engine.scheduler.requests["read"].req_idx, 50, 60)
    # In 16 bits it depends on the instruction set whether rounding hides the difference in so few rows.
    assert dtype != "float32" or not said[0].equal(read[0])
    assert said[0].float().allclose(read[0].float(), atol=0.3), "they are rows of the same tokens"


def test_rounded_rows_are_read_by_whole_sections():
    llm = LLM(kv_dtype="int8", dtype="bfloat16", policy="sketch", max_num_seqs=2, max_model_len=1400)
    engine = engine_of(llm)
    first = ids(llm, 1000, 1)
    output = ask(engine, first)
    assert read_all(engine) == 1
    following = [*first, *output.token_ids, *ids(llm, 10, 2)]
    again = ask(engine, following, 8)
    assert again.report.cached_tokens == 1024
    assert again.token_ids == llm.generate([following], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    assert read_all(engine) == 0, "there is no other whole section"


def test_who_comes_ends_the_reading_and_waits_for_one_step():
    llm = LLM(dtype="float32", max_num_seqs=2, max_model_len=1200, policy="sketch")
    engine = engine_of(llm)
    long = ids(llm, 100, 1)
    output = ask(engine, long, 800)
    assert engine.read_answer()
    assert engine.read_answer()
    assert not engine.has_requests
    assert engine.status().requests == ()
    other = ask(engine, ids(llm, 30, 2), 5)
    assert (
        other.token_ids == llm.generate([ids(llm, 30, 2)], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids
    )
    # What had been read stays known: the blocks of the prompt, and those of a step and of a part of another.
    following = ask(engine, [*long, *output.token_ids, 5], 1, continues=False)
    assert 96 < following.report.cached_tokens < 880


def test_what_will_not_be_found_is_not_read(tiny_model):
    llm = LLM(policy="sketch", dtype="float32", **SIZES)
    prompt = ids(llm, 60, 1)
    for options, rules in (
        ({}, {"continues": False}),
        ({"policy": "h2o"}, {}),
        ({"prefix_cache_memory": 5 * 16 * llm.describe()["kv_token_bytes"]}, {}),  # fewer blocks than the text has
    ):
        engine = engine_of(llm, **options)
        ask(engine, prompt, **rules)
        assert read_all(engine) == 0, options
    by_length = LLM(tiny_model("phi3-longrope"), dtype="float32", max_num_seqs=2)
    engine = engine_of(by_length)
    ask(engine, ids(by_length, 20, 1), 20)
    assert read_all(engine) == 0


def test_a_turn_that_came_first_has_read_it():
    llm = LLM(policy="sketch", dtype="float32", **SIZES)
    engine = engine_of(llm)
    prompt = ids(llm, 30, 1)
    output = ask(engine, prompt)
    ask(engine, [*prompt, *output.token_ids, 7], 1, continues=False)
    assert read_all(engine) == 0


def test_salts_share_no_answers_and_few_wait():
    llm = LLM(policy="sketch", dtype="float32", **SIZES)
    engine = engine_of(llm)
    prompt = ids(llm, 30, 1)
    output = ask(engine, prompt, cache_salt="a")
    assert read_all(engine) == 2  # what is known is taken from the cache, the rest is read
    following = [*prompt, *output.token_ids, 7]
    found = [ask(engine, following, 1, continues=False, cache_salt=salt).report.cached_tokens for salt in ("b", "a")]
    assert found == [0, 64]
    for number in range(MAX_ANSWERS + 3):
        ask(engine, ids(llm, 17, 100 + number), 16)
    assert len(engine._answers._answers) == MAX_ANSWERS


class Conversations(RuleBasedStateMachine):
    """Conversations go on at random, under any caps, while answers are read a little, all, or not at all: every turn
    gets what it gets from a model without a cache, and nothing is left in the end."""

    directory = None
    models: ClassVar[dict] = {}
    expected: ClassVar[dict] = {}

    @initialize(draw=st.randoms())
    def set_up(self, draw):
        policy, dtype = draw.choice(("dense", "sketch", "swa")), draw.choice(("float32", "bfloat16"))
        key = policy, dtype
        if key not in self.models:
            self.models[key] = LLM(
                self.directory, policy=policy, dtype=dtype, max_num_seqs=3, max_model_len=120, sparsity=0.5
            )
        self.key, self.plain = key, self.models[key]
        options = {"prefill_chunk": draw.choice((16, 1024)), "max_step_tokens": draw.choice((None, 16))}
        token_bytes = self.plain.describe()["kv_token_bytes"]
        keeps = draw.randint(2, 14) * 16 * token_bytes + 5000
        kind = draw.choice(("roomy", "few blocks", "tiers", "no disk"))
        if kind != "roomy":
            options["prefix_cache_memory"] = keeps
        if kind in ("tiers", "no disk"):
            cap = keeps + device_cap(self.plain, draw.randint(60, 160))
            options |= {"kv_device_memory": cap, "kv_disk_memory": None if kind == "tiers" else 0}
        self.engine = engine_of(self.plain, **options)
        self.said = {number: [*ids(self.plain, 20, number % 2)] for number in range(4)}
        self.asked = {}
        self.count = 0

    @rule(number=st.integers(0, 3), own=st.integers(1, 20), new=st.integers(1, 30))
    def turn(self, number, own, new):
        if number in self.asked.values() or len(self.said[number]) + own + new > 120:
            return
        prompt = [*self.said[number], *ids(self.plain, own, self.count)]
        name = f"turn-{self.count}"
        self.count += 1
        try:
            self.engine.add_request(
                prompt, SamplingParams(max_tokens=new, ignore_eos=True), request_id=name, continues=True
            )
        except CapacityError:
            return
        self.asked[name] = number

    @rule(draw=st.randoms())
    def abort(self, draw):
        if self.asked:
            name = draw.choice(sorted(self.asked))
            del self.asked[name]
            self.engine.abort(name)

    @rule(count=st.integers(1, 40))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step().finished:
                assert output.finish_reason == "length", output.error
                assert output.token_ids == self.alone(output.prompt_ids)[: len(output.token_ids)]
                self.said[self.asked.pop(output.request_id)] = [*output.prompt_ids, *output.token_ids]

    @rule(count=st.integers(1, 20))
    def read(self, count):
        for _ in range(count):
            self.engine.read_answer()

    @invariant()
    def books_are_sound(self):
        if hasattr(self, "engine"):
            self.engine._session.cache.store.check()
            self.engine._session.prefix.check()

    def alone(self, prompt):
        key = *self.key, prompt
        if key not in self.expected:
            params = SamplingParams(max_tokens=min(30, 120 - len(prompt)), ignore_eos=True)
            self.expected[key] = self.plain.generate([prompt], params)[0].token_ids
        return self.expected[key]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.has_requests:
            self.step(1)
        read_all(self.engine)
        session = self.engine._session
        assert (session.cache.store.used_rows, session.state.nbytes) == (0, 0)
        self.engine.close()


@pytest.fixture
def machine(tiny_model):
    Conversations.directory = tiny_model("llama-gqa-tied")
    yield Conversations
    Conversations.models.clear()
    Conversations.expected.clear()


def test_no_conversation_notices(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=20, deadline=None))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_conversation_notices_in_many_runs(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None))

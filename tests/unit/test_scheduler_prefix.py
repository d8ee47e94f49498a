"""What the scheduler does with beginnings of prompts that are known; all prompts here begin alike."""

from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from alisa.scheduler.placement.base import Limits
from alisa.scheduler.prefix import BLOCK_TOKENS
from tests.scheduler_cases import Driver, KnownBlocks


def test_what_is_known_is_restored_and_the_rest_is_read():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks())
    first = driver.add("a", 40, 1)
    assert driver.steps() == [{"a": (0, 40)}]
    second = driver.add("b", 50, 1)
    assert driver.step() == {"b": (0, 32)}
    assert (driver.plan.prefill, driver.plan.restored) == (True, True)
    assert driver.step() == {"b": (32, 18)}
    assert not driver.plan.restored
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)


def test_the_last_token_of_a_prompt_is_always_read():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks())
    for name in "abc":
        request = driver.add(name, 32, 1)
        driver.steps()
    assert request.cached_tokens == 16


def test_a_prompt_waits_for_one_that_is_read_and_begins_alike():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks())
    for name in "abc":
        driver.add(name, 20, 2)
    driver.add("short", 9, 2)
    assert driver.steps() == [
        {"a": (0, 20), "short": (0, 9)},
        {"b": (0, 16), "c": (0, 16)},
        {"b": (16, 4), "c": (16, 4)},
        {"a": (20, 1), "short": (9, 1), "b": (20, 1), "c": (20, 1)},
    ]


def sources(driver):
    """Whose rows each chunk of the last plan shares."""
    names = {request.req_idx: name for name, request in driver.scheduler.requests.items()}
    return {names[chunk.req_idx]: names.get(chunk.source) for chunk in driver.plan.chunks}


def test_what_comes_from_the_cache_is_shared_with_one_who_has_it():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks())
    driver.add("a", 40, 9)
    driver.step()
    for name in "bc":
        driver.add(name, 50, 9)
    driver.step()
    assert sources(driver) == {"b": "a", "c": "a"}
    driver.abort("a")
    driver.add("d", 50, 9)
    driver.step()
    assert sources(driver) == {"d": "b"}, "who had the rows has gone, and others have them still"
    for name in "bcd":
        driver.abort(name)
    driver.add("e", 50, 9)
    driver.add("f", 50, 9)
    driver.step()
    assert sources(driver) == {"e": None, "f": "e"}, "nobody has it any more, and two want it"


def test_one_with_rows_of_its_own_goes_on_with_them():
    driver = Driver(Limits(1000), prefill_chunk=16, prefix=KnownBlocks())
    driver.add("a", 60, 9, priority=1)
    driver.step()
    driver.add("b", 36, 9)
    driver.step()
    assert sources(driver) == {"b": "a"}
    assert driver.step() == {"b": (16, 16)}
    assert driver.step() == {"a": (16, 16)}
    assert driver.plan.restored
    assert sources(driver) == {"a": None}, "b has its first rows from a, so that a cannot have them from b"


def test_rows_that_are_shared_take_room_once():
    # Of each prompt's 70 tokens 64 are shared; the other 6 and the output, which takes 20 rows, are everyone's own.
    needed = 64 + 4 * (6 + 20)
    for num_tokens, fits in ((needed, True), (needed - 1, False)):
        driver = Driver(Limits(num_tokens), prefill_chunk=64, prefix=KnownBlocks())
        requests = [driver.add(name, 70, 21) for name in "abcd"]
        driver.steps()
        assert sorted(driver.finished) == [*"abcd"]
        assert (not any(request.num_preempted for request in requests)) == fits


BURSTS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 3), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=12
)
"""Of each request the tokens of its prompt and of its output, its priority, and the steps since the one before it."""


@example([(17, 1, 0, 0), (130, 1, 0, 0), (142, 1, 0, 0), (17, 1, 0, 0)], 48, None, 3)  # one waits, another is read
@given(
    burst=BURSTS, chunk=st.sampled_from([16, 48, 1024]), shared=st.sampled_from([None, 16, 64]), most=st.integers(1, 8)
)
def test_what_a_burst_of_prompts_has_in_common_is_read_once(burst, chunk, shared, most):
    driver = Driver(Limits(10_000), prefill_chunk=chunk, shared_chunk=shared, max_num_seqs=most, prefix=KnownBlocks())
    requests, read = {}, Counter()

    def step():
        chunks = driver.step()
        for name, (start, count) in () if chunks is None or driver.plan.restored else chunks.items():
            # The last token of a prompt has to be read, and with it the block that it is in.
            end = min(start + count, requests[name].max_restored)
            read.update(range(start // BLOCK_TOKENS, end // BLOCK_TOKENS))
        return chunks is not None

    for number, (prompt_len, new, priority, pause) in enumerate(burst):
        for _ in range(pause):
            step()
        name = str(number)
        requests[name] = driver.add(name, prompt_len, new, priority)
    while step():
        pass
    assert sorted(driver.finished) == sorted(requests)
    assert set(read.values()) <= {1}


def test_nobody_waits_for_what_a_full_cache_does_not_keep():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks(most=0))
    for name in "ab":
        driver.add(name, 20, 1)
    assert driver.steps() == [{"a": (0, 20)}, {"b": (0, 20)}]


def test_a_step_restores_as_many_tokens_as_it_may_read():
    driver = Driver(Limits(1000), prefill_chunk=32, prefix=KnownBlocks())
    driver.add("a", 80, 1)
    driver.steps()
    for name in "bc":
        driver.add(name, 81, 1)
    assert driver.steps()[:5] == [
        {"b": (0, 32)},
        {"b": (32, 32)},
        {"b": (64, 16), "c": (0, 16)},
        {"c": (16, 32)},
        {"c": (48, 32)},
    ]


def test_what_can_be_read_on_together_is_restored_before_that():
    driver = Driver(Limits(1000), prefill_chunk=32, prefix=KnownBlocks())
    for name in "abc":
        driver.add(name, 84, 1)
    assert driver.steps() == [
        {"a": (0, 32)},
        {"a": (32, 32)},
        {"b": (0, 32)},  # "a" has 20 tokens left, and "c" would not fit into the same step
        {"b": (32, 32)},
        {"a": (64, 20)},
        {"b": (64, 16), "c": (0, 16)},
        {"c": (16, 32)},
        {"c": (48, 32)},
        {"b": (80, 4), "c": (80, 4)},
    ]


def test_hits_end_where_whole_sections_end():
    driver = Driver(Limits(1000), prefill_chunk=64, prefix=KnownBlocks(hit_tokens=64))
    driver.add("a", 150, 1)
    driver.steps()
    driver.add("b", 140, 1)
    assert driver.steps() == [{"b": (0, 64)}, {"b": (64, 64)}, {"b": (128, 12)}]


def test_one_that_lost_its_rows_takes_its_own_beginning_back():
    driver = Driver(Limits(56), prefill_chunk=64, prefix=KnownBlocks())  # the 16 tokens that they share count once
    driver.add("a", 20, 30)
    request = driver.add("b", 19, 20)
    plans = []
    while driver.step() is not None:
        plans.append(driver.plan)
    assert request.num_preempted > 0
    restored = [(chunk.start, chunk.count) for plan in plans if plan.restored for chunk in plan.chunks]
    assert len(restored) == 1 + request.num_preempted
    assert request.cached_tokens == 16, "as many as when it was read for the first time"

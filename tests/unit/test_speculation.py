"""Where drafts come from, how many are tried, and what is learnt from them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.config import SamplingParams
from alisa.engine.lookup import LONGEST_MATCH, SHORTEST_MATCH, TokenText
from alisa.engine.speculator import Acceptance, MeasuredSpeculator
from alisa.engine.step_prices import BatchPrices, DraftedStep, Worth
from alisa.planner.speculation import DraftWork, StepPrices
from alisa.scheduler.request import Request


def text_of(tokens):
    text = TokenText()
    text.extend(tokens)
    return text


def plain_match(tokens):
    """The latest earlier place with the longest match, by looking at all of them."""
    for count in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for end in range(len(tokens) - 1, count - 1, -1):
            if len(tokens) > count and tokens[end - count : end] == tokens[-count:]:
                return end, count
    return None


@given(tokens=st.lists(st.sampled_from([0, 1, 2, 256, 65536, 2**24]), max_size=60), cut=st.integers(0, 60))
def test_a_match_is_the_latest_of_the_longest(tokens, cut):
    """Also where the bytes of tokens repeat at places that are no tokens."""
    text = text_of(tokens[:cut])
    text.extend(tokens)
    assert text.match() == plain_match(tokens)


def test_what_follows_goes_on_after_the_end_as_a_loop_does():
    text = text_of([9, 1, 2, 3, 1, 2])
    match = text.match()
    assert match == (3, 2)
    assert text.following(match.start, 7) == [3, 1, 2, 3, 1, 2, 3]


@given(
    step=st.floats(0.1, 10),
    token=st.floats(0.001, 2),
    draft=st.floats(0, 2),
    acceptance=st.floats(0, 1),
    most=st.integers(0, 12),
)
def test_as_many_drafts_as_give_the_most_tokens_a_second(step, token, draft, acceptance, most):
    prices = StepPrices(step, token, draft)

    def rate(count):
        return sum(acceptance**n for n in range(count + 1)) / (step + count * (token + draft))

    best = prices.draft_length(acceptance, most)
    assert 0 <= best <= most
    assert best == 0 or rate(best) > rate(0)
    assert rate(best) >= max(map(rate, range(most + 1))) / 1.06


def test_drafts_that_cost_a_step_each_are_never_made_up():
    assert StepPrices(1.0, 0.1, 1.0).draft_length(1.0, 8) == 0
    assert StepPrices(1.0, 0.1, 0.3).draft_length(0.95, 8) > 0


def test_a_draft_is_dear_where_weights_outweigh_rows_and_cheap_where_rows_lie_on_disk():
    work = DraftWork(weight_bytes=300_000_000, token_bytes=23_000, read_share=0.2, state_share=0.3, churn=0.33)
    assert work.share(100, 0) > 0.95
    assert work.share(100_000, 0) < 0.7
    assert work.share(500, 1500) < 0.3


def test_drafts_that_do_not_come_are_tried_less_and_less_often():
    acceptance, prices = Acceptance(1.0, 2.0), StepPrices(1.0, 0.2)
    tried = []
    for step in range(400):
        if count := acceptance.length(prices, 8):
            tried.append(step)
            acceptance.learn(count, 0)
    assert 3 < len(tried) < 12
    gaps = [after - before for before, after in zip(tried[-4:], tried[-3:], strict=False)]
    assert gaps == sorted(gaps)
    for _ in range(40):  # the text begins to repeat itself
        if count := acceptance.length(StepPrices(1.0, 0.05), 8):
            acceptance.learn(count, count)
    acceptance.learn(8, 8)
    acceptance.learn(8, 8)
    assert acceptance.length(prices, 8) > 2


def step_of(num_sequences, further, accepted, wall_s, num_passes=0, drafting_s=0.0):
    return DraftedStep(num_sequences, num_sequences + further, accepted, wall_s, num_passes, drafting_s)


def priced(num_sequences=4, wall_s=0.1):
    """Prices after the plain steps that come first, of which the first one took long."""
    prices = BatchPrices()
    for extra_s in (1.0, 0.0, 0.0):
        assert prices.wants_plain
        prices.learn(step_of(num_sequences, 0, 0, wall_s + extra_s), 0.0)
    assert not prices.wants_plain
    return prices


def test_prices_are_learnt_from_steps_with_and_without_drafts():
    draw, prices = random.Random(0), priced()
    for _ in range(100):
        further = 0 if prices.wants_plain else 4
        passes = 2 * bool(further)
        noise = draw.uniform(-0.005, 0.005)
        prices.learn(
            step_of(4, further, further, 0.1 + 0.004 * further + noise + 0.03 * passes, passes, 0.03 * passes), 0.5
        )
    assert prices.plain_s == pytest.approx(0.1, rel=0.1)
    assert prices.token_s == pytest.approx(0.004, rel=0.5)
    assert prices.plain_s * 0.5 * prices.pass_ratio == pytest.approx(0.03, rel=0.2)


def test_a_plain_step_comes_now_and_then():
    prices = priced()
    plain = 0
    for _ in range(170):
        plain += prices.wants_plain
        prices.learn(step_of(4, 0, 0, 0.1) if prices.wants_plain else step_of(4, 8, 8, 0.12), 0.0)
    assert plain == 10


def test_drafts_that_make_steps_slower_rest_longer_each_time():
    """Whatever single figures promise: what counts is the time for a token."""
    prices, drafted = priced(), []
    for number in range(400):
        if prices.wants_plain or prices.by_policy.left:
            prices.learn(step_of(4, 0, 0, 0.1), 0.5)
        else:
            drafted.append(number)
            prices.learn(step_of(4, 8, 8, 0.32, 2, 0.1), 0.5)  # thrice the tokens in 3.2 times the time
    assert 4 <= len(drafted) <= 24
    assert not prices.from_text.left, "drafts of the text have not been tried"
    worth = Worth()
    for _ in range(50):
        worth.learn(0.8)
    assert not worth.left


def request_of(tokens, new=50):
    request = Request("r", tokens[:1], SamplingParams(max_tokens=new + len(tokens)), new + len(tokens) - 1)
    for token in tokens[1:]:
        request.append(token)
    request.num_cached = len(tokens) - 1
    return request


def warm(speculator):
    for _ in range(3):
        speculator.learn([], step_of(1, 0, 0, 0.1))


def test_a_text_that_repeats_itself_is_looked_up_and_never_beyond_its_end():
    speculator = MeasuredSpeculator(8)
    request = request_of([1, 2, 3, 4, 5, 6] * 3, new=4)
    speculator.propose([request])
    assert request.num_drafts == 0, "nothing is known yet of what a step costs"
    warm(speculator)
    for _ in range(10):
        speculator.propose([request])
        assert request.draft_ids == [1, 2, 3][: request.num_drafts]
        count = request.num_drafts
        speculator.learn([(request, count, count)], step_of(1, count, count, 0.1))
    assert request.num_drafts == 3, "one token fewer than may come: the step itself gives one"
    request.num_cached -= 1  # it has lost its rows and catches up
    speculator.propose([request])
    assert (request.num_drafts, request.draft_ids) == (0, [])


def test_the_policy_drafts_where_the_text_does_not_repeat_itself():
    speculator = MeasuredSpeculator(8, lambda: 0.1)
    request = request_of(list(range(20)))
    warm(speculator)
    speculator.propose([request])
    assert request.num_drafts > 0
    assert request.draft_ids == []
    dear = MeasuredSpeculator(8, lambda: 1.0)
    warm(dear)
    for _ in range(1000):
        dear.propose([request])
        assert request.num_drafts == 0

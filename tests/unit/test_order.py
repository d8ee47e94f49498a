"""Who is admitted next, and how long outputs are guessed to be."""

import random
from dataclasses import dataclass

import pytest

from alisa import LLM, SamplingParams
from alisa.scheduler import order
from alisa.scheduler.lengths import LengthPredictor
from alisa.scheduler.order import HighestResponseRatio
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.request import Request
from tests.scheduler_cases import Driver, KnownBlocks

SHORT, LONG = 11, 22
"""Token ids that the prompts of short and of long outputs begin with."""


def prompt(kind, draw):
    return [kind, *(draw.randrange(100, 1000) for _ in range(draw.randrange(5, 20)))]


def taught(predictor, count=200, seed=0):
    """A predictor that has seen outputs of about 10 and of about 300 tokens."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.choice((SHORT, LONG))
        length = draw.randrange(5, 20) if kind == SHORT else draw.randrange(200, 400)
        predictor.learn(prompt(kind, draw), 500, length, was_cut=False)
    return predictor


def test_lengths_are_learnt_from_the_words_of_prompts():
    predictor, draw = taught(LengthPredictor()), random.Random(9)
    guesses = {kind: [predictor.predict(prompt(kind, draw), 500) for _ in range(30)] for kind in (SHORT, LONG)}
    assert max(guesses[SHORT]) < min(guesses[LONG])
    assert 5 < sum(guesses[SHORT]) / 30 < 30
    assert 100 < sum(guesses[LONG]) / 30 < 400


def test_a_guess_is_one_token_at_least_and_no_more_than_the_request_may_have():
    predictor, draw = taught(LengthPredictor()), random.Random(9)
    assert predictor.predict(prompt(LONG, draw), 20) == 20
    assert LengthPredictor().predict([1], 7) == 1
    for _ in range(50):
        predictor.learn([5], 10**9, 10**9, was_cut=False)
    assert predictor.predict([5] * 100_000, 10**12) < 1e9


def test_an_output_that_was_cut_is_a_lower_bound():
    predictor, draw = taught(LengthPredictor()), random.Random(9)
    words = prompt(LONG, draw)
    guess = predictor.predict(words, 500)
    predictor.learn(words, 500, 10, was_cut=True)
    assert predictor.predict(words, 500) == guess
    predictor.learn(words, 5000, 2000, was_cut=True)
    assert predictor.predict(words, 500) > guess


# --- the order -------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self):
        return self.seconds


class TokenCosts:
    """A second for each token of the output, a hundredth for one of the prompt."""

    def run_s(self, prompt_tokens, output_tokens):
        return prompt_tokens / 100 + output_tokens


def request(kind, arrival_s, draw, *, name="r", most=500, ignore_eos=False):
    params = SamplingParams(max_tokens=most, ignore_eos=ignore_eos)
    return Request(name, prompt(kind, draw), params, most, arrival_s=arrival_s)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ratio(clock):
    found = HighestResponseRatio(TokenCosts(), now=clock)
    taught(found._predictor)
    return found


def test_the_first_to_come_goes_first_until_enough_have_ended(clock):
    clock.seconds, draw = 100.0, random.Random(1)
    ratio = HighestResponseRatio(TokenCosts(), now=clock)
    waiting = [request(LONG, 0.0, draw), request(SHORT, 10.0, draw)]
    assert ratio.choose(waiting) is waiting[0]
    taught(ratio._predictor, order.NEUTRAL_REQUESTS)
    assert ratio.choose(waiting) is waiting[1]


def test_short_ones_go_first_and_long_ones_not_last(ratio, clock):
    """Short requests without end: a long one goes before those that come once it has waited long enough."""
    long = request(LONG, 0.0, random.Random(1))
    waited = []
    for step in range(1, 200):
        clock.seconds = 20.0 * step
        chosen = ratio.choose([long, request(SHORT, clock.seconds - 15.0, random.Random(2))])
        waited.append(chosen is long)
    first = waited.index(True)
    assert 5 < first < 100
    assert all(waited[first:])


def test_a_predictor_that_says_the_same_for_all_leaves_the_order_of_arrival(clock):
    ratio = HighestResponseRatio(TokenCosts(), now=clock)
    for _ in range(order.NEUTRAL_REQUESTS):
        ratio._predictor.learn([1], 100, 10, was_cut=False)
    waiting = [Request(str(i), [1], SamplingParams(max_tokens=100), 100, arrival_s=float(i)) for i in range(9)]
    clock.seconds = 20.0
    for left in range(9):
        assert ratio.choose(waiting[left:]) is waiting[left]


def test_what_ignores_its_end_token_is_as_long_as_it_may_be(ratio, clock):
    draw = random.Random(3)
    clock.seconds = 50.0
    waiting = [
        request(SHORT, 0.0, draw, ignore_eos=True),
        request(LONG, 0.0, draw, most=50, ignore_eos=True),
    ]
    assert ratio.choose(waiting) is waiting[1]
    learnt = ratio._predictor.num_learnt
    waiting[0].append(1)
    ratio.learn(waiting[0])
    assert ratio._predictor.num_learnt == learnt


def test_a_prompt_that_is_known_costs_less(clock):
    class Known(KnownBlocks):
        def known(self, names):
            return len(names)

    ratio = HighestResponseRatio(TokenCosts(), Known(), now=clock)
    taught(ratio._predictor)
    words = [SHORT] * 3200
    params = SamplingParams(max_tokens=5)
    first, second = (Request(str(i), words, params, 5, arrival_s=0.0) for i in range(2))
    second.block_names, second.max_restored = (b"",) * 200, 3184
    clock.seconds = 10.0
    assert ratio.choose([first, second]) is second


def test_priority_comes_first_and_those_that_made_room_before_all_of_theirs():
    class Last:
        """The last to come goes first."""

        def choose(self, waiting):
            return waiting[-1]

        def learn(self, request):
            assert request.output_ids

    driver = Driver(Limits(1000), max_num_seqs=1, order=Last())
    for name, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 0)):
        driver.add(name, 4, 2, priority)
    driver.steps()
    assert driver.finished == ["d", "c", "b", "a"]
    driver = Driver(Limits(90), max_num_seqs=2, order=Last())
    preempted = driver.add("a", 10, 40)
    driver.add("b", 20, 40)
    driver.step()
    driver.add("c", 10, 2)
    begun = [name for step in driver.steps() for name, (start, _) in step.items() if start == 0]
    assert preempted.num_preempted == 1
    assert begun == ["a", "a", "c"]


def test_the_order_changes_no_token(monkeypatch):
    monkeypatch.setattr(order, "NEUTRAL_REQUESTS", 4)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 1000) for _ in range(draw.randrange(3, 60))] for _ in range(16)]
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1)
    found = []
    for policy in ("fcfs", "hrrn"):
        with LLM(schedule_policy=policy, max_num_seqs=2, max_model_len=100, prefix_cache=policy == "hrrn") as llm:
            found.append([output.token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1]

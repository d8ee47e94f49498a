"""A client who floods the queue keeps nobody else waiting."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from alisa import LLM, SamplingParams
from alisa.engine.builder import build_engine
from alisa.scheduler.fair import OUTPUT_WEIGHT, ServedTokens
from alisa.scheduler.placement.base import Limits
from tests.scheduler_cases import Driver, KnownBlocks

SLOTS = 2


def fair_driver(**options):
    return Driver(Limits(10_000), max_num_seqs=SLOTS, fair=ServedTokens(), **options)


def test_one_who_sends_little_does_not_wait_for_one_who_floods():
    found = {}
    for name, driver in (("fair", fair_driver()), ("first come", Driver(Limits(10_000), max_num_seqs=SLOTS))):
        for number in range(50):
            driver.add(f"flood-{number}", 20, 10, client="flood")
        for _ in range(5):
            driver.step()
        driver.add("small", 20, 10, client="small")
        driver.steps()
        found[name] = driver.finished.index("small")
    assert found["fair"] <= SLOTS
    assert found["first come"] == 50


def test_what_is_served_is_counted_once():
    served = ServedTokens()
    driver = Driver(Limits(100), max_num_seqs=3, fair=served, prefix=KnownBlocks())
    driver.add("first", 40, 4, client="a")
    driver.steps()
    assert served.served("a") == 40 + 4 * OUTPUT_WEIGHT
    driver.add("again", 40, 4, client="a")  # 32 tokens of it are known
    driver.steps()
    assert served.served("a") == 40 + 8 + 8 * OUTPUT_WEIGHT
    # Who loses its rows reads its prompt twice, and is counted once.
    before = served.served("a")  # where the other two begin
    both = [driver.add(client, 30, 50, client=client) for client in ("b", "c")]
    driver.steps()
    assert sum(request.num_preempted for request in both) > 0
    for request in both:
        expected = 30 - request.cached_tokens + 50 * OUTPUT_WEIGHT
        assert served.served(request.client) == before + expected


def test_who_leaves_is_counted_for_what_it_got():
    served = ServedTokens()
    driver = Driver(Limits(1000), max_num_seqs=1, fair=served)
    driver.add("runs", 16, 10, client="a")
    driver.add("waits", 16, 10, client="b")
    driver.step()
    driver.abort("waits")
    driver.abort("runs")
    assert served.served("a") == 16 + OUTPUT_WEIGHT
    assert served.served("b") == 0
    assert served._counted == {}


def test_nobody_saves_up_while_away():
    driver = fair_driver()
    for number in range(20):
        driver.add(f"busy-{number}", 20, 10, client="busy")
    while len(driver.finished) < 10:
        driver.step()
    for number in range(20):
        driver.add(f"back-{number}", 20, 10, client="back")
    driver.steps()
    # From now on both get the same: among any that follow one another, half are of each, but for a batch.
    order = [name.split("-")[0] for name in driver.finished[10 + SLOTS : 28]]
    assert abs(order.count("busy") - order.count("back")) <= 2 * SLOTS


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_clients_who_always_wait_get_the_same_within_the_bound(seed):
    """The bound of the paper: two clients with requests waiting differ by two batches of the longest at most."""
    draw, served = random.Random(seed), ServedTokens()
    slots = draw.randint(1, 4)
    driver = Driver(Limits(100_000), max_num_seqs=slots, fair=served)
    longest = 40 + 30 * OUTPUT_WEIGHT
    for client in ("a", "b", "c"):
        for number in range(40):
            driver.add(f"{client}{number}", draw.randint(1, 40), draw.randint(1, 30), client=client)
    for _ in range(150):
        driver.step()
        counters = [served.served(client) for client in ("a", "b", "c")]
        assert max(counters) - min(counters) <= 2 * slots * longest


def test_priority_comes_before_fairness():
    driver = Driver(Limits(1000), max_num_seqs=1, fair=ServedTokens())
    driver.add("first", 10, 5, client="a")
    driver.step()
    driver.add("urgent", 10, 5, -1, client="a")
    driver.add("other", 10, 5, client="b")
    driver.steps()
    assert driver.finished == ["first", "urgent", "other"]


def test_the_order_changes_no_token():
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 1000) for _ in range(draw.randrange(3, 60))] for _ in range(12)]
    rules = [SamplingParams(max_tokens=16, temperature=1.0, seed=number) for number in range(12)]
    with LLM(max_num_seqs=2, max_model_len=100) as llm:
        expected = [output.token_ids for output in llm.generate(prompts, rules)]
    with LLM(max_num_seqs=2, max_model_len=100, fair=True, schedule_policy="hrrn") as llm:
        engine, _ = build_engine(llm.model, llm.config)
        for number, (prompt, params) in enumerate(zip(prompts, rules, strict=True)):
            engine.add_request(prompt, params, request_id=str(number), client="ab"[number > 2])
        outputs = {}
        while engine.has_requests:
            outputs |= {output.request_id: output.token_ids for output in engine.step().finished}
    assert [outputs[str(number)] for number in range(12)] == expected
    assert list(outputs) != sorted(outputs, key=int), "the order was another"

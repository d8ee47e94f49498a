"""What the planner says of drafts: prices that behave, and the engine's own verdict."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.engine.speculator import Acceptance
from alisa.engine.step_prices import BatchPrices, DraftedStep
from alisa.outputs import Phase
from alisa.planner.cost import CostModel
from alisa.planner.draft_plan import plan_drafts
from alisa.planner.draft_pricer import DraftPricer
from alisa.planner.footprint import kv_token_bytes, weight_bytes
from alisa.planner.hardware import SelectionPrices
from alisa.planner.load import RunConfig, loads
from alisa.planner.presets import PRESETS
from alisa.planner.search import search
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import UniformWorkload, room_for
from alisa.planner.speculation import DraftConfig, DraftWork, tokens_of_step
from alisa.policy.registry import POLICIES
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.plan import ScheduledChunk, StepPlan

SPEC = SHAPES["llama-7b"]


def method(policy="sketch", source="policy", acceptance=0.87, most=8, sparsity=0.9):
    return RunConfig(policy, sparsity, "float16", "float16", drafts=DraftConfig(source, acceptance, most))


def step_at(length, way, batch=16):
    """The work of the decode step that makes a batch of sequences this long."""
    prompt = StepPlan(0, Phase.DEVICE, True, (ScheduledChunk(0, 0, length - 1),), ())
    step = StepPlan(1, Phase.DEVICE, False, (ScheduledChunk(0, length - 1, 1),), ())
    return list(loads([prompt, step], Limits(length), way, prompt_lens=length - 1, copies=batch))[1]


def priced(way, length=4096, batch=16, hardware="h100-80gb", **options):
    machine = PRESETS[hardware] if isinstance(hardware, str) else hardware
    pricer = DraftPricer(SPEC, way, machine, way.drafts, **options)
    return pricer, pricer.step(step_at(length, way, batch), step_at(length, pricer.drafting, batch), tiers=False)


def test_exact_steps_read_everything_and_passes_what_the_policy_reads():
    way = method()
    pricer, _ = priced(way)
    assert (way.reading_policy, way.policy) == ("dense", "sketch")
    assert step_at(4096, way).read == 16 * 4096
    assert step_at(4096, pricer.drafting).read < 16 * 500
    lookup = method(source="text")
    assert lookup.reading_policy == "sketch"
    assert step_at(4096, lookup).read == step_at(4096, pricer.drafting).read


def test_an_exact_run_needs_room_for_the_state_of_its_policy():
    work = UniformWorkload(16, 1024, 64)
    exact, dense = method(), RunConfig("dense", 0.0, "float16", "float16")
    rooms = [room_for(SPEC, way, PRESETS["h100-80gb"], work).device_bytes for way in (exact, dense)]
    assert rooms[0] < rooms[1]


@settings(max_examples=40, deadline=None)
@given(
    lower=st.floats(0, 1),
    higher=st.floats(0, 1),
    policy=st.sampled_from(("sketch", "streaming", "dense")),
    batch=st.sampled_from((1, 16, 200)),
    length=st.sampled_from((64, 1024, 8192)),
)
def test_better_guesses_never_cost_more(lower, higher, policy, batch, length):
    lower, higher = sorted((lower, higher))
    source = "text" if policy == "dense" else "policy"
    (pricer, worse), (_, better) = (priced(method(policy, source, a), length, batch) for a in (lower, higher))
    # Up to the margin that drafts must promise before they are tried.
    assert better.token.overlapped_s <= worse.token.overlapped_s * (1 + 1e-9)
    assert worse.token.overlapped_s <= worse.plain.overlapped_s * (1 + 1e-9)
    least = pricer.pays_from(worse, tiers=False)
    for acceptance, step in ((lower, worse), (higher, better)):
        if step.num_drafts:
            assert least is not None
            assert acceptance > least - 0.011
        elif least is not None:
            assert acceptance < least + 0.011


@pytest.mark.parametrize("policy", ["sketch", "streaming"])
def test_more_drafts_cost_more_and_longer_texts_make_them_cheaper(policy):
    pricer, step = priced(method(policy))
    taken = [pricer.with_drafts(step, count, 1.0, tiers=False).verifying.serial_s for count in range(1, 9)]
    assert taken == sorted(taken)
    assert taken[0] >= step.plain.serial_s
    shares = []
    for length in (256, 1024, 4096):
        pricer, step = priced(method(policy), length)
        shares.append(pricer.prices(step).draft_s / pricer.prices(step).step_s)
    assert shares == sorted(shares, reverse=True)


def test_a_step_of_a_policy_chooses_for_each_token_and_a_dense_step_reads_once_for_all():
    (dense, of_dense), (sparse, of_sketch) = priced(method("dense", "text")), priced(method("sketch", "text"))
    four = dense.with_drafts(of_dense, 3, 2.0, tiers=False).verifying
    assert four.attention_s < 1.5 * of_dense.plain.attention_s
    four = sparse.with_drafts(of_sketch, 3, 2.0, tiers=False).verifying
    assert four.attention_s == pytest.approx(4 * of_sketch.plain.attention_s)
    assert four.selection_s > of_sketch.plain.selection_s


def test_rows_below_come_up_once_for_all_drafts():
    way = method()
    pricer = DraftPricer(SPEC, way, PRESETS["v100-16gb"], way.drafts)
    load = dataclasses.replace(step_at(2048, way, 8), wanted=12000.0, fetched=12000.0)
    of_pass = dataclasses.replace(step_at(2048, pricer.drafting, 8), wanted=1200.0, fetched=400.0)
    step = pricer.step(load, of_pass)
    assert step.num_drafts >= 4
    assert step.verifying.fetch_s == step.plain.fetch_s
    assert step.tokens == pytest.approx(tokens_of_step(0.87, step.num_drafts))
    assert step.token.overlapped_s < 0.5 * step.plain.overlapped_s
    assert pricer.pays_from(step) < 0.5


def bytes_alone():
    """A machine on which nothing but reading takes time."""
    machine = PRESETS["h100-80gb"]
    byte_s = 1e-12
    free = SelectionPrices(step_s=0.0, call_s=0.0)
    gemm = dataclasses.replace(machine.gemm["float16"], curves=((1.0, ((1.0, 2 * byte_s), (4096.0, 2 * byte_s))),))
    attention = dataclasses.replace(machine.attention["float16"], byte_s=byte_s, value_s=0.0)
    selection = dict.fromkeys(machine.selection, free) | {"sketch": dataclasses.replace(free, value_s=0.75 * byte_s)}
    return dataclasses.replace(
        machine,
        gemm={"float16": gemm},
        attention={"float16": attention},
        selection=selection,
        **dict.fromkeys(("layer_s", "rope_s", "value_s", "step_s", "logit_s"), 0.0),
    )


@pytest.mark.parametrize("policy", ["sketch", "streaming"])
@pytest.mark.parametrize(("batch", "length"), [(1, 256), (16, 1024), (64, 4096)])
def test_a_pass_costs_the_share_that_the_engine_expects_of_it(policy, batch, length):
    """`DraftWork` counts bytes; so does the planner where nothing else takes time."""
    way = method(policy)
    pricer, step = priced(way, length, batch, bytes_alone())
    token_bytes = kv_token_bytes(SPEC, "float16")
    state = POLICIES[policy].state_bytes(SPEC.attention, 0.9, length).per_token / token_bytes
    read = sum(pricer.drafting.reads(length - 1)) / length
    weights = weight_bytes(SPEC, "float16", packs_tied=False)
    work = DraftWork(weights, token_bytes, read, state, POLICIES[policy].churn)
    prices = pricer.prices(step)
    assert prices.draft_s / prices.step_s == pytest.approx(work.share(batch * length, 0), rel=0.06)
    assert prices.token_s == 0.03 * prices.step_s, "as little as the engine believes"
    assert step.num_drafts == prices.draft_length(0.87, 8)


@pytest.mark.parametrize(
    ("way", "length", "batch", "hardware"),
    [
        (method("sketch"), 256, 1, "v100-32gb"),
        (method("sketch"), 2048, 1, "v100-32gb"),
        (method("sketch"), 4096, 64, "h100-80gb"),
        (method("streaming"), 4096, 64, "h100-80gb"),
        (method("streaming"), 8192, 64, "rtx4090"),
        (method("streaming", acceptance=0.2), 4096, 64, "h100-80gb"),
        (method("dense", "text", 0.08), 1024, 1, "h200"),
        (method("dense", "text", 0.6), 1024, 1, "h200"),
        (method("dense", "text", 0.6), 1024, 512, "rtx4090"),
    ],
)
def test_the_engine_comes_to_the_same_verdict(way, length, batch, hardware):
    """Its speculation, on a clock that shows what the planner says: it drafts where the plan does, and as much."""
    pricer, planned = priced(way, length, batch, hardware)
    draw, prices, drafts = random.Random(0), BatchPrices(), way.drafts
    acceptance = Acceptance(1.6, 2.0)
    share = pricer.prices(planned).draft_s / pricer.prices(planned).step_s
    counts, seconds, tokens = [], 0.0, 0.0
    for number in range(1200):
        count = 0
        worth = prices.by_policy if way.exact else prices.from_text
        if not prices.wants_plain and not worth.left:
            each = dataclasses.replace(
                prices.of_sequence(batch), draft_s=prices.plain_s * share * prices.pass_ratio / batch
            )
            count = acceptance.length(each, drafts.most)
        right = [next((n for n in range(count) if draw.random() >= drafts.acceptance), count) for _ in range(batch)]
        verifying, drafting_s = planned.plain, 0.0
        if count:
            verifying = pricer.with_drafts(planned, count, 1.0, tiers=False).verifying
            drafting_s = count * pricer.seconds(planned.one_pass)
            acceptance.learn(count, right[0])
        wall_s = pricer.seconds(verifying) + drafting_s
        step = DraftedStep(batch, batch * (1 + count), sum(right), wall_s, count if way.exact else 0, drafting_s)
        prices.learn(step, share)
        if number >= 200:
            counts.append(count)
            seconds, tokens = seconds + wall_s, tokens + 1 + sum(right) / batch
    drafted = sum(map(bool, counts)) / len(counts)
    assert (drafted > 0.5) == bool(planned.num_drafts)
    assert seconds / tokens == pytest.approx(pricer.seconds(planned.token), rel=0.12)


def test_a_search_prices_runs_with_drafts_and_a_plan_says_what_they_bring():
    work, machine = UniformWorkload(16, 1024, 256), PRESETS["h100-80gb"]
    plain = RunConfig("dense", 0.0, "float16", "float16")
    dense, exact = (search(SPEC, work, machine, [way]).best for way in (plain, method("streaming")))
    said = plan_drafts(SPEC, machine, exact, overlap=True)
    assert plan_drafts(SPEC, machine, dense, overlap=True) is None
    assert said.plain_s == pytest.approx(dense.timeline.total(prefill=False).overlapped_s, rel=1e-6)
    decode_s = exact.timeline.total(prefill=False).overlapped_s
    assert said.drafting_s + said.verifying_s == pytest.approx(decode_s, rel=1e-6)
    assert said.factor == pytest.approx(said.plain_s / decode_s)
    never = search(SHAPES["opt-125m"], UniformWorkload(1, 64, 32), machine, [method("sketch", acceptance=1.0)]).best
    said = plan_drafts(SHAPES["opt-125m"], machine, never, overlap=True)
    assert (said.drafts_per_step, said.tokens_per_step, said.factor, said.pays_from) == (0, 1, 1, None)
    assert said.pass_share > 0.95


def test_serial_prices_decide_where_nothing_is_hidden():
    way = method("streaming")
    pricer, step = priced(way, overlap=False)
    assert pricer.seconds(step.plain) == step.plain.serial_s
    cost = CostModel(SPEC, way, PRESETS["h100-80gb"])
    assert cost.step(step.work, tiers=False) == step.plain

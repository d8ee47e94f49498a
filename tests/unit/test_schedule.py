"""Schedulers as pure integers: caps are kept, rows only go down, moves find room in the order in which they come."""

from itertools import product

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alisa.schedule.all_device import AllDevice
from alisa.schedule.base import LaneView, Limits, Tier, latest_phase, phase_of
from alisa.schedule.static import StaticSplit
from alisa.schedule.three_phase import CHUNK_TOKENS, Schedule, ThreePhase
from alisa.types import Medium

MEDIA = (Medium.HOST, Medium.DISK)


@st.composite
def situations(draw, most_lanes=3, most_tokens=40, num_tiers=None):
    """Sequences whose rows lie within the caps, and how long they are to become."""
    tiers = draw(st.integers(0, 2)) if num_tiers is None else num_tiers
    rebuildable = draw(st.integers(0, most_tokens)) if tiers else 0
    lanes, resident, held = [], 0, [0] * tiers
    for lane in range(draw(st.integers(1, most_lanes))):
        before = draw(st.integers(0, most_tokens))
        bounds = [draw(st.integers(0, max(before - 1, 0))) if tiers else 0]
        for level in range(tiers):
            least = draw(st.integers(0, bounds[-1]))
            bounds.append(min(least, rebuildable) if level + 1 == tiers else least)
            held[level] += bounds[-2] - bounds[-1]
        resident += before - bounds[0]
        active = draw(st.booleans())
        length = before + draw(st.integers(1, most_tokens // 2)) if active else before
        window = draw(st.integers(min(1, length), length))
        older = draw(st.integers(0, length - window))
        prompt_len = draw(st.integers(0, length))
        lanes.append(LaneView(lane, prompt_len, length, tuple(bounds), window, older, rebuildable, active))
    slack = st.integers(0, most_tokens)
    sizes = [count + draw(slack) for count in held]
    tiers = tuple(Tier(medium, size) for medium, size in zip(MEDIA[-tiers:] if tiers else (), sizes, strict=True))
    return lanes, Limits(max(resident + draw(slack), 1), tiers, rebuildable)


def schedules():
    ratios = st.floats(0, 1)
    steps = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted)
    return st.builds(
        lambda steps, alpha, beta: Schedule(
            offload_from=steps[0], recompute_from=steps[1], offload_ratio=alpha, recompute_ratio=beta
        ),
        steps,
        ratios,
        ratios,
    )


def schedulers():
    chunks = st.integers(1, CHUNK_TOKENS)
    three_phase = st.builds(ThreePhase, st.none() | schedules(), chunks)
    return st.one_of(three_phase, three_phase, st.builds(StaticSplit, st.floats(0, 0.99), chunks), st.just(AllDevice()))


def carried_out(lanes, limits, moves):
    """Where the moves take every sequence; on the way no tier may be too full, nor a gap arise."""
    media = [Medium.DEVICE, *(tier.medium for tier in limits.tiers), None]
    bounds = {view.lane: list(view.bounds) for view in lanes}
    for move in moves:
        ends, source, target = bounds[move.lane], media.index(move.source), media.index(move.target)
        assert move.start < move.end
        assert source < target, "rows go down only"
        for level in range(source, target):
            assert ends[level] <= move.start if level == source else ends[level] == move.start or level > source
        if source:
            assert move.end <= ends[source - 1], "the rows must be where they are taken from"
        assert all(ends[level] == move.start for level in range(source, target)), "moves leave no gap"
        for level in range(source, target):
            ends[level] = move.end
        for level, tier in enumerate(limits.tiers):
            assert sum(ends[level] - ends[level + 1] for ends in bounds.values()) <= tier.num_tokens
    return list(bounds.values())


def assert_sound(lanes, limits, decision):
    bounds = carried_out(lanes, limits, decision.moves)
    resident = 0
    for view, ends in zip(lanes, bounds, strict=True):
        assert all(after >= before for after, before in zip(ends, view.bounds, strict=True))
        assert sorted(ends, reverse=True) == ends
        assert ends[0] <= view.length - view.active or ends[0] == view.bounds[0]
        assert ends[-1] <= max(view.rebuildable, view.bounds[-1])
        resident += view.length - ends[0]
    assert resident <= limits.device_tokens
    assert decision.phase == latest_phase([phase_of(ends) for ends in bounds])
    return bounds


def fits_somehow(lanes, limits):
    """Whether any bounds within the caps can be reached, tried one by one; a running sequence's newest token stays."""

    def reachable(view):
        ranges = [range(bound, view.length - view.active + 1) for bound in view.bounds[:-1]]
        last = range(view.bounds[-1], max(view.rebuildable, view.bounds[-1]) + 1)
        return [ends for ends in product(*ranges, last) if list(ends) == sorted(ends, reverse=True)]

    if not limits.tiers:
        return sum(view.length for view in lanes) <= limits.device_tokens
    return any(
        sum(view.length - ends[0] for view, ends in zip(lanes, bounds, strict=True)) <= limits.device_tokens
        and all(
            sum(ends[level] - ends[level + 1] for ends in bounds) <= tier.num_tokens
            for level, tier in enumerate(limits.tiers)
        )
        for bounds in product(*map(reachable, lanes))
    )


# --- what every scheduler promises -----------------------------------------------------------------------------------


@given(situations(), schedulers())
@settings(max_examples=500)
def test_decisions_keep_every_cap_and_move_rows_down_only(situation, scheduler):
    lanes, limits = situation
    assume(limits.tiers or not scheduler.uses_tiers or isinstance(scheduler, ThreePhase))
    assume(limits.tiers or isinstance(scheduler, AllDevice) or not any(view.bounds[0] for view in lanes))
    if isinstance(scheduler, AllDevice):
        assume(all(not any(view.bounds) for view in lanes))
    decision = scheduler.plan(lanes, limits)
    if decision is not None:
        assert_sound(lanes, limits, decision)


@given(
    situations(most_lanes=2, most_tokens=6), schedulers().filter(lambda scheduler: isinstance(scheduler, ThreePhase))
)
@settings(max_examples=500)
def test_three_phases_find_a_placement_if_there_is_one(situation, scheduler):
    lanes, limits = situation
    decision = scheduler.plan(lanes, limits)
    assert (decision is not None) == fits_somehow(lanes, limits)

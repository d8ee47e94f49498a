"""Schedulers as pure integers: caps are kept, rows only go down, moves find room in the order in which they come."""

import json
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alisa.errors import InputError
from alisa.outputs import Medium, Phase
from alisa.policy.registry import reads_of
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, SeqView, Tier, fresh_view, latest_phase, phase_of, seq_view
from alisa.scheduler.placement.file import load_schedule, schedule_from, schedule_values
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import CHUNK_TOKENS, Schedule, ThreePhase
from alisa.scheduler.plan import Move

MEDIA = (Medium.HOST, Medium.DISK)


@st.composite
def situations(draw, most_seqs=3, most_tokens=40, num_tiers=None):
    """Sequences whose rows lie within the caps, and how long they are to become."""
    tiers = draw(st.integers(0, 2)) if num_tiers is None else num_tiers
    rebuildable = draw(st.integers(0, most_tokens)) if tiers else 0
    sequences, resident, held = [], 0, [0] * tiers
    for req_idx in range(draw(st.integers(1, most_seqs))):
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
        sequences.append(SeqView(req_idx, prompt_len, length, tuple(bounds), window, older, rebuildable, active))
    slack = st.integers(0, most_tokens)
    sizes = [count + draw(slack) for count in held]
    tiers = tuple(Tier(medium, size) for medium, size in zip(MEDIA[-tiers:] if tiers else (), sizes, strict=True))
    return sequences, Limits(max(resident + draw(slack), 1), tiers, rebuildable)


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


def three_phases():
    return st.builds(ThreePhase, st.none() | schedules(), st.integers(1, CHUNK_TOKENS))


def schedulers():
    splits = st.builds(StaticSplit, st.floats(0, 0.99), st.integers(1, CHUNK_TOKENS))
    return st.one_of(three_phases(), splits, st.just(AllDevice()))


def carried_out(sequences, limits, moves):
    """Where the moves take every sequence; on the way no tier may be too full, nor a gap arise."""
    media = [Medium.DEVICE, *(tier.medium for tier in limits.tiers), None]
    bounds = {view.req_idx: list(view.bounds) for view in sequences}
    for move in moves:
        ends, source, target = bounds[move.req_idx], media.index(move.source), media.index(move.target)
        assert move.start < move.end
        assert source < target, "rows go down only"
        if source:
            assert move.end <= ends[source - 1], "the rows must be where they are taken from"
        assert all(ends[level] == move.start for level in range(source, target)), "moves leave no gap"
        for level in range(source, target):
            ends[level] = move.end
        for level, tier in enumerate(limits.tiers):
            assert sum(ends[level] - ends[level + 1] for ends in bounds.values()) <= tier.num_tokens
    return list(bounds.values())


def assert_sound(sequences, limits, decision):
    bounds = carried_out(sequences, limits, decision.moves)
    resident = 0
    for view, ends in zip(sequences, bounds, strict=True):
        assert all(after >= before for after, before in zip(ends, view.bounds, strict=True))
        assert sorted(ends, reverse=True) == ends
        assert ends[0] <= view.length - view.active or ends[0] == view.bounds[0]
        assert ends[-1] <= max(view.rebuildable, view.bounds[-1])
        resident += view.length - ends[0]
    assert resident <= limits.device_tokens
    assert decision.phase == latest_phase([phase_of(ends) for ends in bounds])
    return bounds


def fits_somehow(sequences, limits):
    """Whether any bounds within the caps can be reached, tried one by one; a running sequence's newest token stays."""

    def reachable(view):
        ranges = [range(bound, view.length - view.active + 1) for bound in view.bounds[:-1]]
        last = range(view.bounds[-1], max(view.rebuildable, view.bounds[-1]) + 1)
        return [ends for ends in product(*ranges, last) if list(ends) == sorted(ends, reverse=True)]

    if not limits.tiers:
        return sum(view.length for view in sequences) <= limits.device_tokens
    return any(
        sum(view.length - ends[0] for view, ends in zip(sequences, bounds, strict=True)) <= limits.device_tokens
        and all(
            sum(ends[level] - ends[level + 1] for ends in bounds) <= tier.num_tokens
            for level, tier in enumerate(limits.tiers)
        )
        for bounds in product(*map(reachable, sequences))
    )


# --- what every scheduler promises -----------------------------------------------------------------------------------


@given(situations(), schedulers())
@settings(max_examples=300)
def test_decisions_keep_every_cap_and_move_rows_down_only(situation, scheduler):
    sequences, limits = situation
    assume(scheduler.uses_tiers or not any(view.bounds[0] for view in sequences))
    decision = scheduler.plan(sequences, limits)
    if decision is not None:
        assert_sound(sequences, limits, decision)


@given(situations(most_seqs=2, most_tokens=6), three_phases())
@settings(max_examples=300)
def test_three_phases_find_a_placement_if_there_is_one(situation, scheduler):
    sequences, limits = situation
    decision = scheduler.plan(sequences, limits)
    assert (decision is not None) == fits_somehow(sequences, limits)


@given(
    schedulers(),
    st.integers(1, 100),
    st.integers(1, 40),
    st.lists(st.integers(0, 60), max_size=2),
    st.integers(0, 60),
    st.integers(1, 16),
    st.sampled_from(("dense", "swa")),
    st.data(),
)
@settings(max_examples=300)
def test_a_sequence_that_fits_in_the_end_has_room_all_the_way(
    scheduler, num_tokens, device_tokens, sizes, rebuildable, piece, policy, data
):
    """The engine lets a request in if its final length fits an empty store; it must not break down underway."""
    reads = reads_of(policy, 0.6)
    tiers = tuple(Tier(medium, size) for medium, size in zip(MEDIA, sizes, strict=False))
    limits = Limits(device_tokens, tiers, rebuildable if tiers else 0)
    assume(scheduler.plan([fresh_view(num_tokens, limits, reads)], limits) is not None)
    prompt_len = data.draw(st.integers(1, num_tokens))
    bounds, length = (0,) * (len(tiers) + 1), 0
    while length < num_tokens:
        length = min(length + piece, prompt_len) if length < prompt_len else length + 1
        kept = min(limits.rebuildable, num_tokens)
        view = seq_view(0, prompt_len, length, bounds, kept, reads, active=True)
        decision = scheduler.plan([view], limits)
        assert decision is not None, f"no room for {length} of {num_tokens} tokens"
        [ends] = assert_sound([view], limits, decision)
        bounds = tuple(ends)


# --- three phases ----------------------------------------------------------------------------------------------------

ROOMY = Limits(1000, (Tier(Medium.DISK, 1000),), rebuildable=200)


def one(length, bounds=(0, 0), prompt_len=100, window=20, older=20, rebuildable=200, req_idx=0, active=True):
    return SeqView(req_idx, prompt_len, length, bounds, window, older, rebuildable, active)


def test_a_schedule_changes_the_phase_at_p1_and_p2_and_moves_alpha_and_beta():
    schedule = Schedule(offload_from=10, recompute_from=30, offload_ratio=0.5, recompute_ratio=0.25)
    scheduler = ThreePhase(schedule, chunk=4)
    bounds, phases = (0, 0), []
    for length in range(101, 161):
        view = one(length, bounds)
        decision = scheduler.plan([view], ROOMY)
        [ends] = assert_sound([view], ROOMY, decision)
        bounds = tuple(ends)
        phases.append(decision.phase)
        below, deleted = int(0.5 * length), int(0.25 * int(0.5 * length))
        if view.output_step >= 10:  # the share that is asked for, up to a chunk
            assert below - 4 < bounds[0] <= below
        if view.output_step >= 30:
            assert deleted - 4 < bounds[1] <= deleted
    assert phases == [Phase.DEVICE] * 9 + [Phase.DEVICE_HOST] * 20 + [Phase.RECOMPUTE] * 31


def test_beta_0_never_deletes():
    schedule = Schedule(offload_from=0, recompute_from=0, offload_ratio=1.0, recompute_ratio=0.0)
    decision = ThreePhase(schedule).plan([one(150)], ROOMY)
    assert decision == (Phase.DEVICE_HOST, (Move(0, 0, 130, Medium.DEVICE, Medium.DISK),))
    assert ThreePhase(schedule).most_deleted(150) == 0


def test_what_can_be_deleted_is_planned_for_and_no_more_is():
    schedule = Schedule(offload_from=0, recompute_from=0, offload_ratio=0.8, recompute_ratio=0.5)
    assert ThreePhase(schedule).most_deleted(100) == 40
    limits = Limits(1000, (Tier(Medium.DISK, 1000),), rebuildable=10)
    [ends] = assert_sound(
        *(sequences := [one(150, rebuildable=10)], limits), ThreePhase(schedule, 1).plan(*(sequences, limits))
    )
    assert ends == [120, 10]


def test_the_window_stays_while_the_device_has_room_for_it():
    scheduler = ThreePhase(chunk=1)
    view = one(100, window=30, older=0)
    for device_tokens, expected in ((100, 0), (60, 40), (30, 70), (10, 90)):
        limits = Limits(device_tokens, (Tier(Medium.DISK, 100),))
        [ends] = assert_sound([view], limits, scheduler.plan([view], limits))
        assert ends == [expected, 0]


def test_there_is_room_for_a_hot_cache_twice_the_selection_if_it_can_be():
    scheduler = ThreePhase(chunk=1)
    view = one(100, window=10, older=10, rebuildable=0)
    for device_tokens, expected in ((100, 0), (60, 60), (35, 85), (25, 90)):
        limits = Limits(device_tokens, (Tier(Medium.DISK, 100),))
        [ends] = assert_sound([view], limits, scheduler.plan([view], limits))
        assert ends == [expected, 0]
    # ... but the disk must have room for what leaves only for its sake
    limits = Limits(60, (Tier(Medium.DISK, 42),))
    [ends] = assert_sound([view], limits, scheduler.plan([view], limits))
    assert ends == [42, 0]


def test_moves_come_in_chunks_where_there_is_room_for_them():
    view = one(101, window=10, older=0, rebuildable=0)
    limits = Limits(100, (Tier(Medium.DISK, 100),))
    assert ThreePhase().plan([view], limits).moves == (Move(0, 0, CHUNK_TOKENS, Medium.DEVICE, Medium.DISK),)
    tight = Limits(100, (Tier(Medium.DISK, 5),))
    assert ThreePhase().plan([view], tight).moves == (Move(0, 0, 5, Medium.DEVICE, Medium.DISK),)


def test_a_parked_sequence_may_leave_the_device_altogether():
    sequences = [one(50, req_idx=0, window=10, older=0), one(50, req_idx=1, active=False)]
    limits = Limits(10, (Tier(Medium.DISK, 100),))
    bounds = assert_sound(sequences, limits, ThreePhase(chunk=1).plan(sequences, limits))
    assert bounds == [[40, 0], [50, 0]]


def test_a_full_tier_gets_room_before_others_need_it():
    """What one sequence sends to a full disk takes the room that another one's deletion leaves."""
    sequences = [one(20, (0, 0), req_idx=0, window=4, older=0), one(30, (28, 0), req_idx=1, window=2, older=0)]
    limits = Limits(16, (Tier(Medium.DISK, 28),), rebuildable=200)
    decision = ThreePhase(chunk=1).plan(sequences, limits)
    assert_sound(sequences, limits, decision)
    assert [move.target for move in decision.moves] == [None, Medium.DISK]
    assert [move.req_idx for move in decision.moves] == [1, 0]


def test_rows_of_a_sequence_that_may_be_deleted_pass_a_full_tier_first():
    sequences = [one(12, (6, 0, 0), req_idx=0, rebuildable=0), one(8, (6, 0, 0), req_idx=1, rebuildable=6)]
    limits = Limits(7, (Tier(Medium.HOST, 12), Tier(Medium.DISK, 0)), rebuildable=6)
    bounds = assert_sound(sequences, limits, ThreePhase(chunk=1).plan(sequences, limits))
    assert bounds[0][1:] == [0, 0]


# --- the baselines ---------------------------------------------------------------------------------------------------


def test_all_device_says_what_fits():
    sequences = [one(30), one(20, req_idx=1)]
    assert AllDevice().plan(sequences, Limits(50)) == (Phase.DEVICE, ())
    assert AllDevice().plan(sequences, Limits(49)) is None


def test_a_static_split_holds_from_the_first_token_on():
    scheduler, limits = StaticSplit(0.75, chunk=4), Limits(100, (Tier(Medium.DISK, 100),))
    bounds = (0, 0)
    for length in range(1, 101):
        view = one(length, bounds, prompt_len=1)
        [ends] = assert_sound([view], limits, scheduler.plan([view], limits))
        bounds = tuple(ends)
        assert min(int(0.75 * length), length - 1) <= bounds[0] < 0.75 * length + 4
        assert bounds[1] == 0


def test_a_static_split_that_does_not_fit_is_refused():
    view = one(100)
    assert StaticSplit(0.5).plan([view], Limits(49, (Tier(Medium.DISK, 100),))) is None
    assert StaticSplit(0.5).plan([view], Limits(100, (Tier(Medium.DISK, 49),))) is None
    assert StaticSplit(0.5).plan([view], Limits(50, (Tier(Medium.DISK, 64),))) is not None
    assert StaticSplit(0.5).plan([one(100, (0,))], Limits(100)) is None


# --- files -----------------------------------------------------------------------------------------------------------


@given(st.one_of(st.builds(ThreePhase, st.none() | schedules()), st.builds(StaticSplit, st.floats(0, 0.99))))
def test_a_schedule_file_gives_the_scheduler_that_it_was_made_of(scheduler):
    assert schedule_from(json.loads(json.dumps(schedule_values(scheduler)))) == scheduler


def test_a_schedule_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    for scheduler in (AllDevice(), StaticSplit(0.25), ThreePhase(), ThreePhase(Schedule(**PAPER))):
        path.write_text(json.dumps(schedule_values(scheduler)))
        assert load_schedule(path) == scheduler


PAPER = {"offload_from": 76, "recompute_from": 300, "offload_ratio": 0.5, "recompute_ratio": 0.2}
NEEDS = "a schedule is described by offload_from, offload_ratio, recompute_from, recompute_ratio; "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "{path} is not JSON: "),
        ("[1]", "{path} holds a list instead of a schedule; `alisa plan --save` writes one."),
        ("{}", "{path}: schedule None is unknown, there is all-device, static, three-phase."),
        (
            '{"schedule": "two-phase"}',
            "{path}: schedule 'two-phase' is unknown, there is all-device, static, three-phase.",
        ),
        (
            '{"schedule": "all-device", "chunk": 1}',
            "{path}: a schedule is described by its name alone; it does not know chunk.",
        ),
        ('{"schedule": "static"}', "{path}: a schedule is described by offload_ratio; it lacks offload_ratio."),
        (
            '{"schedule": "static", "offload_ratio": "half"}',
            "{path}: a schedule is described by offload_ratio; no number is offload_ratio.",
        ),
        (
            '{"schedule": "static", "offload_ratio": true}',
            "{path}: a schedule is described by offload_ratio; no number is offload_ratio.",
        ),
        ('{"schedule": "static", "offload_ratio": 1}', "{path}: offload_ratio is 1.0, allowed is 0 up to but not 1."),
        ('{"schedule": "static", "offload_ratio": NaN}', "{path}: offload_ratio is nan, allowed is 0 up to but not 1."),
        (
            '{"schedule": "three-phase", "offload_from": 3, "alpha": 1}',
            "{path}: " + NEEDS + "it lacks offload_ratio, recompute_from, recompute_ratio; it does not know alpha.",
        ),
        (
            json.dumps({"schedule": "three-phase", **PAPER, "offload_from": None}),
            "{path}: " + NEEDS + "no number is offload_from.",
        ),
        (
            json.dumps(
                {
                    "schedule": "three-phase",
                    "offload_from": -1,
                    "recompute_from": -2,
                    "offload_ratio": 1.5,
                    "recompute_ratio": -0.5,
                }
            ),
            "{path}: offload_from is -1, allowed is 0 or more; recompute_from is -2, it cannot come before "
            "offload_from -1; offload_ratio is 1.5, allowed is 0 to 1; recompute_ratio is -0.5, allowed is 0 to 1.",
        ),
        (
            json.dumps({"schedule": "three-phase", **PAPER, "offload_from": float("nan")}),
            "{path}: offload_from is nan, allowed is 0 or more",
        ),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_in_a_sentence(text, message, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_schedule(path)
    assert str(error.value).startswith(message.replace("{path}", str(path)))
    assert str(error.value).endswith(".")


def test_a_schedule_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file or directory\."):
        load_schedule(tmp_path / "none.json")

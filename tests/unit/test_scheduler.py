"""The scheduler alone: who runs, who waits, who makes room, and what the plans say about it."""

import pytest

from alisa.config import SamplingParams
from alisa.errors import CapacityError, InputError
from alisa.outputs import Medium, Phase
from alisa.policy.registry import reads_of
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, Tier
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase
from alisa.scheduler.plan import Opened, ScheduledChunk
from alisa.scheduler.request import Request, RequestStatus
from alisa.scheduler.simulate import rollout
from tests.scheduler_cases import Driver

DISK = Tier(Medium.DISK, 1000)


# --- queues ----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_first_and_in_chunks_cut_at_multiples_of_the_prefill_chunk():
    driver = Driver(Limits(1000), prefill_chunk=16)
    driver.add("a", 40, 2)
    driver.add("b", 5, 2)
    driver.add("c", 9, 2)
    assert driver.steps() == [
        {"a": (0, 16)},
        {"a": (16, 16)},
        {"a": (32, 8), "b": (0, 5)},
        {"c": (0, 9)},
        {"a": (40, 1), "b": (5, 1), "c": (9, 1)},
    ]


def test_a_prompt_is_read_in_turns_with_requests_that_are_being_answered():
    driver = Driver(Limits(1000), prefill_chunk=16, shared_chunk=4)
    driver.add("a", 20, 5)
    assert [driver.step() for _ in range(2)] == [{"a": (0, 16)}, {"a": (16, 4)}]
    driver.add("b", 10, 2)
    assert driver.steps() == [
        {"a": (20, 1)},
        {"b": (0, 4)},
        {"a": (21, 1)},
        {"b": (4, 4)},
        {"a": (22, 1)},
        {"b": (8, 2)},
        {"a": (23, 1), "b": (10, 1)},
    ]


def test_a_plan_opens_a_request_once_and_its_index_is_used_again():
    driver = Driver(Limits(1000), max_num_seqs=2)
    for name in "abc":
        driver.add(name, 4, 2)
    driver.step()
    assert driver.plan.opened == (Opened(0, "a", 5, 4), Opened(1, "b", 5, 4))
    assert driver.plan.chunks == (ScheduledChunk(0, 0, 4), ScheduledChunk(1, 0, 4))
    assert (driver.plan.step, driver.plan.phase, driver.plan.prefill) == (0, Phase.DEVICE, True)
    assert driver.scheduler.num_waiting == 1
    driver.step()
    assert (driver.plan.opened, driver.plan.closed, driver.plan.prefill) == ((), (), False)
    driver.step()
    assert driver.plan.opened == (Opened(1, "c", 5, 4),)
    driver.steps()
    assert driver.finished == ["a", "b", "c"]
    assert not driver.scheduler.has_requests


def test_requests_start_in_the_order_of_priority_then_arrival():
    driver = Driver(Limits(1000), max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        driver.add(name, 4, 1, priority)
    driver.steps()
    assert driver.finished == ["b", "d", "a", "c"]


def test_times_say_when_a_request_was_admitted_and_when_it_ended():
    driver = Driver(Limits(1000), max_num_seqs=1)
    first, second = driver.add("a", 4, 1), driver.add("b", 4, 1)
    driver.step()
    assert 0 < first.admitted_s <= first.finished_s
    assert second.admitted_s == 0
    driver.abort("b")
    assert second.admitted_s == second.first_token_s == second.finished_s > first.finished_s


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_an_id_in_use_is_refused_and_may_be_used_again_later():
    driver = Driver(Limits(1000))
    driver.add("a", 4, 1)
    with pytest.raises(InputError, match="The request id 'a' is in use"):
        driver.add("a", 4, 1)
    driver.steps()
    driver.add("a", 4, 1)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    driver = Driver(Limits(10, (Tier(Medium.DISK, 5),)), ThreePhase(), token_bytes=1024)
    with pytest.raises(CapacityError) as error:
        driver.add("a", 12, 5)
    assert str(error.value) == (
        "A request of 12 prompt and up to 5 new tokens needs 16.0 KiB of KV memory (1.0 KiB a token) and the cap is "
        "10.0 KiB on the device and 5.0 KiB on disk; raise --kv-device-memory or --kv-disk-memory, or lower "
        "--max-tokens."
    )
    assert not driver.scheduler.has_requests
    driver.add("b", 12, 4)
    with pytest.raises(CapacityError, match="needs 8 tokens of KV memory and the cap is 7 tokens on the device;"):
        Driver(Limits(7)).add("a", 8, 1)


# --- room -------------------------------------------------------------------------------------------------------------


def test_the_newest_loses_its_rows_when_all_others_need_room_and_comes_back_first():
    driver = Driver(Limits(60))
    old, new = driver.add("a", 8, 40), driver.add("b", 8, 40)
    driver.add("c", 30, 4)
    while not new.num_preempted:
        driver.step()
    assert driver.plan.closed == (1,)
    assert driver.plan.num_preempted == new.num_preempted == 1
    assert (new.req_idx, new.num_cached, len(new.output_ids)) == (None, 0, 23)
    assert old.num_cached == 31
    driver.steps()
    assert driver.finished == ["a", "b", "c"]
    assert new.token_ids == [*range(8), *[7] * 40]


def test_a_request_that_is_admitted_and_preempted_for_one_step_is_never_opened():
    driver = Driver(Limits(75), prefill_chunk=100)
    driver.add("a", 40, 4)
    driver.add("b", 40, 4)  # only the headroom of `a` is counted when it comes
    assert driver.step() == {"a": (0, 40)}
    assert driver.plan.opened == (Opened(0, "a", 43, 40),)
    assert (driver.plan.closed, driver.plan.num_preempted) == ((), 1)
    driver.steps()
    assert driver.finished == ["a", "b"]


def test_what_reads_more_than_the_device_holds_is_swapped_and_resumes():
    driver = Driver(Limits(64, (DISK,)), ThreePhase(), policy="swa")
    names = "abc"
    requests = [driver.add(name, 40, 60) for name in names]
    seen = []
    while driver.step() is not None:
        seen.append(tuple(request.status for request in requests))
        if any(request.status is RequestStatus.SWAPPED for request in requests):
            assert driver.plan.closed == ()
    assert any(RequestStatus.SWAPPED in statuses for statuses in seen)
    assert sorted(driver.finished) == list(names)
    assert all(len(request.output_ids) == 60 for request in requests)


def test_nobody_is_admitted_while_one_is_swapped():
    driver = Driver(Limits(44, (DISK,)), ThreePhase(), prefill_chunk=64)
    first, second = driver.add("a", 40), driver.add("b", 10)
    driver.step()
    driver.add("c", 1)  # there would be room for it beside `a`
    driver.step()
    assert (first.status, second.status) == (RequestStatus.RUNNING, RequestStatus.SWAPPED)
    assert driver.scheduler.num_waiting == 1
    driver.steps()
    assert driver.finished == ["a", "b", "c"]


def test_the_one_that_was_swapped_first_resumes_first():
    driver = Driver(Limits(100, (DISK,)), ThreePhase(), prefill_chunk=256)
    for name, prompt_len in (("a", 60), ("b", 35), ("c", 30)):
        driver.add(name, prompt_len, 8)
    driver.step()
    driver.step()
    assert [request.request_id for request in driver.scheduler.swapped] == ["c"]
    while len(driver.scheduler.swapped) < 2:
        driver.step()
    assert [request.request_id for request in driver.scheduler.running] == ["a"]
    driver.abort("a")
    driver.step()
    assert [request.request_id for request in driver.scheduler.running] == ["c", "b"]


def test_one_that_still_reads_its_prompt_is_not_swapped():
    driver = Driver(Limits(80, (DISK,)), ThreePhase(), prefill_chunk=32)
    driver.add("a", 60)
    second = driver.add("b", 45)
    steps = [driver.step() for _ in range(4)]
    assert steps == [{"a": (0, 32)}, {"a": (32, 28)}, {"b": (0, 32)}, {"b": (32, 13)}]
    assert second.status is RequestStatus.RUNNING
    driver.step()
    assert second.status is RequestStatus.SWAPPED


def test_one_that_reads_more_than_the_device_holds_runs_when_it_is_alone():
    driver = Driver(Limits(20, (DISK,)), ThreePhase())
    driver.add("a", 40, 3)
    assert driver.steps() == [{"a": (0, 16)}, {"a": (16, 16)}, {"a": (32, 8)}, {"a": (40, 1)}, {"a": (41, 1)}]


def test_the_state_of_the_policy_is_never_overdrawn():
    driver = Driver(Limits(1000, state_tokens=128))
    first, second = driver.add("a", 60, 20), driver.add("b", 60, 20)
    driver.add("c", 1, 1)
    with pytest.raises(CapacityError, match=r"needs room for 129 tokens in the state .* leaves room for 128;"):
        driver.add("d", 100, 30)
    while first.num_cached < 64:
        driver.step()
        assert driver.scheduler.num_waiting >= 1
    driver.step()  # 65 tokens take two blocks
    assert (first.status, second.status) == (RequestStatus.RUNNING, RequestStatus.WAITING)
    assert driver.plan.closed == (1,)
    driver.steps()
    assert sorted(driver.finished) == ["a", "b", "c"]


# --- the end ----------------------------------------------------------------------------------------------------------


def test_requests_are_aborted_while_they_wait_read_run_or_are_swapped():
    driver = Driver(Limits(64, (DISK,)), ThreePhase(), policy="swa", max_num_seqs=3)
    requests = {name: driver.add(name, 40, 60) for name in "abcd"}
    waiting = driver.abort("d")
    assert (waiting.req_idx, waiting.status, waiting.finish_reason) == (None, RequestStatus.FINISHED, "abort")
    driver.step()
    reading = driver.abort("a")
    assert (reading.req_idx, reading.num_cached, reading.in_prefill) == (0, 16, True)
    driver.add("e", 40, 60)
    driver.step()
    while not driver.scheduler.swapped:
        driver.step()
    swapped = driver.scheduler.swapped[0]
    assert driver.abort(swapped.request_id) is swapped
    assert swapped.req_idx is not None
    running = driver.scheduler.running[0]
    assert driver.abort(running.request_id) is running
    assert driver.abort(running.request_id) is None
    assert driver.abort("nobody") is None
    aborted = {request.request_id for request in (waiting, reading, swapped, running)}
    left = [name for name in "abcde" if name not in aborted]
    driver.steps()
    assert driver.finished == left
    assert all(requests[name].finish_reason == "abort" for name in aborted & set(requests))


def test_the_index_of_an_aborted_request_is_free_at_once():
    driver = Driver(Limits(1000), max_num_seqs=1)
    driver.add("a", 4, 9)
    driver.step()
    driver.add("b", 4, 1)
    driver.abort("a")
    assert driver.step() == {"b": (0, 4)}
    assert (driver.plan.opened, driver.plan.closed) == ((Opened(0, "b", 4, 4),), ())


def test_a_request_whose_rows_are_lost_ends_with_the_reason():
    driver = Driver(Limits(1000))
    lost, other = driver.add("a", 4, 9), driver.add("b", 4, 3)
    driver.step()
    driver.step(failed={0: "the disk is gone"})
    assert (lost.status, lost.finish_reason, lost.error) == (RequestStatus.FINISHED, "error", "the disk is gone")
    assert lost.output_ids == [7]
    assert "a" not in driver.scheduler.requests
    driver.steps()
    assert (driver.finished, other.finish_reason) == (["b"], "length")


# --- whole runs, written out ------------------------------------------------------------------------------------------
# Version 0.1 makes these decisions. A line is a step: its chunks as request index:start-end, what opens and closes,
# what moves.


def written(plan):
    parts = ["prefill" if plan.prefill else "decode"]
    parts[0] += "".join(f" {chunk.req_idx}:{chunk.start}-{chunk.end}" for chunk in plan.chunks)
    parts += [f"open {opened.req_idx}" for opened in plan.opened] + [f"close {req_idx}" for req_idx in plan.closed]
    parts += [
        f"{move.req_idx}:{move.start}-{move.end} {move.source} > {move.target or 'deleted'}" for move in plan.moves
    ]
    return ", ".join(parts)


def test_a_third_request_waits_for_a_request_index():
    plans = list(rollout(AllDevice(), Limits(40), (8, 11, 4), 3, reads_of("dense", 0), max_num_seqs=2, prefill_chunk=8))
    assert [plan.step for plan in plans] == list(range(8))
    assert list(map(written, plans)) == [
        "prefill 0:0-8, open 0, open 1",
        "prefill 1:0-8",
        "prefill 1:8-11",
        "decode 0:8-9 1:11-12",
        "decode 0:9-10 1:12-13",
        "prefill 1:0-4, open 1",
        "decode 1:4-5",
        "decode 1:5-6",
    ]


def test_the_device_is_full_and_the_newest_reads_its_prompt_again():
    plans = list(rollout(AllDevice(), Limits(22), (12, 4, 3), 6, reads_of("dense", 0), prefill_chunk=8))
    assert list(map(written, plans)) == [
        "prefill 0:0-8, open 0, open 1",
        "prefill 0:8-12 1:0-4",
        "decode 0:12-13 1:4-5",
        "decode 0:13-14 1:5-6",
        "decode 0:14-15 1:6-7",
        "decode 0:15-16, close 1",
        "prefill 1:0-4, open 1",
        "decode 0:16-17 1:4-5",
        "prefill 0:0-3, open 0",
        "decode 1:5-6 0:3-4",
        "decode 1:6-7 0:4-5",
        "decode 1:7-8 0:5-6",
        "decode 1:8-9 0:6-7",
        "decode 0:7-8",
    ]


def test_a_schedule_offloads_and_deletes():
    schedule = Schedule(offload_from=2, recompute_from=4, offload_ratio=0.7, recompute_ratio=0.6)
    limits = Limits(60, (Tier(Medium.DISK, 60),), rebuildable=8)
    plans = list(rollout(ThreePhase(schedule, 2), limits, (20, 9), 6, reads_of("swa", 0.6), prefill_chunk=16))
    assert list(map(written, plans)) == [
        "prefill 0:0-16, open 0, open 1",
        "prefill 0:16-20 1:0-9",
        "decode 0:20-21 1:9-10",
        "decode 0:21-22 1:10-11, 0:0-15 device > disk",
        "decode 0:22-23 1:11-12",
        "decode 0:23-24 1:12-13, 0:0-8 disk > deleted",
        "decode 0:24-25 1:13-14, 0:15-17 device > disk",
    ]
    phases = [Phase.DEVICE] * 3 + [Phase.DEVICE_HOST] * 2 + [Phase.RECOMPUTE] * 2
    assert [plan.phase for plan in plans] == phases


def test_a_static_split_writes_past_the_device():
    limits = Limits(20, (Tier(Medium.DISK, 40),))
    options = {"max_num_seqs": 2, "prefill_chunk": 8}
    plans = list(rollout(StaticSplit(0.75, chunk=4), limits, (3, 11, 6), 3, reads_of("dense", 0), **options))
    assert list(map(written, plans)) == [
        "prefill 0:0-3, open 0, open 1, 0:0-2 device > disk",
        "prefill 1:0-8, 1:0-7 device > disk",
        "prefill 1:8-11, 1:7-8 device > disk",
        "decode 0:3-4 1:11-12, 0:2-3 device > disk, 1:8-11 device > disk",
        "decode 0:4-5 1:12-13, 0:3-4 device > disk, 1:11-12 device > disk",
        "prefill 1:0-6, open 1, 1:0-4 device > disk",
        "decode 1:6-7, 1:4-6 device > disk",
        "decode 1:7-8, 1:6-7 device > disk",
    ]


def test_a_request_is_swapped_while_two_read_too_much():
    limits = Limits(44, (Tier(Medium.HOST, 8), Tier(Medium.DISK, 60)))
    plans = list(rollout(ThreePhase(chunk=4), limits, (40, 10, 5), 4, reads_of("dense", 0), prefill_chunk=64))
    assert list(map(written, plans)) == [
        "prefill 0:0-40 1:0-10, open 0, open 1, 0:0-39 device > disk, 1:0-1 device > disk, 1:1-9 device > host",
        "decode 0:40-41",
        "decode 0:41-42",
        "decode 0:42-43",
        "prefill 0:0-5, open 0",
        "decode 1:10-11 0:5-6",
        "decode 1:11-12 0:6-7",
        "decode 1:12-13 0:7-8",
    ]
    assert [plan.num_preempted for plan in plans] == [0, 1, *[0] * (len(plans) - 2)]


@pytest.mark.parametrize("drafts", [[], [7, 8, 9]])
def test_the_tokens_of_a_request_go_on_in_its_drafts(drafts):
    request = Request("a", [1, 2, 3, 4], SamplingParams(), 10)
    request.append(5)
    request.draft_ids = drafts
    whole = [*request.token_ids, *drafts]
    for start in range(len(whole) + 1):
        for end in range(start, len(whole) + 1):
            assert request.tokens(start, end) == whole[start:end]

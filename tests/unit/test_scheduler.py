"""The scheduler alone: who runs, who waits, who makes room, and what the plans say about it."""

import pytest

from alisa.budget import reads_of
from alisa.config import SamplingParams
from alisa.errors import CapacityError, InputError
from alisa.outputs import Medium, Phase
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, Tier
from alisa.scheduler.placement.three_phase import ThreePhase
from alisa.scheduler.plan import Opened, ScheduledChunk
from alisa.scheduler.request import Request, RequestStatus
from alisa.scheduler.scheduler import Scheduler
from alisa.scheduler.simulate import IntegerCache

DISK = Tier(Medium.DISK, 1000)


class Costs:
    """Rows are always kept, or never."""

    def __init__(self, keeps):
        self.keeps = keeps

    def keeps_rows(self, request):
        return self.keeps


class Driver:
    """An engine without a model: it executes plans on integers and gives every request token 7."""

    def __init__(self, limits, placement=None, *, policy="dense", keeps=True, max_num_seqs=8, prefill_chunk=16, **more):
        self.scheduler = Scheduler(
            limits,
            placement or AllDevice(),
            reads_of(policy, 0.6),
            Costs(keeps),
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
            **more,
        )
        self.cache = IntegerCache(limits)
        self.finished = []

    def add(self, request_id, prompt_len, max_new_tokens=4, priority=0):
        request = Request(
            request_id, range(prompt_len), SamplingParams(max_tokens=max_new_tokens), max_new_tokens, priority
        )
        self.scheduler.add(request)
        return request

    def abort(self, request_id):
        request = self.scheduler.abort(request_id)
        if request is not None and request.req_idx is not None:
            self.cache.close(request.req_idx)
        return request

    def step(self, failed=None):
        """Execute a step; its chunks by request id."""
        plan = self.scheduler.schedule(self.cache)
        if plan is None:
            return None
        self.plan = plan
        self.cache.begin(plan)
        running = {request.req_idx: request for request in self.scheduler.running}
        done = [running[chunk.req_idx] for chunk in plan.chunks]
        finished = []
        for request, chunk in zip(done, plan.chunks, strict=True):
            if chunk.end == len(request.token_ids) and chunk.req_idx not in (failed or {}):
                request.append(7)
                if len(request.output_ids) == request.max_new_tokens:
                    request.finish_reason = "length"
                    finished.append(request)
        lost = [r for r in (*running.values(), *self.scheduler.swapped) if r.req_idx in (failed or {})]
        self.scheduler.update(plan, finished, failed or {})
        for request in (*finished, *lost):
            self.cache.close(request.req_idx)
        self.finished += [request.request_id for request in finished]
        return {
            request.request_id: (chunk.start, chunk.count) for request, chunk in zip(done, plan.chunks, strict=True)
        }

    def steps(self):
        return list(iter(self.step, None))


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
    driver = Driver(Limits(60), keeps=False)
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

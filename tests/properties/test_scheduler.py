"""The scheduler as a state machine: requests come, are aborted, end early or lose their rows, under any limits.

The model knows what every request was asked and how far it is; each plan is checked against it and against the limits.
"""

import itertools
import random
from itertools import islice

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from alisa.errors import CapacityError, InputError
from alisa.outputs import Medium
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, Tier
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase
from alisa.scheduler.prefix import BLOCK_TOKENS
from alisa.scheduler.request import RequestStatus
from tests.scheduler_cases import TOKEN, Driver, KnownBlocks

STATE_BLOCK = 64


def some_limits(draw, *, most_tiers):
    media = [Medium.DISK] if draw.randint(1, most_tiers + 1) == 2 else [Medium.HOST, Medium.DISK][:most_tiers]
    tiers = tuple(Tier(medium, draw.randint(0, 300)) for medium in media)
    state_tokens = draw.choice((None, None, STATE_BLOCK * draw.randint(2, 8), draw.randint(128, 600)))
    return Limits(draw.randint(20, 160), tiers, draw.randint(0, 40) if tiers else 0, state_tokens)


class SchedulerMachine(RuleBasedStateMachine):
    """`live` has every request that is not finished, `rows` the numbers of the rows that the cache holds for it, by
    request index; two that share a row have its number."""

    most_tiers = 2
    chunks = (4, 16, 64)
    """Prompt tokens of a step; the first of them where prompts take turns with the others."""

    def prefix(self, draw):
        return None

    def placement(self, draw):
        return ThreePhase(None, draw.randint(1, 16))

    @initialize(draw=st.randoms())
    def set_up(self, draw):
        self.limits = some_limits(draw, most_tiers=self.most_tiers)
        self.max_num_seqs, self.prefill_chunk = draw.randint(1, 6), draw.choice(self.chunks)
        self.shared_chunk, self.prompts_had_turn = draw.choice((None, None, self.chunks[0])), False
        keep, costs = draw.choice((0, 0.5, 1)), random.Random(draw.randint(0, 1000))
        self.driver = Driver(
            self.limits,
            self.placement(draw),
            policy=draw.choice(("dense", "dense", "swa", "local")),
            keeps=lambda request: costs.random() < keep,
            max_num_seqs=self.max_num_seqs,
            prefill_chunk=self.prefill_chunk,
            shared_chunk=self.shared_chunk,
            prefix=self.prefix(draw),
        )
        self.scheduler = self.driver.scheduler
        self.live, self.owners, self.rows = {}, {}, {}
        self.numbers = itertools.count()
        self.gone = []
        self.num_added = 0
        self.admitted = set()

    @property
    def lengths(self):
        return {req_idx: len(rows) for req_idx, rows in self.rows.items()}

    # --- requests ----------------------------------------------------------------------------------------------------

    @rule(draw=st.randoms(), count=st.integers(1, 6))
    def add(self, draw, count):
        for _ in range(count):
            most = draw.choice((20, 60, self.limits.device_tokens))
            self.add_one(draw.randint(1, most), draw.randint(1, 80), draw.choice((0, 0, 0, -1, 1)))

    def add_one(self, prompt_len, new, priority):
        self.num_added += 1
        name = f"r{self.num_added}"
        try:
            request = self.driver.add(name, prompt_len, new, priority)
        except CapacityError:
            num_rows = prompt_len + new - 1
            most = min(self.limits.device_tokens, (self.limits.state_tokens or 128) // STATE_BLOCK * STATE_BLOCK)
            assert num_rows > most or isinstance(self.scheduler.placement, StaticSplit)
            return
        self.live[name] = request, self.num_added

    @rule(seed=st.integers(0, 2**32 - 1))
    def add_again(self, seed):
        """An id in use is refused, and nothing has changed."""
        if self.live:
            with pytest.raises(InputError):
                self.driver.add(random.Random(seed).choice(list(self.live)), 1, 1)

    @rule(draw=st.randoms())
    def abort(self, draw):
        if not self.live:
            assert self.driver.abort("nobody") is None
            return
        found = {request.status for request, _ in self.live.values()}
        rarest = (RequestStatus.SWAPPED, RequestStatus.RUNNING, RequestStatus.WAITING)
        status = draw.choice([status for status in rarest if status in found])
        name = draw.choice([name for name, (request, _) in self.live.items() if request.status is status])
        request = self.live[name][0]
        assert self.driver.abort(name) is request
        assert (request.finish_reason, request.req_idx is None) == ("abort", status is RequestStatus.WAITING)
        self.let_go(name)
        assert self.driver.abort(name) is None

    def let_go(self, name):
        request, _ = self.live.pop(name)
        assert request.status is RequestStatus.FINISHED
        assert 0 < request.admitted_s <= request.first_token_s <= request.finished_s
        self.gone.append(name)
        if request.req_idx is not None:
            del self.owners[request.req_idx], self.rows[request.req_idx]

    # --- steps -------------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), trouble=st.sampled_from((0, 0, 0.05)))
    def steps(self, count, seed, trouble):
        draw = random.Random(seed)
        for _ in range(count):
            failed = {req_idx: "lost" for req_idx in range(self.max_num_seqs) if trouble and draw.random() < trouble}
            self.step(lambda request: draw.random() < trouble, failed)

    def step(self, stops=lambda request: False, failed=None):
        before = {name: request.num_cached for name, (request, _) in self.live.items()}
        chunks = self.driver.step(stops=stops, failed=failed)
        assert (chunks is None) == (not self.live)
        if chunks is None:
            return False
        plan = self.driver.plan
        self.check_owners(plan)
        self.check_chunks(plan, before)
        self.check_room()
        for name in [name for name, (request, _) in self.live.items() if request.finish_reason is not None]:
            request = self.live[name][0]
            assert (request.finish_reason == "error") == (request.req_idx in (failed or {}))
            self.let_go(name)
        return True

    def check_owners(self, plan):
        """No index has two owners, nobody comes back who is gone, and requests start in their order."""
        for req_idx in plan.closed:
            del self.owners[req_idx], self.rows[req_idx]
        for opened in plan.opened:
            assert 0 <= opened.req_idx < self.max_num_seqs
            assert opened.req_idx not in self.owners
            request = self.live[opened.request_id][0]
            assert opened.num_tokens == request.num_rows
            assert opened.request_id not in self.owners.values()
            self.owners[opened.req_idx], self.rows[opened.req_idx] = opened.request_id, []
            self.admitted.add(opened.request_id)
        waiting = [
            (request.priority, arrival)
            for name, (request, arrival) in self.live.items()
            if name not in self.admitted and not request.num_preempted
        ]
        for opened in plan.opened:
            request, arrival = self.live[opened.request_id]
            assert all((request.priority, arrival) < other for other in waiting), "nobody is overtaken"

    def check_chunks(self, plan, before):
        """Chunks continue their sequences; prompts are cut at multiples of a chunk, and take turns with the others."""
        assert plan.chunks
        cut = self.shared_chunk or self.prefill_chunk
        if self.driver.prefix is not None:
            cut = BLOCK_TOKENS
        requests = [(self.live[self.owners[index]][0], length) for index, length in self.lengths.items()]
        answered = any(r.status is not RequestStatus.SWAPPED and length >= r.prompt_len for r, length in requests)
        assert len({chunk.req_idx for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            name = self.owners[chunk.req_idx]
            request = self.live[name][0]
            rows = self.rows[chunk.req_idx]
            assert chunk.start == len(rows)
            assert chunk.start in (0, before[name])
            assert chunk.end <= request.num_rows
            if chunk.source is None:
                rows += islice(self.numbers, chunk.count)
            else:
                assert plan.restored
                assert chunk.source != chunk.req_idx
                assert self.rows[chunk.source][: chunk.start] == rows
                rows += self.rows[chunk.source][chunk.start : chunk.end]
                assert len(rows) == chunk.end
            if plan.prefill:
                assert chunk.start % cut == 0
                assert chunk.end == request.prompt_len or chunk.end % cut == 0
            else:
                assert chunk.count == 1
                assert chunk.start >= request.prompt_len
        if plan.prefill:
            assert plan.num_tokens <= self.prefill_chunk
            if self.shared_chunk is not None and answered:
                assert plan.num_tokens <= self.shared_chunk
                assert not self.prompts_had_turn
        self.prompts_had_turn = plan.prefill

    def check_room(self):
        """Every limit is kept in the step."""
        bounds = self.driver.bounds
        assert bounds.keys() == self.rows.keys()
        numbers = {number for req_idx, ends in bounds.items() for number in self.rows[req_idx][ends[0] :]}
        if self.limits.tiers:  # every sequence has rows of its own
            assert sum(self.lengths[i] - ends[0] for i, ends in bounds.items()) <= self.limits.device_tokens
        assert len(numbers) <= self.limits.device_tokens
        for level, tier in enumerate(self.limits.tiers):
            assert sum(ends[level] - ends[level + 1] for ends in bounds.values()) <= tier.num_tokens
        assert all(ends[-1] <= self.limits.rebuildable for ends in bounds.values())
        if self.limits.state_tokens is not None:
            num_blocks = sum(-(-length // STATE_BLOCK) for length in self.lengths.values())
            assert num_blocks * STATE_BLOCK <= self.limits.state_tokens

    @invariant()
    def agrees(self):
        scheduler = self.scheduler
        assert dict(scheduler.requests) == {name: request for name, (request, _) in self.live.items()}
        assert scheduler.has_requests == bool(self.live)
        queues = {status: [] for status in RequestStatus}
        for request, _ in self.live.values():
            queues[request.status].append(request)
            assert (request.req_idx is None) == (request.status is RequestStatus.WAITING)
            assert request.output_ids == [TOKEN] * len(request.output_ids)
            assert request.token_ids == [*request.prompt_ids, *request.output_ids]
        assert set(scheduler.running) == set(queues[RequestStatus.RUNNING])
        assert set(scheduler.swapped) == set(queues[RequestStatus.SWAPPED])
        assert scheduler.num_waiting == len(queues[RequestStatus.WAITING])
        assert not queues[RequestStatus.FINISHED]
        priorities = [request.priority for request in scheduler.running]
        assert priorities == sorted(priorities)
        indices = [request.req_idx for request in (*scheduler.running, *scheduler.swapped)]
        assert len(set(indices)) == len(indices) <= self.max_num_seqs
        assert {req_idx: self.live[name][0].num_cached for req_idx, name in self.owners.items()} == self.lengths

    def teardown(self):
        """Every request that nobody has aborted gets all its tokens."""
        left = {name: request for name, (request, _) in self.live.items()}
        for _ in range(10 * sum(request.num_rows for request in left.values()) + 1):
            if not self.step():
                break
        assert not self.live
        assert all(len(request.output_ids) == request.max_new_tokens for request in left.values())
        assert all(request.finish_reason == "length" for request in left.values())


class AllDeviceMachine(SchedulerMachine):
    """Without tiers nobody is swapped."""

    most_tiers = 0

    def placement(self, draw):
        return AllDevice()


class SharedMachine(AllDeviceMachine):
    """All prompts begin alike, and what is known of them is shared where somebody has it."""

    chunks = (16, 64)

    def prefix(self, draw):
        return KnownBlocks(draw.choice((BLOCK_TOKENS, BLOCK_TOKENS, 64)), draw.choice((2, 1000)))


class SharedTiersMachine(SharedMachine):
    """Where rows move, every sequence is counted with all its rows."""

    most_tiers = 2

    def placement(self, draw):
        return ThreePhase(None, draw.randint(1, 16))


class StaticMachine(SchedulerMachine):
    """Nobody is swapped: the split is what is wanted."""

    def placement(self, draw):
        return StaticSplit(0.99 * draw.random(), draw.randint(1, 16))


class ScheduleMachine(SchedulerMachine):
    """Rows move and are deleted before the device is full."""

    def placement(self, draw):
        steps = sorted(draw.randint(0, 40) for _ in range(2))
        schedule = Schedule(
            offload_from=steps[0], recompute_from=steps[1], offload_ratio=draw.random(), recompute_ratio=draw.random()
        )
        return ThreePhase(schedule, draw.randint(1, 16))


SETTINGS = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestThreePhase = SchedulerMachine.TestCase
TestThreePhase.settings = SETTINGS
TestAllDevice = AllDeviceMachine.TestCase
TestAllDevice.settings = SETTINGS
TestShared = SharedMachine.TestCase
TestShared.settings = SETTINGS
TestSharedTiers = SharedTiersMachine.TestCase
TestSharedTiers.settings = SETTINGS
TestStatic = StaticMachine.TestCase
TestStatic.settings = SETTINGS
TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = SETTINGS

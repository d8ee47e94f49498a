"""Who runs next: requests, their queues and request indices, and a plan for every step, in integers only.

Prompts are read before running requests go on, in chunks that are cut at multiples of `prefill_chunk` tokens; or in
turns with them, `shared_chunk` tokens at a time, so that nobody who is being answered waits for a long prompt. A
request's arithmetic does not depend on its company. When no placement of all rows fits the
limits, or when the requests read more than the device holds, the newest one makes room. It is swapped: its rows stay,
most of them in lower tiers, and it takes part in no step for a while. Or it is preempted: its rows are dropped, and
later it reads its prompt again and feeds its own output once more. Both give the same tokens. A beginning that
comes from the prefix cache, and whose rows another request has, takes no room of its own where rows never move.

The engine and the simulator call the same four methods, `add`, `abort`, `schedule` and `update`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Protocol

from alisa.budget import Reads
from alisa.errors import CapacityError, InputError
from alisa.scheduler.chunks import (
    decode_chunks,
    known_rows,
    one_by_one,
    prompt_chunks,
    request_index,
    restored_chunks,
)
from alisa.scheduler.fair import ServedTokens
from alisa.scheduler.order import FirstCome, QueueOrder
from alisa.scheduler.placement.base import (
    Limits,
    PlacementDecision,
    PlacementPolicy,
    SeqView,
    fresh_view,
    is_oversubscribed,
    seq_view,
)
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan
from alisa.scheduler.prefix import BLOCK_TOKENS, PrefixView
from alisa.scheduler.refusal import refusal
from alisa.scheduler.request import Request, RequestStatus
from alisa.scheduler.shared_rows import SharedRows

HEADROOM_TOKENS = 32
"""Tokens that every running request must be able to grow by before another one is admitted: fewer, and the newest is
preempted before it has paid for its prompt."""


class CacheView(Protocol):
    """Where the rows of open sequences lie; only asked about sequences that have rows."""

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """Where each lower tier ends, see `alisa.scheduler.placement.base`; `(0,)` with no tiers."""
        ...

    def rebuildable(self, req_idx: int) -> int:
        """Positions below this have their hidden states kept."""
        ...


class RestoreCosts(Protocol):
    """What it costs to bring a request back that had to make room."""

    def keeps_rows(self, request: Request) -> bool:
        """Whether fetching its rows back is cheaper than computing them again."""
        ...


class Scheduler:
    """Queues of requests, and the plan of the next step.

    Args:
        limits: what there is room for.
        placement: decides which rows move, and whether all have room.
        reads: how many tokens a step reads.
        restore_costs: decides between swapping and preempting.
        max_num_seqs: requests that have a request index at the same time.
        prefill_chunk: prompt tokens in one step at most.
        shared_chunk: prompt tokens in one step at most while other requests are being answered, which then take every
            other step; None: these wait until all prompts are read.
        step_tokens: tokens of a sequence in one decode step at most; more than 1 where the policy can take some back.
        token_bytes: bytes of one token's rows, for messages; None: they count tokens.
        order: chooses among waiting requests of the same priority; None: the first to come.
        fair: of these, only those of the client who has got the least are chosen among; None: it is not asked who.
        prefix: beginnings of prompts whose K and V are known; `prefill_chunk` is then a multiple of its blocks.
    """

    def __init__(
        self,
        limits: Limits,
        placement: PlacementPolicy,
        reads: Reads,
        restore_costs: RestoreCosts,
        *,
        max_num_seqs: int,
        prefill_chunk: int,
        shared_chunk: int | None = None,
        step_tokens: int = 1,
        token_bytes: int | None = None,
        order: QueueOrder | None = None,
        fair: ServedTokens | None = None,
        prefix: PrefixView | None = None,
    ) -> None:
        assert prefix is None or prefill_chunk % BLOCK_TOKENS == 0, "chunks end where blocks end"
        self.limits = limits
        self.placement = placement
        self._reads = reads
        self._restore_costs = restore_costs
        self._prefill_chunk = prefill_chunk
        self._shared_chunk = shared_chunk
        self._step_tokens = step_tokens
        self._token_bytes = token_bytes
        self._order = order or FirstCome()
        self._fair = fair
        self._prefix = prefix
        self._shared = SharedRows()
        self._requests: dict[str, Request] = {}
        self._waiting: list[tuple[int, int, Request]] = []
        """(priority, turn, request), the next one first."""
        self._running: list[Request] = []
        self._swapped: list[Request] = []
        self._free_req_indices = list(range(max_num_seqs - 1, -1, -1))
        self._last_turn = 0
        self._first_turn = 0
        self._num_steps = 0
        self._prompts_had_turn = False
        self._opened: list[Request] = []
        self._closed: list[int] = []
        self._num_preempted = 0

    @property
    def has_requests(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._requests)

    @property
    def requests(self) -> Mapping[str, Request]:
        """Every request that is not finished, by its id."""
        return self._requests

    @property
    def num_waiting(self) -> int:
        """Requests without a request index."""
        return len(self._waiting)

    @property
    def running(self) -> Sequence[Request]:
        """Requests that take part in steps, in the order in which they were admitted within a priority."""
        return self._running

    @property
    def swapped(self) -> Sequence[Request]:
        """Requests that keep their rows and wait until there is room to read them."""
        return self._swapped

    def add(self, request: Request) -> None:
        """Queue a request; it runs as soon as a request index and its rows are free.

        Raises:
            InputError: its id is in use.
            CapacityError: it does not fit the limits even when it runs alone.
        """
        if request.request_id in self._requests:
            raise InputError(f"The request id {request.request_id!r} is in use; choose another one.")
        if not self._fits([fresh_view(request.num_rows, self.limits, self._reads)]):
            raise CapacityError(refusal(request, self.limits, self._token_bytes))
        self._requests[request.request_id] = request
        if self._fair is not None:
            self._fair.arrive(request, [waiting for _, _, waiting in self._waiting])
        self._last_turn += 1
        insort(self._waiting, (request.priority, self._last_turn, request))

    def abort(self, request_id: str) -> Request | None:
        """The request is finished with the reason `abort`, whatever it was doing; its request index is free.

        Call it between steps: after `update`, before `schedule`.

        Returns:
            The request, whose `req_idx` is what the caller has to close in the cache (None: nothing); None when there
            is no such request.
        """
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = "abort"
            self._leave(request)
        return request

    def schedule(self, cache: CacheView, most_prompt: int | None = None) -> StepPlan | None:
        """The next step; None when nothing is left to do. `update` follows before the next call.

        Args:
            cache: where rows lie.
            most_prompt: prompt tokens of this step at most; None: as many as the scheduler was made for.
        """
        self._opened.clear()
        self._closed.clear()
        self._num_preempted = 0
        self._resume()
        self._admit(cache)
        while self._running:
            prefill, restored, chunks = self._next_chunks(most_prompt)
            if self._is_oversubscribed(self._running) and self._swap(chunks, cache):
                continue
            decision = self._place(self._running, self._swapped, chunks, cache)
            several = not prefill and any(chunk.count > 1 for chunk in chunks)
            if several and decision is None:  # drafts take no room from others
                chunks = one_by_one(chunks)
                decision = self._place(self._running, self._swapped, chunks, cache)
            if decision is not None:
                return self._plan(decision, chunks, prefill=prefill, restored=restored)
            self._preempt()
        return None

    def update(self, plan: StepPlan, finished: Iterable[Request], failed: Mapping[int, str]) -> None:
        """The plan has been executed: its tokens are cached, and what has ended has left.

        Args:
            plan: the last one that `schedule` gave.
            finished: requests that got their last token; they have a `finish_reason`.
            failed: request indices whose rows were lost, and why; these requests finish with the reason `error`.
        """
        running = {request.req_idx: request for request in self._running}
        for chunk in plan.chunks:
            request = running[chunk.req_idx]
            request.num_cached = min(chunk.end, len(request.token_ids) - 1)  # other tokens came than some drafts
            if plan.restored and not request.num_preempted:
                request.cached_tokens += chunk.count
        for request in finished:
            assert request.finish_reason is not None, "a finished request says why it has ended"
            self._order.learn(request)
            self._leave(request)
        for request in [r for r in (*self._running, *self._swapped) if r.req_idx in failed]:
            request.finish_reason, request.error = "error", failed[request_index(request)]
            self._leave(request)

    # --- the queues ----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Swapped requests run again as soon as there is room to read them, the one that has waited longest first."""
        while self._swapped and not self._is_oversubscribed([*self._running, self._swapped[0]]):
            self._run(self._swapped.pop(0))

    def _admit(self, cache: CacheView) -> None:
        """Waiting requests get a request index while there is room for them and nobody is swapped."""
        while self._waiting and self._free_req_indices and not self._swapped:
            request = self._next_waiting()
            if not self._has_room(request, cache):
                return
            self._take_waiting(request)
            request.req_idx = self._free_req_indices.pop()
            request.admitted_s = request.admitted_s or perf_counter()
            self._opened.append(request)
            if self._fair is not None:
                self._fair.admit(request)
            self._run(request)

    def _next_waiting(self) -> Request:
        """Of the waiting requests with the lowest priority number, the one that is admitted next."""
        priority, turn, first = self._waiting[0]
        if turn < 0:  # it has run before, and made room for others
            return first
        waiting: Sequence[Request] = [request for other, _, request in self._waiting if other == priority]
        return self._order.choose(waiting if self._fair is None else self._fair.least_served(waiting))

    def _take_waiting(self, request: Request) -> None:
        self._waiting = [entry for entry in self._waiting if entry[-1] is not request]

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=_priority)

    def _swap(self, chunks: Iterable[ScheduledChunk], cache: CacheView) -> bool:
        """Take the newest request out of the batch and keep its rows, if that is possible and worth it."""
        newest = self._running[-1]
        if newest.in_prefill or not self._restore_costs.keeps_rows(newest):
            return False
        others = [chunk for chunk in chunks if chunk.req_idx != newest.req_idx]
        if self._place(self._running[:-1], [*self._swapped, newest], others, cache) is None:
            return False
        self._swapped.append(self._running.pop())
        newest.status = RequestStatus.SWAPPED
        newest.num_preempted += 1
        self._num_preempted += 1
        return True

    def _preempt(self) -> None:
        """The newest request loses its rows and is the next to be admitted; a swapped one goes first."""
        assert self._swapped or len(self._running) > 1, "a request that fits alone has room when it is alone"
        request = (self._swapped or self._running).pop()
        if request in self._opened:
            self._opened.remove(request)
        else:
            self._closed.append(request_index(request))
        self._shared.cut(request_index(request), 0)
        self._free_req_indices.append(request_index(request))
        request.status, request.req_idx, request.num_cached = RequestStatus.WAITING, None, 0
        request.num_preempted += 1
        self._num_preempted += 1
        self._first_turn -= 1
        insort(self._waiting, (request.priority, self._first_turn, request))

    def _leave(self, request: Request) -> None:
        """The request is out of its queue, and its index is free."""
        del self._requests[request.request_id]
        if self._fair is not None:
            self._fair.leave(request)
        if request.status is RequestStatus.WAITING:
            self._take_waiting(request)
        else:
            (self._running if request.status is RequestStatus.RUNNING else self._swapped).remove(request)
        if request.req_idx is not None:
            self._shared.cut(request.req_idx, 0)
            self._free_req_indices.append(request.req_idx)
        request.status, request.finished_s = RequestStatus.FINISHED, perf_counter()
        # All the time of one that was never admitted was waiting, of one without a token waiting and prefill.
        request.admitted_s = request.admitted_s or request.finished_s
        request.first_token_s = request.first_token_s or request.finished_s

    def _next_chunks(self, most_prompt: int | None) -> tuple[bool, bool, tuple[ScheduledChunk, ...]]:
        """(prefill, restored, chunks) of the next step."""
        size = min(self._prefill_chunk, most_prompt or self._prefill_chunk)
        if self._shared_chunk is not None:
            answered = [request for request in self._running if not request.in_prefill]
            if answered and self._prompts_had_turn:
                return False, False, decode_chunks(answered, self._step_tokens)
            size = min(size, self._shared_chunk) if answered else size
        if restored := restored_chunks(self._running, size, self._prefix, self._shared):
            return True, True, restored
        if chunks := prompt_chunks(self._running, size, self._prefix):
            return True, False, chunks
        return False, False, decode_chunks(self._running, self._step_tokens)

    # --- what fits -----------------------------------------------------------------------------------------------

    def _place(
        self, running: Iterable[Request], swapped: Iterable[Request], chunks: Iterable[ScheduledChunk], cache: CacheView
    ) -> PlacementDecision | None:
        """Moves for a step of these chunks; None when the requests do not fit together."""
        of = {chunk.req_idx: chunk for chunk in chunks}
        views: list[SeqView] = []
        for request in running:
            chunk = of.get(request_index(request))
            length = request.num_cached if chunk is None else chunk.end
            num_new = 1 if chunk is None or request.in_prefill else chunk.count
            view = self._view(request, length, cache, active=True, num_new=num_new)
            if chunk is not None and chunk.source is not None and not self.limits.tiers:
                view = replace(view, num_shared=length)
            views.append(view)
        views += [self._view(r, r.num_cached, cache, active=False) for r in swapped]
        return self._decide(views)

    def _has_room(self, request: Request, cache: CacheView) -> bool:
        """Whether one more request fits for a while, together with the others; alone it always does."""
        if not self._running:
            return True
        lengths = [min(r.num_cached + HEADROOM_TOKENS, r.num_rows) for r in self._running]
        views = [self._view(r, n, cache, active=True) for r, n in zip(self._running, lengths, strict=True)]
        num_shared = 0 if self.limits.tiers else known_rows(request, self._running)
        views.append(fresh_view(request.prompt_len, self.limits, self._reads, num_shared))
        oversubscribed = is_oversubscribed(self.placement, self.limits, (view.num_read for view in views))
        return not oversubscribed and self._fits(views)

    def _is_oversubscribed(self, running: Sequence[Request]) -> bool:
        """Whether these requests read more in one layer than the device holds, and one of them could wait."""
        num_read = (1 + sum(self._reads(request.num_cached)) for request in running)
        return len(running) > 1 and is_oversubscribed(self.placement, self.limits, num_read)

    def _fits(self, views: Sequence[SeqView]) -> bool:
        return self._decide(views) is not None

    def _decide(self, views: Sequence[SeqView]) -> PlacementDecision | None:
        has_state_room = self.limits.has_state_room(view.length for view in views)
        return self.placement.plan(views, self.limits) if has_state_room else None

    def _view(self, request: Request, length: int, cache: CacheView, *, active: bool, num_new: int = 1) -> SeqView:
        """How the request looks before a step after which it has `length` tokens."""
        req_idx = request_index(request)
        if request.num_cached:
            bounds, rebuildable = cache.bounds(req_idx), cache.rebuildable(req_idx)
        else:  # the cache may not know it yet
            bounds = (0,) * (len(self.limits.tiers) + 1)
            rebuildable = min(self.limits.rebuildable, request.num_rows)
        return seq_view(
            req_idx,
            request.prompt_len,
            length,
            bounds,
            rebuildable,
            self._reads,
            active=active,
            num_new=num_new,
            num_shared=0 if self.limits.tiers else self._shared.num_shared(req_idx),
        )

    # --- the plan ------------------------------------------------------------------------------------------------

    def _plan(
        self, decision: PlacementDecision, chunks: tuple[ScheduledChunk, ...], *, prefill: bool, restored: bool
    ) -> StepPlan:
        opened = tuple(
            Opened(request_index(r), r.request_id, r.num_rows, r.prompt_len, r.block_names, r.budget)
            for r in self._opened
        )
        for chunk in chunks:
            if chunk.source is not None:
                self._shared.share(chunk.req_idx, chunk.source, chunk.end)
        self._num_steps += 1
        self._prompts_had_turn = prefill
        return StepPlan(
            step=self._num_steps - 1,
            phase=decision.phase,
            prefill=prefill,
            chunks=chunks,
            moves=decision.moves,
            opened=opened,
            closed=tuple(self._closed),
            num_preempted=self._num_preempted,
            restored=restored,
        )


def _priority(request: Request) -> int:
    return request.priority

"""Every step of a batch before any of it is done: the engine's scheduler, over a cache that only counts.

So a simulator prices, and a search ranks, exactly what will be executed. What cannot be known beforehand is assumed to
be as it mostly is: no request ends early, and one that has to make room keeps its rows when lower tiers can take them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alisa.budget import Reads
from alisa.config import SamplingParams
from alisa.outputs import Medium
from alisa.scheduler.placement.base import Limits, PlacementPolicy
from alisa.scheduler.plan import Move, StepPlan
from alisa.scheduler.request import Request
from alisa.scheduler.scheduler import Scheduler

PREFILL_CHUNK = 1024
"""As `EngineConfig.prefill_chunk`."""


class IntegerCache:
    """The bounds of every open sequence, as a cache has them that executes each plan. A `CacheView`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[int, tuple[list[int], int]] = {}

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """See `CacheView.bounds`."""
        return tuple(self._open[req_idx][0])

    def rebuildable(self, req_idx: int) -> int:
        """See `CacheView.rebuildable`."""
        return self._open[req_idx][1]

    def begin(self, plan: StepPlan) -> None:
        """Sequences are closed and opened, and moves made, as the plan says."""
        for req_idx in plan.closed:
            self.close(req_idx)
        for opened in plan.opened:
            assert opened.req_idx not in self._open, "a request index has one owner"
            bounds = [0] * (len(self._limits.tiers) + 1)
            self._open[opened.req_idx] = bounds, min(self._limits.rebuildable, opened.num_tokens)
        for move in plan.moves:
            lower_bounds(self._open[move.req_idx][0], move, self._limits)

    def close(self, req_idx: int) -> None:
        """The sequence is gone."""
        del self._open[req_idx]


class _KeepsRows:
    """Lower tiers are taken to be faster than computing rows again."""

    def keeps_rows(self, request: Request) -> bool:
        """See `RestoreCosts.keeps_rows`."""
        return True


def rollout(
    placement: PlacementPolicy,
    limits: Limits,
    prompt_lens: Sequence[int],
    output_len: int,
    reads: Reads,
    *,
    max_num_seqs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[StepPlan]:
    """The plans of all steps in which an engine answers these prompts, in order.

    Args:
        placement: decides what moves.
        limits: what there is room for.
        prompt_lens: tokens of each prompt, in the order in which they arrived.
        output_len: tokens that each gets, the first of them from its prompt's last step.
        reads: how many tokens a step reads (`alisa.budget.reads_of`).
        max_num_seqs: requests that have a request index at the same time; None: all.
        prefill_chunk: prompt tokens in one step at most.

    Raises:
        CapacityError: a request does not fit even alone.
    """
    num_seqs = min(max_num_seqs or len(prompt_lens), len(prompt_lens))
    scheduler = Scheduler(limits, placement, reads, _KeepsRows(), max_num_seqs=num_seqs, prefill_chunk=prefill_chunk)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    for index, length in enumerate(prompt_lens):
        scheduler.add(Request(str(index), range(length), params, output_len))
    cache = IntegerCache(limits)
    while (plan := scheduler.schedule(cache)) is not None:
        yield plan
        cache.begin(plan)
        finished = _advance(scheduler, plan)
        scheduler.update(plan, finished, {})
        for request in finished:
            assert request.req_idx is not None
            cache.close(request.req_idx)


def _advance(scheduler: Scheduler, plan: StepPlan) -> list[Request]:
    """Every request whose tokens have all been through the model has got one more; those that got their last."""
    running = {request.req_idx: request for request in scheduler.running}
    finished: list[Request] = []
    for chunk in plan.chunks:
        request = running[chunk.req_idx]
        if chunk.end == len(request.token_ids):
            request.append(0)
            if len(request.output_ids) == request.max_new_tokens:
                request.finish_reason = "length"
                finished.append(request)
    return finished


def lower_bounds(bounds: list[int], move: Move, limits: Limits) -> None:
    """Change a sequence's bounds to what they are after one of its moves."""
    media: list[Medium | None] = [Medium.DEVICE, *(tier.medium for tier in limits.tiers), None]
    for level in range(media.index(move.source), media.index(move.target)):
        bounds[level] = max(bounds[level], move.end)

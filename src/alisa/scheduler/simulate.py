"""Every step of a batch before any of it is done: the calls that the engine makes, without a model.

The engine asks a scheduler what to move, and so does this; both ask who runs next (`next_work`), how a sequence looks
(`seq_view`) and who is in the way (`is_oversubscribed`) of the same functions. So a simulator prices, and a search
ranks, just what will be executed. What cannot be known beforehand is taken as it mostly is: no sequence ends early,
and one that is taken out of the batch keeps its rows below when there is room for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from alisa.budget import Reads
from alisa.errors import CapacityError
from alisa.outputs import Medium
from alisa.scheduler.placement.base import Limits, PlacementDecision, PlacementPolicy, SeqView
from alisa.scheduler.placement.views import HEADROOM_TOKENS, fresh_view, is_oversubscribed, seq_view
from alisa.scheduler.plan import Move, ScheduledChunk, StepPlan
from alisa.scheduler.work import Work, next_work

PREFILL_CHUNK = 1024
"""As `EngineConfig.prefill_chunk`."""


def rollout(
    scheduler: PlacementPolicy,
    limits: Limits,
    prompt_lens: Sequence[int],
    output_len: int,
    reads: Reads,
    *,
    max_batch: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[StepPlan]:
    """The plans of all steps in which an engine answers these prompts, in order.

    Args:
        scheduler: decides what moves.
        limits: what there is room for.
        prompt_lens: tokens of each prompt, in the order in which they were submitted.
        output_len: tokens that each gets, the first of them from its prompt's last step.
        reads: how many tokens a step reads (`alisa.budget.reads_of`).
        max_batch: sequences that have a request index at the same time; None: all.
        prefill_chunk: prompt tokens in one pass at the most.

    Raises:
        CapacityError: a sequence does not fit even alone.
    """
    yield from _Rollout(scheduler, limits, reads, prompt_lens, output_len, max_batch, prefill_chunk).steps()


@dataclass(slots=True, eq=False)
class _Sequence:
    """What the engine's `Sequence` says about lengths, and the bounds that the store keeps."""

    prompt_len: int
    most_outputs: int
    bounds: list[int]
    rebuildable: int
    req_idx: int = -1
    num_cached: int = 0
    num_output: int = 0

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_cached < self.prompt_len

    @property
    def num_rows(self) -> int:
        """Rows that it needs in the end."""
        return self.prompt_len + self.most_outputs - 1


class _Rollout:
    """See `alisa.engine.engine.Engine`, method by method."""

    def __init__(
        self,
        scheduler: PlacementPolicy,
        limits: Limits,
        reads: Reads,
        prompt_lens: Sequence[int],
        output_len: int,
        max_batch: int | None,
        prefill_chunk: int,
    ) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._reads = reads
        self._prefill_chunk = prefill_chunk
        self._running: list[_Sequence] = []
        self._parked: list[_Sequence] = []
        max_num_seqs = min(max_batch or len(prompt_lens), len(prompt_lens))
        self._free_req_indices = list(range(max_num_seqs - 1, -1, -1))
        levels = len(limits.tiers) + 1
        self._waiting = deque(
            _Sequence(length, output_len, [0] * levels, min(limits.rebuildable, length + output_len - 1))
            for length in prompt_lens
        )
        for sequence in self._waiting:
            if scheduler.plan([fresh_view(sequence.num_rows, limits, reads)], limits) is None:
                raise CapacityError(
                    f"A sequence of {sequence.num_rows} tokens does not fit {limits.total_tokens} tokens of KV memory "
                    "even when it runs alone; allow more memory, or shorten it."
                )

    def steps(self) -> Iterator[StepPlan]:
        """All plans; what each does is taken as done when the next is asked for."""
        step = 0
        while True:
            self._resume()
            self._admit()
            found = self._plan()
            if found is None:
                return
            work, decision = found
            yield StepPlan(step, decision.phase, work.prefill, work.segments, decision.moves)
            step += 1
            self._apply(decision.moves)
            self._advance(work.segments)

    def _plan(self) -> tuple[Work, PlacementDecision] | None:
        while (work := next_work(self._running, self._prefill_chunk)) is not None:
            if len(self._running) > 1 and self._oversubscribed(self._running) and self._park(work):
                continue
            decision = self._decide(self._running, self._parked, work.segments)
            if decision is not None:
                return work, decision
            self._give_way()
        return None

    def _decide(
        self, running: Iterable[_Sequence], parked: Iterable[_Sequence], segments: Iterable[ScheduledChunk]
    ) -> PlacementDecision | None:
        ends = {segment.req_idx: segment.end for segment in segments}
        views = [self._view(s, ends.get(s.req_idx, s.num_cached), active=True) for s in running]
        views += [self._view(s, s.num_cached, active=False) for s in parked]
        return self._scheduler.plan(views, self._limits)

    def _view(self, sequence: _Sequence, length: int, *, active: bool) -> SeqView:
        req_idx, bounds = sequence.req_idx, tuple(sequence.bounds)
        return seq_view(req_idx, sequence.prompt_len, length, bounds, sequence.rebuildable, self._reads, active=active)

    def _oversubscribed(self, running: Iterable[_Sequence]) -> bool:
        views = [self._view(sequence, sequence.num_cached + 1, active=True) for sequence in running]
        return is_oversubscribed(self._scheduler, views, self._limits)

    def _park(self, work: Work) -> bool:
        newest = self._running[-1]
        others = [segment for segment in work.segments if segment.req_idx != newest.req_idx]
        if newest.in_prefill or self._decide(self._running[:-1], [*self._parked, newest], others) is None:
            return False
        self._parked.append(self._running.pop())
        return True

    def _resume(self) -> None:
        while self._parked:
            together = [*self._running, self._parked[0]]
            if len(together) > 1 and self._oversubscribed(together):
                return
            self._running.append(self._parked.pop(0))

    def _admit(self) -> None:
        while not self._parked and self._waiting and self._free_req_indices:
            if not self._has_room(self._waiting[0].prompt_len):
                return
            sequence = self._waiting.popleft()
            sequence.req_idx, sequence.num_cached = self._free_req_indices.pop(), 0
            sequence.bounds = [0] * len(sequence.bounds)
            self._running.append(sequence)

    def _has_room(self, num_tokens: int) -> bool:
        views = [self._view(s, min(s.num_cached + HEADROOM_TOKENS, s.num_rows), active=True) for s in self._running]
        if not views:
            return True
        views += [self._view(s, s.num_cached, active=False) for s in self._parked]
        views.append(fresh_view(num_tokens, self._limits, self._reads))
        fits = self._scheduler.plan(views, self._limits) is not None
        return fits and not is_oversubscribed(self._scheduler, views, self._limits)

    def _give_way(self) -> None:
        assert self._parked or len(self._running) > 1, "a sequence that fits alone has room when it is alone"
        leaving = (self._parked or self._running).pop()
        self._free_req_indices.append(leaving.req_idx)
        self._waiting.appendleft(leaving)

    def _apply(self, moves: Sequence[Move]) -> None:
        by_req_idx = {sequence.req_idx: sequence for sequence in (*self._running, *self._parked)}
        for move in moves:
            lower_bounds(by_req_idx[move.req_idx].bounds, move, self._limits)

    def _advance(self, segments: Sequence[ScheduledChunk]) -> None:
        by_req_idx = {sequence.req_idx: sequence for sequence in self._running}
        for segment in segments:
            sequence = by_req_idx[segment.req_idx]
            sequence.num_cached = segment.end
            if sequence.num_cached == sequence.prompt_len + sequence.num_output:
                sequence.num_output += 1
            if sequence.num_output == sequence.most_outputs:
                self._running.remove(sequence)
                self._free_req_indices.append(sequence.req_idx)


def lower_bounds(bounds: list[int], move: Move, limits: Limits) -> None:
    """Change a sequence's bounds to what they are after one of its moves."""
    media: list[Medium | None] = [Medium.DEVICE, *(tier.medium for tier in limits.tiers), None]
    for level in range(media.index(move.source), media.index(move.target)):
        bounds[level] = max(bounds[level], move.end)

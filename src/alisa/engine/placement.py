"""Who can run together: asks the scheduler, and decides who gives way when it says no.

A sequence that gives way either keeps its rows in a lower tier (it is parked, and fetches what it selects when it is
back) or loses them and reads its prompt again, then feeds its own output once more. Both give the same tokens; which
one is cheaper follows from what moving a row and computing a token have cost so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alisa.cache.base import RowStore
from alisa.engine.requests import Sequence
from alisa.outputs import StepRecord
from alisa.policy.base import SelectionPolicy
from alisa.scheduler.placement.base import (
    Limits,
    PlacementDecision,
    PlacementPolicy,
    SeqView,
    fresh_view,
    is_oversubscribed,
    seq_view,
)
from alisa.scheduler.plan import ScheduledChunk
from alisa.scheduler.scheduler import HEADROOM_TOKENS

_FIRST_GUESS_BYTES_PER_S = 1e9


@dataclass(slots=True)
class Rates:
    """What restoring a sequence costs, learnt from the steps so far."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    moved_bytes: int = 0
    busy_s: float = 0.0

    def learn(self, record: StepRecord) -> None:
        """Take in a step."""
        if record.prefill:
            self.prefill_tokens += record.num_tokens
            self.prefill_s += record.wall_s
        else:
            self.decode_steps += 1
            self.decode_s += record.wall_s
        self.moved_bytes += record.traffic.moved_bytes
        self.busy_s += record.traffic.busy_s

    def recompute_s(self, sequence: Sequence) -> float:
        """Seconds to read its prompt again and feed its output once more."""
        prefill = self.prefill_s / max(self.prefill_tokens, 1) * sequence.prompt_len
        return prefill + self.decode_s / max(self.decode_steps, 1) * len(sequence.output_ids)

    def refetch_s(self, num_bytes: int) -> float:
        """Seconds to move these bytes."""
        known = self.moved_bytes > 0 and self.busy_s > 0
        return num_bytes / (self.moved_bytes / self.busy_s if known else _FIRST_GUESS_BYTES_PER_S)


class Placement:
    """The scheduler, what it has to work with, and how sequences look to it.

    Args:
        scheduler: decides.
        limits: capacities.
        store: knows where rows lie.
        policy: knows how many tokens a step reads.
    """

    def __init__(self, scheduler: PlacementPolicy, limits: Limits, store: RowStore, policy: SelectionPolicy) -> None:
        self.limits = limits
        self.rates = Rates()
        self._scheduler = scheduler
        self._store = store
        self._policy = policy

    def decide(
        self, running: Iterable[Sequence], parked: Iterable[Sequence], segments: Iterable[ScheduledChunk]
    ) -> PlacementDecision | None:
        """Moves for a step of these segments; None when they do not fit together."""
        ends = {segment.req_idx: segment.end for segment in segments}
        views = [self._view(s, ends.get(s.req_idx, s.num_cached), active=True) for s in running]
        views += [self._view(s, s.num_cached, active=False) for s in parked]
        return self._scheduler.plan(views, self.limits)

    def has_room(self, running: Iterable[Sequence], parked: Iterable[Sequence], num_tokens: int) -> bool:
        """Whether one more sequence of `num_tokens` fits for a while without oversubscription."""
        views = [self._view(s, min(s.num_cached + HEADROOM_TOKENS, s.request.num_rows), active=True) for s in running]
        if not views:
            return True
        views += [self._view(s, s.num_cached, active=False) for s in parked]
        views.append(self._fresh(num_tokens))
        return self._scheduler.plan(views, self.limits) is not None and not self._is_oversubscribed(views)

    def is_oversubscribed(self, running: Iterable[Sequence]) -> bool:
        """Whether what the running sequences read in one layer is more than the device holds, and one could wait."""
        if not (self.limits.tiers and self._scheduler.avoids_oversubscription):
            return False
        reads = [1 + sum(self._policy.reads(sequence.num_cached)) for sequence in running]
        return len(reads) > 1 and sum(reads) > self.limits.device_tokens

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a sequence of this final length could run with everything for itself."""
        return self._scheduler.plan([self._fresh(num_tokens)], self.limits) is not None

    def keeps_rows(self, sequence: Sequence) -> bool:
        """Whether fetching its rows back is cheaper than computing them again."""
        num_bytes = sequence.num_cached * self._store.token_bytes
        return self.rates.refetch_s(num_bytes) <= self.rates.recompute_s(sequence)

    def _is_oversubscribed(self, views: Iterable[SeqView]) -> bool:
        return is_oversubscribed(self._scheduler, self.limits, (view.num_read for view in views if view.active))

    def _view(self, sequence: Sequence, length: int, *, active: bool) -> SeqView:
        req_idx, prompt_len = sequence.req_idx, sequence.prompt_len
        bounds, rebuildable = self._store.bounds(req_idx), self._store.rebuildable(req_idx)
        return seq_view(req_idx, prompt_len, length, bounds, rebuildable, self._policy.reads, active=active)

    def _fresh(self, num_tokens: int) -> SeqView:
        """A sequence that has no request index yet."""
        return fresh_view(num_tokens, self.limits, self._policy.reads)

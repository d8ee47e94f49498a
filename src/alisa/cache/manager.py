"""The cache of an engine: one pool while nothing has to move, tiers below it from the first move on.

A flat pool has one slot for a token in all layers and one table look-up a step; with tiers every layer keeps its own
map. Most work fits, so the map is paid for when it is needed. Rows stay where they are: the tiers take the pool over,
and give it back when the last sequence has gone. Only rows that sequences share are copied first: below the pool every
sequence has its own, and a plan that may move rows has counted them so.
"""

from __future__ import annotations

from collections.abc import Callable

from alisa.cache.base import RowStore
from alisa.cache.store import KVStore
from alisa.outputs import Medium
from alisa.scheduler.plan import StepPlan

MakeTiers = Callable[[KVStore], RowStore]
"""A store with lower tiers that has taken over the pool of a flat one, with every sequence in it."""


class CacheManager:
    """Rows of all open sequences.

    Args:
        flat: an empty pool.
        num_tiers: lower tiers that there will be.
        make_tiers: puts them below the pool; None: nothing ever moves.
        starts_tiered: whether rows may have to be rebuilt later, for which their layer inputs are kept from the start.
    """

    def __init__(
        self, flat: KVStore, *, num_tiers: int = 0, make_tiers: MakeTiers | None = None, starts_tiered: bool = False
    ) -> None:
        self.store: RowStore = flat
        """Where the rows are now; another one after a `begin` that moves rows for the first time."""
        self._flat = flat
        self._num_tiers = num_tiers
        self._make_tiers = make_tiers
        self._starts_tiered = starts_tiered
        self._open: set[int] = set()
        if starts_tiered:
            self._add_tiers()

    def open(self, req_idx: int, num_tokens: int) -> None:
        """See `RowStore.open`."""
        self.store.open(req_idx, num_tokens)
        self._open.add(req_idx)

    def release(self, req_idx: int) -> None:
        """See `RowStore.release`."""
        self.store.release(req_idx)
        self._open.discard(req_idx)
        if self.has_tiers and not self._open and not self._starts_tiered:
            self.store.close()
            self._flat.clear()
            self.store = self._flat

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """Where each lower tier ends and what is deleted, see `alisa.scheduler.placement.base`."""
        return self.store.bounds(req_idx) if self.has_tiers else (0,) * (self._num_tiers + 1)

    def rebuildable(self, req_idx: int) -> int:
        """See `RowStore.rebuildable`."""
        return self.store.rebuildable(req_idx)

    def num_shared(self, req_idx: int) -> int:
        """First tokens of the sequence whose rows belong to another one."""
        return 0 if self.has_tiers else self._flat.num_shared(req_idx)

    def begin(self, plan: StepPlan) -> RowStore:
        """The store that has begun this step; see `RowStore.begin`."""
        if plan.moves and not self.has_tiers:
            self._add_tiers()
        self.store.begin(plan)
        return self.store

    def nbytes(self, medium: Medium) -> int:
        """See `RowStore.nbytes`."""
        return self.store.nbytes(medium)

    def close(self) -> None:
        """See `RowStore.close`."""
        self.store.close()

    @property
    def has_tiers(self) -> bool:
        """Whether rows may lie below the pool, so that loading them early is worth choosing them early."""
        return self.store is not self._flat

    def _add_tiers(self) -> None:
        assert self._make_tiers is not None, "nothing moves where there are no tiers"
        self._flat.unshare()
        self.store = self._make_tiers(self._flat)

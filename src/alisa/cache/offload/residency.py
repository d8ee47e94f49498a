"""Which rows are on the device, for each layer: slots, their owners, and who leaves when room is needed.

Every layer selects other tokens, so every layer has its own map. All of it is numpy on the host: a step looks up a few
thousand rows in each layer, and that costs some ten microseconds a layer.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alisa.cache.row_ids import NOWHERE, Ids, RowIds

Eviction = Literal["age", "lru"]
"""Who leaves the hot cache first: the oldest token (ALISA), or the one not read for longest, the default.

Measured on the packaged model and held-out prose (benchmarks/results/eviction.jsonl): under a cap of a quarter `sketch`
fetches 71.9 thousand rows with lru, 81.1 with age, and 89.6 when the row with the least attention mass leaves; under
0.4 it is 36.5, 50.7 and 52.9. `swa` hardly fetches anything with either.
"""

EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)

SLOT_BYTES = 12
"""What the map takes for one slot of one layer: its owner, when it was read, and its place among the free ones."""


class Residency:
    """Maps row ids to slots of each layer's pool.

    Slots are used from 0 upwards, so what belongs to slots that were never used is memory that is never touched.

    Args:
        num_layers: L.
        num_slots: R, slots of each layer.
        row_ids: knows the positions of rows.
        eviction: who leaves first.
    """

    def __init__(self, num_layers: int, num_slots: int, row_ids: RowIds, eviction: Eviction) -> None:
        self._num_slots = num_slots
        self._row_ids = row_ids
        self._eviction: Eviction = eviction
        self.slots = [np.empty(0, np.int32) for _ in range(num_layers)]
        """For each layer Int32[row ids]: where a row is, or NOWHERE."""
        self.safe = np.empty(0, np.bool_)
        """Bool[row ids]: rows that have a complete copy below, or a hidden state: they may leave."""
        shape = (num_layers, num_slots)
        self._owner = np.zeros(shape, np.int32)  # row id of the slot; anything in a free one
        self._used = np.zeros(shape, np.int32)  # clock of the last read; 0: the slot is free
        self._returned = np.empty(shape, np.int32)  # a stack of free slots for each layer
        self._num_returned = [0] * num_layers
        self._first_unused = [0] * num_layers
        self._clock = 1

    @property
    def num_resident(self) -> int:
        """Rows on the device, over all layers."""
        return sum(self._first_unused) - sum(self._num_returned)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps, as far as they are used."""
        return sum(slots.nbytes for slots in self.slots) + self.safe.nbytes + SLOT_BYTES * sum(self._first_unused)

    def reserve(self, capacity: int) -> None:
        """Row ids below `capacity` may be asked for."""
        missing = capacity - len(self.safe)
        if missing > 0:
            self.safe = np.append(self.safe, np.zeros(missing, np.bool_))
            # Layer by layer, so that the old and the new map exist together for one layer only.
            for layer, slots in enumerate(self.slots):
                self.slots[layer] = np.append(slots, np.full(missing, NOWHERE, np.int32))

    def tick(self) -> None:
        """A step begins: what it reads counts as newer than all that was read before."""
        self._clock += 1

    def touch(self, layer: int, slots: NDArray[np.int32], *, ahead: bool = False) -> None:
        """These slots are read in this step (ahead: in the next): until then they stay."""
        self._used[layer, slots] = self._clock + ahead

    def place(
        self, layer: int, ids: Ids, *, ahead: bool = False, at_any_cost: bool = False
    ) -> NDArray[np.int32] | None:
        """Slots Int32[N] for rows that are not on the device; they count as touched.

        Rows that are safe below and are not read in this step or the next make room. None, and nothing has changed, if
        there are not enough of them.

        Args:
            layer: which map.
            ids: Int64[N].
            ahead: they are for the next step.
            at_any_cost: rows that this step will read may have to leave, too; none of them may be on its way.
        """
        missing = len(ids) - self._num_free(layer)
        if missing > 0 and not self._evict(layer, missing, before=self._clock + at_any_cost):
            return None
        taken = self._take(layer, len(ids))
        self.slots[layer][ids] = taken
        self._owner[layer, taken] = ids
        self._used[layer, taken] = self._clock + ahead
        return taken

    def adopt(self, ids: Ids, slots: NDArray[np.int32]) -> None:
        """An empty map takes over rows that lie in the same slots Int32[N] of every layer."""
        end = int(slots.max(initial=-1)) + 1
        free = np.setdiff1d(np.arange(end, dtype=np.int32), slots)[::-1]
        self._owner[:, slots] = ids
        self._used[:, slots] = self._clock
        self._returned[:, : len(free)] = free
        for layer, slots_of in enumerate(self.slots):
            slots_of[ids] = slots
            self._num_returned[layer], self._first_unused[layer] = len(free), end

    def release(self, ids: Ids) -> None:
        """These rows leave the device, and their ids may be given to others."""
        for layer, slots_of in enumerate(self.slots):
            slots = slots_of[ids]
            self._give_back(layer, slots[slots != NOWHERE])
        self.safe[ids] = False

    def any_resident(self, ids: Ids) -> bool:
        """Whether any layer has one of these rows on the device."""
        return any(bool((slots[ids] != NOWHERE).any()) for slots in self.slots)

    def _num_free(self, layer: int) -> int:
        return self._num_slots - self._first_unused[layer] + self._num_returned[layer]

    def _take(self, layer: int, count: int) -> NDArray[np.int32]:
        """Free slots, those that were given back first; there are enough."""
        top = self._num_returned[layer]
        bottom = max(top - count, 0)
        self._num_returned[layer] = bottom
        returned = self._returned[layer, bottom:top]
        if len(returned) == count:
            return returned.copy()
        first = self._first_unused[layer]
        self._first_unused[layer] = end = first + count - len(returned)
        return np.concatenate((returned, np.arange(first, end, dtype=np.int32)))

    def _give_back(self, layer: int, slots: NDArray[np.int32]) -> None:
        self.slots[layer][self._owner[layer, slots]] = NOWHERE
        self._used[layer, slots] = 0
        top = self._num_returned[layer]
        self._returned[layer, top : top + len(slots)] = slots
        self._num_returned[layer] = top + len(slots)

    def _evictable(self, layer: int, before: int) -> NDArray[np.int64]:
        """Slots whose rows are safe below and were last touched before this time."""
        used = self._used[layer]
        idle = np.flatnonzero((used < before) & (used > 0))
        return idle[self.safe[self._owner[layer, idle]]]

    def _evict(self, layer: int, count: int, before: int) -> bool:
        """Free `count` slots, or a few more so that this is not done for every row; False if too few may leave."""
        candidates = self._evictable(layer, before)
        if len(candidates) < count:
            return False
        leaving = min(len(candidates), max(count, self._num_slots // 32))
        if leaving < len(candidates):
            if self._eviction == "age":
                keys = self._row_ids.positions(self._owner[layer, candidates].astype(np.int64))
            else:
                keys = self._used[layer, candidates]
            candidates = candidates[np.argpartition(keys, leaving - 1)[:leaving]]
        self._give_back(layer, candidates.astype(np.int32))
        return True

    def check(self) -> None:
        """Assert that every slot of every layer is free or owned exactly once, and that both maps agree."""
        for layer, slots in enumerate(self.slots):
            free = self._returned[layer, : self._num_returned[layer]]
            owned = np.flatnonzero(self._used[layer])
            first_unused = self._first_unused[layer]
            assert sorted([*free.tolist(), *owned.tolist()]) == list(range(first_unused)), "a slot is lost or doubled"
            assert first_unused <= self._num_slots, "there are more slots than the pool has"
            assert np.array_equal(slots[self._owner[layer, owned]], owned), "the map and the owners differ"
            assert int((slots != NOWHERE).sum()) == len(owned), "a row has two slots"

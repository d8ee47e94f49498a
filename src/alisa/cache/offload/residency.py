"""Which rows are on the device, for each layer: slots, their owners, and who leaves when room is needed.

Every layer selects other tokens, so every layer has its own map. All of it is numpy on the host: a step looks up a few
thousand positions in each layer, and that costs some ten microseconds a layer.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Eviction = Literal["age", "lru"]
"""Who leaves the hot cache first: the oldest token (ALISA), or the one not read for longest, the default.

Measured on the packaged model and held-out prose (benchmarks/results/eviction.jsonl): under a cap of a quarter `sketch`
fetches 71.9 thousand rows with lru, 81.1 with age, and 89.6 when the row with the least attention mass leaves; under
0.4 it is 36.5, 50.7 and 52.9. `swa` hardly fetches anything with either.
"""

EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)

NOWHERE = -1


class Residency:
    """Maps (req_idx, position) to a slot of each layer's pool.

    Args:
        num_layers: L.
        num_slots: R, slots of each layer.
        max_num_seqs: sequences.
        max_length: longest sequence.
        eviction: who leaves first.
    """

    def __init__(self, num_layers: int, num_slots: int, max_num_seqs: int, max_length: int, eviction: Eviction) -> None:
        self._num_slots = num_slots
        self._eviction = eviction
        self.slots = np.full((num_layers, max_num_seqs, max_length), NOWHERE, np.int32)
        """Int32[L, req_indices, max_length]: where a row is, or NOWHERE."""
        # Who has a slot; two arrays, because taking one number apart for every slot costs more than all the rest.
        self._owner = np.full((num_layers, num_slots), NOWHERE, np.int64)
        self._owner_position = np.full((num_layers, num_slots), NOWHERE, np.int64)
        self._used = np.zeros((num_layers, num_slots), np.int64)  # clock of the last read
        self._free = np.tile(np.arange(num_slots - 1, -1, -1, dtype=np.int32), (num_layers, 1))  # a stack per layer
        self._num_free = np.full(num_layers, num_slots, np.int64)
        self._clock = 1
        self.safe = np.zeros(max_num_seqs, np.int64)
        """Int64[req_indices]: rows of positions below this have a complete copy below, or a remnant: they may leave."""

    @property
    def num_resident(self) -> NDArray[np.int64]:
        """Rows on the device, for each layer."""
        return self._num_slots - self._num_free

    def tick(self) -> None:
        """A step begins: what it reads counts as newer than all that was read before."""
        self._clock += 1

    def touch(self, layer: int, slots: NDArray[np.int32], *, ahead: bool = False) -> None:
        """These slots are read in this step (ahead: in the next): until then they stay."""
        self._used[layer, slots] = self._clock + ahead

    def place(
        self,
        layer: int,
        req_indices: NDArray[np.int64],
        positions: NDArray[np.int64],
        *,
        ahead: bool = False,
        at_any_cost: bool = False,
    ) -> NDArray[np.int32] | None:
        """Slots Int32[N] for rows (req_indices, positions) that are not on the device; they count as touched.

        Rows that are safe below and are not read in this step or the next make room. None, and nothing has changed, if
        there are not enough of them.

        Args:
            layer: which map.
            req_indices: Int64[N].
            positions: Int64[N].
            ahead: they are for the next step.
            at_any_cost: rows that this step will read may have to leave, too; none of them may be on its way.
        """
        count = len(positions)
        missing = count - int(self._num_free[layer])
        if missing > 0 and not self._evict(layer, missing, before=self._clock + at_any_cost):
            return None
        top = int(self._num_free[layer])
        taken = self._free[layer, top - count : top].copy()
        self._num_free[layer] = top - count
        self.slots[layer, req_indices, positions] = taken
        self._owner[layer, taken] = req_indices
        self._owner_position[layer, taken] = positions
        self._used[layer, taken] = self._clock + ahead
        return taken

    def drop(self, layer: int, req_indices: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """These rows, as far as they are on the device, leave it."""
        slots = self.slots[layer, req_indices, positions]
        self._give_back(layer, slots[slots != NOWHERE])

    def release(self, req_idx: int, length: int) -> None:
        """All rows of a sequence leave the device."""
        for layer in range(len(self.slots)):
            slots = self.slots[layer, req_idx, :length]
            self._give_back(layer, slots[slots != NOWHERE].copy())
        self.safe[req_idx] = 0

    def _give_back(self, layer: int, slots: NDArray[np.int32]) -> None:
        self.slots[layer, self._owner[layer, slots], self._owner_position[layer, slots]] = NOWHERE
        self._owner[layer, slots] = NOWHERE
        top = int(self._num_free[layer])
        self._free[layer, top : top + len(slots)] = slots
        self._num_free[layer] = top + len(slots)

    def _evictable(self, layer: int, before: int) -> NDArray[np.int64]:
        """Slots whose rows are safe below and were last touched before this time."""
        idle = np.flatnonzero((self._owner[layer] != NOWHERE) & (self._used[layer] < before))
        return idle[self._owner_position[layer, idle] < self.safe[self._owner[layer, idle]]]

    def _evict(self, layer: int, count: int, before: int) -> bool:
        """Free `count` slots, or a few more so that this is not done for every row; False if too few may leave."""
        candidates = self._evictable(layer, before)
        if len(candidates) < count:
            return False
        leaving = min(len(candidates), max(count, self._num_slots // 32))
        if leaving < len(candidates):
            order = self._owner_position if self._eviction == "age" else self._used
            keys = order[layer, candidates]
            candidates = candidates[np.argpartition(keys, leaving - 1)[:leaving]]
        self._give_back(layer, candidates.astype(np.int32))
        return True

    def check(self) -> None:
        """Assert that every slot of every layer is free or owned exactly once, and that both maps agree."""
        for layer in range(len(self.slots)):
            free = self._free[layer, : self._num_free[layer]]
            owned = np.flatnonzero(self._owner[layer] != NOWHERE)
            assert sorted([*free.tolist(), *owned.tolist()]) == list(range(self._num_slots)), (
                "a slot is lost or doubled"
            )
            found = self.slots[layer, self._owner[layer, owned], self._owner_position[layer, owned]]
            assert np.array_equal(found, owned), "the map and the owners differ"
            assert int((self.slots[layer] != NOWHERE).sum()) == len(owned), "a row has two slots"

"""Where rows lie in a lower tier: row id -> slot, the same in all layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from alisa.cache.free_slots import FreeSlots
from alisa.cache.offload.tiers import LowerTier
from alisa.cache.row_ids import NOWHERE, Ids
from alisa.kernels.base import Slots


class SlotTable:
    """The slots of one lower tier.

    Args:
        num_slots: tokens that the tier holds.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = np.empty(0, np.int32)
        """Int32[row ids]: the slot of a row, or NOWHERE."""
        self._free = FreeSlots(num_slots)

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Slots that hold rows."""
        return self._free.num_taken

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.slots.nbytes + self._free.nbytes

    def reserve(self, capacity: int) -> None:
        """Row ids below `capacity` may be asked for."""
        if capacity > len(self.slots):
            self.slots = np.append(self.slots, np.full(capacity - len(self.slots), NOWHERE, np.int32))

    def find(self, ids: Ids) -> Slots:
        """Slots of these rows, or NOWHERE; Int64, in the shape of `ids`."""
        return self.slots.take(ids).astype(np.int64)

    def take(self, ids: Ids) -> Slots:
        """New slots Int64[N] for these rows, at most `num_free`; neighbours as long as there are any."""
        self.slots[ids] = taken = self._free.take(len(ids))
        return taken.astype(np.int64)

    def give_back(self, ids: Ids) -> None:
        """The slots of these rows are free again; rows without one are passed over."""
        slots = self.slots[ids]
        self._free.give_back(np.sort(slots[slots != NOWHERE])[::-1].tolist())
        self.slots[ids] = NOWHERE

    def check(self) -> None:
        """Assert that every slot is free or taken once."""
        self._free.check(self.slots[self.slots != NOWHERE].tolist())


class Level(NamedTuple):
    """A lower tier and who lies where in it."""

    tier: LowerTier
    table: SlotTable

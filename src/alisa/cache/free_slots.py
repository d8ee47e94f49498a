"""Which slots of a pool are free, without a list of all of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class FreeSlots:
    """Hands out the slots [0, num_slots) of a pool, the lowest unused ones last.

    Slots that were never taken are a range, so a pool that is large and little used costs nothing.

    Args:
        num_slots: how many there are.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._returned = array("i")  # a stack
        self._first_unused = 0

    def __len__(self) -> int:
        return self.num_slots - self._first_unused + len(self._returned)

    @property
    def num_taken(self) -> int:
        """Slots that somebody has."""
        return self._first_unused - len(self._returned)

    @property
    def nbytes(self) -> int:
        """Bytes of the list of slots that were given back."""
        return self._returned.itemsize * len(self._returned)

    def take(self, count: int) -> NDArray[np.int32]:
        """The caller has these slots Int32[count]; the ones that were given back last come first."""
        assert count <= len(self), f"{count} slots of {len(self)} free ones"
        split = max(len(self._returned) - count, 0)
        taken = self._returned[split:]
        del self._returned[split:]
        taken.reverse()
        first = self._first_unused
        self._first_unused += count - len(taken)
        taken.extend(range(first, self._first_unused))
        return np.array(taken, np.int32)

    def give_back(self, slots: Iterable[int]) -> None:
        """These slots are free again; `take` will give the last of them first."""
        self._returned.extend(slots)

    def check(self, taken: Iterable[int]) -> None:
        """Assert that every slot is free or among `taken`, once."""
        used = sorted([*taken, *self._returned])
        assert used == list(range(self._first_unused)), "a slot is lost or owned twice"
        assert self._first_unused <= self.num_slots, "there are more slots than the pool has"

"""Rows in the device's memory, as transfers see them: something that a tier can be read into and written from.

A device that is main memory takes rows straight from a file or array. A GPU's memory is out of reach of both: rows pass
through a pinned buffer and a stream of their own, in the thread that moves them. Before it touches a row, that stream
waits for what the model had been told to do when the transfer was started; nothing ever waits for the whole device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from alisa.cache.offload.tiers import Bytes, Places
from alisa.cache.offload.transfer import CopyStream, Fence

Read = Callable[[Bytes, Places], None]
"""Fills rows of an array (a tier's `read`, told what to read)."""
Write = Callable[[Bytes, Places], None]
"""Takes rows of an array."""


class Shelf(Protocol):
    """Rows UInt8[N, row_bytes] in device memory; `receive` and `give` are called by transfer threads."""

    @property
    def rows(self) -> Tensor:
        """All of them, for a kernel."""
        ...

    def fence(self) -> Fence | None:
        """The present point in the model's work; taken by the thread that runs the model."""
        ...

    def receive(self, read: Read, places: Places, fence: Fence | None) -> None:
        """`read` has filled these rows, after `fence`; they are there when this returns."""
        ...

    def give(self, write: Write, places: Places, fence: Fence | None) -> None:
        """`write` has taken these rows as they were at `fence`."""
        ...

    def put(self, places: Places, rows: Tensor) -> None:
        """These rows are written, in the order of the model's work."""
        ...


class HostShelf:
    """Rows in main memory, moved in place."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._array: Bytes = rows.numpy()

    def fence(self) -> None:
        """The model's work is done when its call returns."""
        return

    def receive(self, read: Read, places: Places, fence: Fence | None) -> None:
        """See `Shelf.receive`."""
        read(self._array, places)

    def give(self, write: Write, places: Places, fence: Fence | None) -> None:
        """See `Shelf.give`."""
        write(self._array, places)

    def put(self, places: Places, rows: Tensor) -> None:
        """See `Shelf.put`."""
        self._array[places] = rows.numpy()


class DeviceShelf:
    """Rows that only copies reach, such as a GPU's."""

    def __init__(self, rows: Tensor, stream: CopyStream) -> None:
        self.rows = rows
        self._stream = stream

    def fence(self) -> Fence | None:
        """See `Shelf.fence`."""
        return self._stream.fence()

    def receive(self, read: Read, places: Places, fence: Fence | None) -> None:
        """See `Shelf.receive`."""
        buffer = self._buffer(len(places))
        read(buffer.numpy(), np.arange(len(places)))
        index = self._index(places)

        def copy() -> None:
            self.rows.index_copy_(0, index, buffer.to(self.rows.device, non_blocking=True))

        self._stream.run(copy, fence)

    def give(self, write: Write, places: Places, fence: Fence | None) -> None:
        """See `Shelf.give`."""
        buffer, index = self._buffer(len(places)), self._index(places)

        def copy() -> None:
            buffer.copy_(self.rows.index_select(0, index), non_blocking=True)

        self._stream.run(copy, fence)
        write(buffer.numpy(), np.arange(len(places)))

    def put(self, places: Places, rows: Tensor) -> None:
        """See `Shelf.put`."""
        self.rows.index_copy_(0, self._index(places), rows.to(self.rows.device))

    def _buffer(self, count: int) -> Tensor:
        return torch.empty(count, self.rows.shape[1], dtype=torch.uint8, pin_memory=self.rows.device.type == "cuda")

    def _index(self, places: Places) -> Tensor:
        return torch.from_numpy(places.astype(np.int64)).to(self.rows.device)


def shelves(rows: Tensor) -> tuple[Shelf, ...]:
    """One shelf for each of the first dimension's `[.., N, row_bytes]`."""
    if rows.device.type == "cpu":
        return tuple(HostShelf(part) for part in rows)
    stream = CopyStream(rows.device)
    return tuple(DeviceShelf(part, stream) for part in rows)

"""Pools below the device: rows of bytes by (layer, slot), in host memory or in a file.

Both take and give many rows at once, from and to any rows of a numpy array; they know nothing of sequences. Calls may
come from several threads as long as no two write the same row.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alisa.config import format_bytes
from alisa.errors import CapacityError, InputError
from alisa.kernels.base import Bytes, MoveRows, Slots
from alisa.kernels.reference.rows import move_rows
from alisa.outputs import Medium

Places = NDArray[np.int64] | NDArray[np.int32]
"""Rows of an array in memory."""


class LowerTier(Protocol):
    """Rows `[L, R, row_bytes]` of one medium."""

    @property
    def medium(self) -> Medium:
        """What it is."""
        ...

    @property
    def num_rows(self) -> int:
        """R, tokens that it holds."""
        ...

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: Places) -> None:
        """Rows `slots` of a layer stand in `target[target_rows]` (UInt8[N, row_bytes]).

        Raises:
            OSError: the medium failed or holds less than was written; the target's content is undefined.
        """
        ...

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: Places) -> None:
        """`source[source_rows]` stand at rows `slots` of a layer.

        Raises:
            OSError: the medium failed; the content of these rows is undefined.
        """
        ...

    def close(self) -> None:
        """The memory or file is given back."""
        ...


class HostTier:
    """Rows in main memory, for a device that has memory of its own."""

    medium = Medium.HOST

    def __init__(self, num_layers: int, num_rows: int, row_bytes: int) -> None:
        self.num_rows = num_rows
        self._rows = np.empty((num_layers, num_rows, row_bytes), np.uint8)

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: Places) -> None:
        """See `LowerTier.read`."""
        target[target_rows] = self._rows[layer, slots]

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: Places) -> None:
        """See `LowerTier.write`."""
        self._rows[layer, slots] = source[source_rows]

    def close(self) -> None:
        """Forget the rows."""
        self._rows = np.empty((0, 0, 0), np.uint8)


class DiskTier:
    """Rows in a file that nobody else sees and that cannot outlive the process.

    The file has no name: it is unlinked as soon as it is open, so the system frees it when the process ends, however it
    ends, and at the latest when nobody refers to the tier any more: a run may be given up before it begins. Its whole
    size is claimed at once: a disk that is too small is found out before work starts. Reads and writes go through the
    system's page cache, which keeps rows in memory that nobody else needs and gives it up first.

    Args:
        directory: where the file lies; its file system is the disk that is used.
        num_layers: L.
        num_rows: R.
        row_bytes: bytes of one row.
        move: does the work.

    Raises:
        InputError: the directory cannot hold files.
        CapacityError: the disk has not enough room.
    """

    medium = Medium.DISK

    def __init__(
        self, directory: Path, num_layers: int, num_rows: int, row_bytes: int, move: MoveRows = move_rows
    ) -> None:
        self.num_rows = num_rows
        self._row_bytes = row_bytes
        self._move = move
        self._size = size = num_layers * num_rows * row_bytes
        try:
            with tempfile.NamedTemporaryFile(prefix="alisa-kv-", dir=directory, delete=True) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise InputError(f"{directory} cannot hold the disk tier: {error.strerror}; use --kv-disk-path.") from error
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            if size:  # with many deleted rows, the disk may be for remnants alone
                os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            self.close()
            free = format_bytes(_free_bytes(directory))
            raise CapacityError(
                f"The disk tier needs {format_bytes(size)} in {directory} and {free} are free ({error.strerror}); "
                "lower --kv-disk-memory or use --kv-disk-path."
            ) from error

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: Places) -> None:
        """See `LowerTier.read`."""
        self._run(layer, slots, target, target_rows, write=False)

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: Places) -> None:
        """See `LowerTier.write`."""
        # A write behind the end of a file that somebody cut short would make it long again, and lost rows read as 0.
        size = os.fstat(self._file).st_size
        if size != self._size:
            raise OSError(0, f"the tier file was cut to {size} of {self._size} bytes")
        self._run(layer, slots, source, source_rows, write=True)

    def _run(self, layer: int, slots: Slots, memory: Bytes, rows: Places, *, write: bool) -> None:
        order = np.argsort(slots, kind="stable")
        offsets = (layer * self.num_rows + slots[order]) * self._row_bytes
        moved = self._move(self._file, offsets, memory, rows[order].astype(np.int64), write=write)
        wanted = len(slots) * self._row_bytes
        if moved != wanted:
            raise OSError(0, f"the tier file {'took' if write else 'gave'} {moved} of {wanted} bytes")

    def close(self) -> None:
        """The file is gone."""
        self._close()


def _free_bytes(directory: Path) -> int:
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize

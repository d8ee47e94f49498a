"""Pools below the device: rows of bytes by (layer, slot), in host memory or in a file.

Both take and give many rows at once, from and to any rows of a numpy array; they know nothing of sequences. Calls may
come from several threads as long as no two write the same row.
"""

from __future__ import annotations

import os
import tempfile
import threading
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

RowIndices = NDArray[np.int64] | NDArray[np.int32]
"""Rows of an array in memory."""

_STEP_BYTES = 1 << 25
"""What a file grows by: 32 MiB are claimed in no time, and hold thousands of rows that are read as one."""


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

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: RowIndices) -> None:
        """Rows `slots` of a layer have been copied to `target[target_rows]` (UInt8[N, row_bytes]).

        Raises:
            OSError: the medium failed or holds less than was written; the target's content is undefined.
        """
        ...

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: RowIndices) -> None:
        """`source[source_rows]` are stored in rows `slots` of a layer.

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

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: RowIndices) -> None:
        """See `LowerTier.read`."""
        target[target_rows] = self._rows[layer, slots]

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: RowIndices) -> None:
        """See `LowerTier.write`."""
        self._rows[layer, slots] = source[source_rows]

    def close(self) -> None:
        """Forget the rows."""
        self._rows = np.empty((0, 0, 0), np.uint8)


class DiskTier:
    """Rows in a file that nobody else sees and that cannot outlive the process.

    The file has no name: it is unlinked as soon as it is open, so the system frees it when the process ends, however it
    ends, and at the latest when nobody refers to the tier any more: a run may be given up before it begins. Reads and
    writes go through the system's page cache, which keeps rows in memory that nobody else needs and gives it up first.

    The file grows with its use, by one step after the other: a step holds the next slots of all layers, layer by layer.
    A step is claimed from the disk before anything is written to it, so that rows are never lost to a disk that others
    have filled; whoever writes then gets an OSError, and all that was written before stays readable.

    Args:
        directory: where the file lies; its file system is the disk that is used.
        num_layers: L.
        num_rows: R.
        row_bytes: bytes of one row.
        move: does the work.
        step_bytes: what the file grows by, at least one slot of all layers.

    Raises:
        InputError: the directory cannot hold files.
        CapacityError: the disk has not enough room for all rows.
    """

    medium = Medium.DISK

    def __init__(
        self,
        directory: Path,
        num_layers: int,
        num_rows: int,
        row_bytes: int,
        move: MoveRows = move_rows,
        step_bytes: int = _STEP_BYTES,
    ) -> None:
        self.num_rows = num_rows
        self._num_layers = num_layers
        self._row_bytes = row_bytes
        self._move = move
        self._step_rows = max(1, min(num_rows, step_bytes // (num_layers * row_bytes)))
        self._lock = threading.Lock()  # of the two that follow
        self._num_steps = 0
        self._size = 0
        try:
            with tempfile.NamedTemporaryFile(prefix="alisa-kv-", dir=directory, delete=True) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise InputError(f"{directory} cannot hold the disk tier: {error.strerror}; use --kv-disk-path.") from error
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            require_disk(directory, num_layers * num_rows * row_bytes)
        except CapacityError:
            self.close()
            raise

    def read(self, layer: int, slots: Slots, target: Bytes, target_rows: RowIndices) -> None:
        """See `LowerTier.read`."""
        self._run(layer, slots, target, target_rows, write=False)

    def write(self, layer: int, slots: Slots, source: Bytes, source_rows: RowIndices) -> None:
        """See `LowerTier.write`."""
        self._claim(int(slots.max(initial=-1)) // self._step_rows + 1)
        self._run(layer, slots, source, source_rows, write=True)

    def close(self) -> None:
        """The file is gone."""
        self._close()

    def _claim(self, num_steps: int) -> None:
        """The file has at least `num_steps` steps, and the disk has room for them."""
        with self._lock:
            # A write after the end of a file that somebody cut short would make it long again, and lost rows would be
            # read as zeros.
            size = os.fstat(self._file).st_size
            if size != self._size:
                raise OSError(0, f"the tier file was cut to {size} of {self._size} bytes")
            if num_steps > self._num_steps:
                rows = min(num_steps * self._step_rows, self.num_rows)
                claimed = rows * self._num_layers * self._row_bytes
                os.posix_fallocate(self._file, size, claimed - size)
                self._num_steps, self._size = num_steps, claimed

    def _run(self, layer: int, slots: Slots, memory: Bytes, rows: RowIndices, *, write: bool) -> None:
        order = np.argsort(slots, kind="stable")
        moved = self._move(
            self._file, self._offsets(layer, slots[order]), memory, rows[order].astype(np.int64), write=write
        )
        wanted = len(slots) * self._row_bytes
        if moved != wanted:
            raise OSError(0, f"the tier file {'took' if write else 'gave'} {moved} of {wanted} bytes")

    def _offsets(self, layer: int, slots: Slots) -> Slots:
        """Where rows lie in the file; ascending slots have ascending offsets."""
        step = slots // self._step_rows
        # The last step is as long as the slots that are left.
        rows_of_step = np.minimum(self._step_rows, self.num_rows - step * self._step_rows)
        rows_before = step * self._step_rows * self._num_layers + layer * rows_of_step
        return (rows_before + slots % self._step_rows) * self._row_bytes


def require_disk(directory: Path, num_bytes: int) -> None:
    """The disk has room for that now; others may take it before it is used.

    Raises:
        CapacityError: it has not.
    """
    free = _free_bytes(directory)
    if num_bytes > free:
        raise CapacityError(
            f"The disk tier needs {format_bytes(num_bytes)} in {directory} and {format_bytes(free)} are free; "
            "lower --kv-disk-memory or use --kv-disk-path."
        )


def _free_bytes(directory: Path) -> int:
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize

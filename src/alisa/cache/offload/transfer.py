"""Rows on their way between the device and lower tiers: threads, handles, and device memory as transfers see it.

Whoever starts a transfer gets a `TransferHandle`; nothing is waited for until somebody needs the rows. What a transfer
cost in its own thread and what the model waited are both counted, so that a report can say which share was hidden.

A device that is main memory takes rows straight from a file or array. A GPU's memory is out of reach of both: rows pass
through a pinned buffer and a stream of their own, in the thread that moves them. Before it touches a row, that stream
waits for what the model had been told to do when the transfer was started; nothing ever waits for the whole device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.offload.tiers import RowIndices
from alisa.kernels.base import Bytes

Owners = NDArray[np.int64]
"""The request index of each row of a transfer."""
RowSubset = slice | NDArray[np.int64]
"""Which of the rows of a transfer: all, or those of one request index."""

JOB_ROWS = 64
"""Rows that one thread fetches in one go; more are shared among threads."""

NUM_THREADS = 8
"""Requests in flight. A disk wants more than one (8 KiB reads, uncached: one thread 0.10 GB/s, 16 threads 0.36, 32
threads 0.46; cached: one thread 1.6, two 2.6, four 3.0 on two cores), and idle threads cost nothing."""


@dataclass(slots=True)
class TransferHandle:
    """Transfers under way."""

    jobs: list[Future[tuple[float, dict[int, str]]]] = field(default_factory=list)
    """Each gives the seconds it took, and the request indices whose rows it lost, and why."""
    owners: list[Owners] = field(default_factory=list)
    """Whose rows are on their way."""
    finish: Callable[[], None] | None = None
    """What is left to do in the waiting thread when the bytes are there."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(job.done() for job in self.jobs)

    def concerns(self, req_idx: int) -> bool:
        """Whether rows of this request index are on their way."""
        return any(bool((owners == req_idx).any()) for owners in self.owners)

    def add(self, other: TransferHandle) -> None:
        """Whoever waits for this handle waits for the other's transfers, too; the other has nothing left to do."""
        assert other.finish is None, "what is left to do would be lost"
        self.jobs += other.jobs
        self.owners += other.owners


class Transfers:
    """A pool of threads that moves rows, and the account of what it did.

    Args:
        overlap: whether the model's thread goes on meanwhile; False, to see what that is worth: `start` waits.
    """

    def __init__(self, *, overlap: bool = True) -> None:
        self._overlap = overlap
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="alisa-kv")
        self.wait_s = 0.0
        self.busy_s = 0.0
        self._failed: dict[int, str] = {}

    def start(self, work: Callable[[RowSubset], None], owners: Owners) -> TransferHandle:
        """`work(subset)` moves some of its rows, in a thread; row i belongs to request index `owners[i]`, Int64[N].

        When it raises OSError it is called once more for each request index, so that the rows of one do not cost the
        others theirs: request indices for which it raises again have failed.
        """

        def timed() -> tuple[float, dict[int, str]]:
            started = perf_counter()
            failed = _lost(work, owners)
            return perf_counter() - started, failed

        submitted = perf_counter()
        handle = TransferHandle([self._pool.submit(timed)], [owners])
        if not self._overlap:
            self._wait(handle, submitted)
        return handle

    def wait(self, handle: TransferHandle) -> None:
        """The handle's rows are there, or their request indices are among the failed."""
        self._wait(handle, perf_counter())

    def _wait(self, handle: TransferHandle, started: float) -> None:
        for job in handle.jobs:
            seconds, failed = job.result()
            self.busy_s += seconds
            self._failed |= failed
        handle.jobs.clear()
        self.wait_s += perf_counter() - started
        if handle.finish is not None:
            finish, handle.finish = handle.finish, None
            finish()

    def take_failed(self) -> dict[int, str]:
        """Request indices whose rows were lost on the way since the last call, and why."""
        failed = dict(self._failed)
        self._failed.clear()
        return failed

    def forgive(self, req_idx: int) -> None:
        """Whoever had this request index is gone; the next owner has lost nothing."""
        self._failed.pop(req_idx, None)

    def close(self) -> None:
        """No thread is left."""
        self._pool.shutdown(cancel_futures=True)


def _lost(work: Callable[[RowSubset], None], owners: Owners) -> dict[int, str]:
    """Do the work; for which request indices it could not be done, and why."""
    try:
        work(slice(None))
        return {}
    except OSError as error:
        req_indices = np.unique(owners).tolist()
        if len(req_indices) == 1:
            return {req_indices[0]: _reason(error)}
    lost: dict[int, str] = {}
    for req_idx in req_indices:
        try:
            work(np.flatnonzero(owners == req_idx))
        except OSError as error:
            lost[req_idx] = _reason(error)
    return lost


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# --- device memory ---------------------------------------------------------------------------------------------------

Fence = torch.cuda.Event
"""A point in the model's work on a GPU."""


class CopyStream:
    """The stream that copies run on, at the same time as the model's; on a device without streams, copies just run."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fence(self) -> Fence | None:
        """The present point in the work of this thread's current stream."""
        if self._stream is None:
            return None
        event = Fence()
        event.record()
        return event

    def run(self, copy: Callable[[], None], fence: Fence | None) -> None:
        """`copy` has run after `fence`, and is complete."""
        if self._stream is None:
            copy()
            return
        if fence is not None:
            fence.wait(self._stream)
        with torch.cuda.stream(self._stream):
            copy()
            done = Fence()
            done.record()
        done.synchronize()


Read = Callable[[Bytes, RowIndices], None]
"""Fills rows of an array (a tier's `read`, told what to read)."""
Write = Callable[[Bytes, RowIndices], None]
"""Takes rows of an array."""


class TransferBuffer(Protocol):
    """Rows UInt8[N, row_bytes] in device memory; `receive` and `give` are called by transfer threads."""

    @property
    def rows(self) -> Tensor:
        """All of them, for a kernel."""
        ...

    def fence(self) -> Fence | None:
        """The present point in the model's work; taken by the thread that runs the model."""
        ...

    def receive(self, read: Read, indices: RowIndices, fence: Fence | None) -> None:
        """`read` has filled these rows, after `fence`; they are there when this returns."""
        ...

    def give(self, write: Write, indices: RowIndices, fence: Fence | None) -> None:
        """`write` has taken these rows as they were at `fence`."""
        ...

    def put(self, indices: RowIndices, rows: Tensor) -> None:
        """These rows are written, in the order of the model's work."""
        ...


class HostBuffer:
    """Rows in main memory, moved in place."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._array: Bytes = rows.numpy()

    def fence(self) -> None:
        """The model's work is done when its call returns."""
        return

    def receive(self, read: Read, indices: RowIndices, fence: Fence | None) -> None:
        """See `TransferBuffer.receive`."""
        read(self._array, indices)

    def give(self, write: Write, indices: RowIndices, fence: Fence | None) -> None:
        """See `TransferBuffer.give`."""
        write(self._array, indices)

    def put(self, indices: RowIndices, rows: Tensor) -> None:
        """See `TransferBuffer.put`."""
        self._array[indices] = rows.numpy()


class DeviceBuffer:
    """Rows that only copies reach, such as a GPU's."""

    def __init__(self, rows: Tensor, stream: CopyStream) -> None:
        self.rows = rows
        self._stream = stream

    def fence(self) -> Fence | None:
        """See `TransferBuffer.fence`."""
        return self._stream.fence()

    def receive(self, read: Read, indices: RowIndices, fence: Fence | None) -> None:
        """See `TransferBuffer.receive`."""
        buffer = self._pinned(len(indices))
        read(buffer.numpy(), np.arange(len(indices)))
        index = self._index(indices)

        def copy() -> None:
            self.rows.index_copy_(0, index, buffer.to(self.rows.device, non_blocking=True))

        self._stream.run(copy, fence)

    def give(self, write: Write, indices: RowIndices, fence: Fence | None) -> None:
        """See `TransferBuffer.give`."""
        buffer, index = self._pinned(len(indices)), self._index(indices)

        def copy() -> None:
            buffer.copy_(self.rows.index_select(0, index), non_blocking=True)

        self._stream.run(copy, fence)
        write(buffer.numpy(), np.arange(len(indices)))

    def put(self, indices: RowIndices, rows: Tensor) -> None:
        """See `TransferBuffer.put`."""
        self.rows.index_copy_(0, self._index(indices), rows.to(self.rows.device))

    def _pinned(self, count: int) -> Tensor:
        return torch.empty(count, self.rows.shape[1], dtype=torch.uint8, pin_memory=self.rows.device.type == "cuda")

    def _index(self, indices: RowIndices) -> Tensor:
        return torch.from_numpy(indices.astype(np.int64)).to(self.rows.device)


def transfer_buffers(rows: Tensor) -> tuple[TransferBuffer, ...]:
    """One buffer for each of the first dimension's `[.., N, row_bytes]`."""
    if rows.device.type == "cpu":
        return tuple(HostBuffer(each) for each in rows)
    stream = CopyStream(rows.device)
    return tuple(DeviceBuffer(each, stream) for each in rows)

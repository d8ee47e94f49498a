"""Rows on their way between the device and lower tiers: threads that move them, and tickets to wait for.

Whoever starts a transfer gets a `Ticket`; nothing is waited for until somebody needs the rows. What a transfer cost in
its own thread and what the model waited are both counted, so that a report can say which share was hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

ReqIndices = NDArray[np.int64]
Some = slice | NDArray[np.int64]
"""Which of the rows of a transfer: all, or those of one request index."""

NUM_THREADS = 8
"""Requests in flight. A disk wants more than one (8 KiB reads, uncached: one thread 0.10 GB/s, 16 threads 0.36, 32
threads 0.46; cached: one thread 1.6, two 2.6, four 3.0 on two cores), and idle threads cost nothing."""


Fence = torch.cuda.Event
"""A point in the model's work on a GPU."""


class CopyStream:
    """The stream that copies run on, beside the model's; on a device without streams, copies just run."""

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
        """`copy` has run behind `fence`, and is complete."""
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


@dataclass(slots=True)
class Ticket:
    """Transfers under way."""

    jobs: list[Future[tuple[float, dict[int, str]]]] = field(default_factory=list)
    """Each gives the seconds it took, and the req_indices whose rows it lost, and why."""
    finish: Callable[[], None] | None = None
    """What is left to do in the waiting thread when the bytes are there."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(job.done() for job in self.jobs)


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

    def start(self, work: Callable[[Some], None], req_indices: ReqIndices) -> Ticket:
        """`work(some)` moves some of its rows, in a thread; row i is of req_idx `req_indices[i]`, Int64[N].

        When it raises OSError it is called once more for each request index, so that one request index's rows do not
        cost the others
        theirs: req_indices for which it raises again have failed.
        """

        def timed() -> tuple[float, dict[int, str]]:
            started = perf_counter()
            failed = _lost(work, req_indices)
            return perf_counter() - started, failed

        ticket = Ticket([self._pool.submit(timed)])
        if not self._overlap:
            self.wait(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """The ticket's rows are there, or their req_indices are among the failed."""
        started = perf_counter()
        for job in ticket.jobs:
            seconds, failed = job.result()
            self.busy_s += seconds
            self._failed |= failed
        ticket.jobs.clear()
        self.wait_s += perf_counter() - started
        if ticket.finish is not None:
            finish, ticket.finish = ticket.finish, None
            finish()

    def take_failed(self) -> dict[int, str]:
        """ReqIndices whose rows were lost on the way since the last call, and why."""
        failed = dict(self._failed)
        self._failed.clear()
        return failed

    def forgive(self, req_idx: int) -> None:
        """Whoever had this request index is gone; the next owner has lost nothing."""
        self._failed.pop(req_idx, None)

    def close(self) -> None:
        """No thread is left."""
        self._pool.shutdown(cancel_futures=True)


def _lost(work: Callable[[Some], None], req_indices: ReqIndices) -> dict[int, str]:
    """Do the work; for which req_indices it could not be done, and why."""
    try:
        work(slice(None))
        return {}
    except OSError as error:
        owners = np.unique(req_indices).tolist()
        if len(owners) == 1:
            return {owners[0]: _reason(error)}
    lost: dict[int, str] = {}
    for req_idx in owners:
        try:
            work(np.flatnonzero(req_indices == req_idx))
        except OSError as error:
            lost[req_idx] = _reason(error)
    return lost


def _reason(error: OSError) -> str:
    return error.strerror or str(error)

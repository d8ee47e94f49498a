"""Rows on their way between the device and lower tiers: threads that move them, and tickets to wait for.

Whoever starts a transfer gets a `Ticket`; nothing is waited for until somebody needs the rows. What a transfer cost in
its own thread and what the model waited are both counted, so that a report can say which share was hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

import torch

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
    """Transfers under way for some lanes."""

    jobs: list[tuple[Future[float], tuple[int, ...]]] = field(default_factory=list)
    """Each gives the seconds it took, and belongs to these lanes."""
    finish: Callable[[], None] | None = None
    """What is left to do in the waiting thread when the bytes are there."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(future.done() for future, _ in self.jobs)


class Transfers:
    """A pool of threads that moves rows, and the account of what it did."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="alisa-kv")
        self.wait_s = 0.0
        self.busy_s = 0.0
        self._failed: dict[int, str] = {}

    def start(self, work: Callable[[], None], lanes: Sequence[int]) -> Ticket:
        """`work` runs in a thread; it may raise OSError, which makes its lanes fail."""

        def timed() -> float:
            started = perf_counter()
            work()
            return perf_counter() - started

        return Ticket([(self._pool.submit(timed), tuple(lanes))])

    def wait(self, ticket: Ticket) -> None:
        """The ticket's rows are there, or its lanes are among the failed."""
        started = perf_counter()
        for future, lanes in ticket.jobs:
            try:
                self.busy_s += future.result()
            except OSError as error:
                self._failed |= dict.fromkeys(lanes, error.strerror or str(error))
        ticket.jobs.clear()
        self.wait_s += perf_counter() - started
        if ticket.finish is not None:
            finish, ticket.finish = ticket.finish, None
            finish()

    def take_failed(self) -> dict[int, str]:
        """Lanes whose rows were lost on the way since the last call, and why."""
        failed = dict(self._failed)
        self._failed.clear()
        return failed

    def forgive(self, lane: int) -> None:
        """Whoever had this lane is gone; the next owner has lost nothing."""
        self._failed.pop(lane, None)

    def close(self) -> None:
        """No thread is left."""
        self._pool.shutdown(cancel_futures=True)

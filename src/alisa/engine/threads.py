"""How many threads a step runs on: as many as find a processor, and no more.

An OpenMP thread that waits for the others at the end of a loop spins. When another program has the processor of one of
them, all wait, and a step of a small model becomes fifty times as long as it was. So between steps this asks the kernel
how long our thread was ready to run and did not run; when that is much, fewer threads run the next step, and more
again once others leave room. Results do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from math import floor
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

from alisa.machine import num_cpus, other_cpu_seconds

T = TypeVar("T")

WINDOW_S = 0.1
"""Time of our thread, running or waiting, after which a decision is taken: ten ticks of the system's accounts."""

WAITED_SHARE = 0.15
"""Share of its time that a thread may wait for a processor before there are too many threads."""

QUIET_SHARE = 0.05
"""Share below which there may be room for another one."""

FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 16.0
"""How long fewer threads stay at least. It doubles when all were too many again soon after, so that trying is cheap."""

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True, slots=True)
class Waited:
    """What the kernel says about one thread since it was started."""

    ran_s: float
    waited_s: float
    """Ready to run, without a processor."""


class ThreadClock:
    """The account of the thread that asks."""

    def __init__(self, path: Path = _SCHEDSTAT) -> None:
        self._path = path
        self._thread = 0
        self._file: int | None = None

    def read(self) -> Waited | None:
        """How long the calling thread ran and waited; None where the system does not say."""
        if self._thread != threading.get_native_id():
            self.close()
            self._thread = threading.get_native_id()
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
        if self._file is None:
            return None
        ran, waited = os.pread(self._file, 100, 0).split()[:2]
        return Waited(int(ran) * 1e-9, int(waited) * 1e-9)

    def close(self) -> None:
        """The file is closed."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


class ThreadGovernor:
    """Chooses the number of threads before each step, and remembers it from one run to the next.

    Args:
        most: threads when there is room.
        processors: of the machine.
        follows: whether the number follows the load at all.
        clock: the account of the thread that steps.
        others: processor seconds that all other processes have used.
        now: seconds.
        get_threads: how many a step would run on.
        set_threads: makes the next step run on this many.
    """

    def __init__(
        self,
        most: int,
        processors: float,
        *,
        follows: bool = True,
        clock: ThreadClock | None = None,
        others: Callable[[], float] = other_cpu_seconds,
        now: Callable[[], float] = perf_counter,
        get_threads: Callable[[], int] = torch.get_num_threads,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.most = most
        self.num_threads = most
        self._processors = processors
        self._clock = clock or ThreadClock()
        self._others = others
        self._now = now
        self._follows = follows
        self._get_threads = get_threads
        self._set_threads = set_threads
        self._in_force = False
        self._pause_s = FIRST_PAUSE_S
        self._changed_s = now()
        self._before: Waited | None = None
        self._before_others = (self._changed_s, 0.0)

    def before_step(self) -> None:
        """The next step runs on the number of threads that the last ones suggest; takes 2 microseconds."""
        if not self._follows:
            return
        if not self._in_force:
            self._take_up()
        if self.most == 1 or (waited := self._clock.read()) is None:
            return
        if self._before is None or waited.ran_s < self._before.ran_s:  # the first step, or another thread steps now
            self._begin(waited)
            return
        ran_s, waited_s = waited.ran_s - self._before.ran_s, waited.waited_s - self._before.waited_s
        if ran_s + waited_s < WINDOW_S:
            return
        since_s, others_s = self._before_others
        self._begin(waited)
        now_s, now_others_s = self._before_others
        free = self._processors - (now_others_s - others_s) / max(now_s - since_s, 1e-9)
        self._decide(waited_s / (ran_s + waited_s), free)

    def restore(self) -> None:
        """All threads are there for others who use torch in this process."""
        if self._in_force and self.num_threads != self.most:
            self._set_threads(self.most)
        self._in_force = False
        self._before = None
        self._clock.close()

    def _take_up(self) -> None:
        """What the last run found holds, unless the user has asked for another number of threads since."""
        asked = self._get_threads()
        if asked != self.most:
            self.most = self.num_threads = asked
        elif self.num_threads != asked:
            self._set_threads(self.num_threads)
        self._in_force = True

    def _begin(self, waited: Waited) -> None:
        self._before = waited
        self._before_others = (self._now(), self._others())

    def _decide(self, share: float, free: float) -> None:
        """Take the share of its time that our thread waited, and the processors that others left."""
        settled_s = self._now() - self._changed_s
        if share > WAITED_SHARE and self.num_threads > 1:
            if self.num_threads == self.most:
                soon = settled_s < 2 * self._pause_s
                self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S) if soon else FIRST_PAUSE_S
            self._use(max(1, min(self.num_threads - 1, floor(free))))
        elif share < QUIET_SHARE and self.num_threads < self.most and settled_s > self._pause_s:
            # A quarter of a processor goes to programs that come and go on an idle machine.
            self._use(max(self.num_threads, min(self.most, floor(free + 0.25))))

    def _use(self, num_threads: int) -> None:
        if num_threads != self.num_threads:
            self.num_threads = num_threads
            self._changed_s = self._now()
            self._set_threads(num_threads)


def run_apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a thread of its own, which is over then.

    For loading in a process whose steps another thread makes. Each thread that computes has an OpenMP team, which lasts
    as long as it does, idle or not; where all teams have more threads than there are processors, libgomp's threads
    sleep at every barrier instead of spinning, which a small model's many short products do not bear.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon: Ctrl-C does not wait for it
    return answer.result()


def is_fixed() -> bool:
    """Whether the user has said in the environment how many threads there are, or where they run."""
    return any(name in os.environ for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND"))


def make_governor() -> ThreadGovernor:
    """A governor of torch's threads, of which there are at most as many as this process may keep processors busy.

    Threads that the user has fixed stay as they are.
    """
    threads = torch.get_num_threads()
    if is_fixed():
        return ThreadGovernor(threads, 1.0, follows=False)
    allowed = max(1, int(num_cpus()))
    if threads > allowed:
        torch.set_num_threads(allowed)
    return ThreadGovernor(min(threads, allowed), float(os.cpu_count() or 1))

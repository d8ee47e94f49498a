"""Several ways to do the same work, timed in turns, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import quantiles
from time import perf_counter
from typing import TypeAlias

import torch

from alisa.lab.bench.others import OthersMeter

NUM_WARM_UPS = 2
"""Rounds that are not counted: first calls allocate, and start threads."""

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Summed in every round before the kernel's turn, which also leaves nothing of the last round in a cache. On a GPU so
much that starting the sum does not count."""


class Role(StrEnum):
    """What a candidate is there to show."""

    READ = "read"
    """A plain sum over memory by all threads: the bandwidth that a kernel can hope for."""
    KERNEL = "kernel"
    """The native kernel."""
    REFERENCE = "reference"
    """The same arguments and results in plain torch."""
    DENSE = "dense"
    """Torch's fused attention over all rows, not only the chosen ones."""
    PACKED = "packed"
    """Torch's packed product, with weights in the dtype of the inputs."""
    GATHER = "gather"
    """The chosen rows copied together, then torch's fused attention."""


Call: TypeAlias = Callable[[int], object]
"""Does the work once; the argument counts the calls, for work on another layer each time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to do the work."""

    role: Role
    label: str
    call: Call


@dataclass(frozen=True, slots=True)
class Case:
    """All ways to do one piece of work."""

    kernel: Call
    rivals: Callable[[], Iterable[Candidate]]
    """Makes the others, which may take more memory and time than the kernel itself needs."""
    num_bytes: int
    """What the kernel cannot avoid to read and write in one call."""
    num_calls: int = 1
    """Calls in a row that are timed together; more than one where a call takes microseconds."""

    def candidates(self, *, only_kernel: bool = False) -> tuple[Candidate, ...]:
        """The kernel, and its rivals unless they are not wanted."""
        return (Candidate(Role.KERNEL, "kernel", self.kernel), *(() if only_kernel else self.rivals()))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median over the rounds, and the quartiles around it."""

    role: Role
    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, role: Role, seconds: list[float]) -> Timing:
        """The timing that these rounds give; at least two."""
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        return cls(role, middle, low, high)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How long each way took."""

    num_bytes: int
    read_bytes: int
    """Summed for the bandwidth."""
    others_share: float
    """Share of all processor time that other programs (or other guests of the same host) took meanwhile."""
    timings: dict[str, Timing]
    """By label."""

    @property
    def read_bytes_per_s(self) -> float:
        """Bandwidth of a plain sum over memory, in the same rounds."""
        return self.read_bytes / self._only(Role.READ).median_s

    @property
    def kernel(self) -> Timing:
        """The native kernel's timing."""
        return self._only(Role.KERNEL)

    @property
    def bytes_per_s(self) -> float:
        """Bytes that could not be avoided, over the kernel's time."""
        return self.num_bytes / self.kernel.median_s

    @property
    def bandwidth_share(self) -> float:
        """The same as a share of the read bandwidth; above 1 where caches hold what is read."""
        return self.bytes_per_s / self.read_bytes_per_s

    def fastest(self, role: Role) -> tuple[str, Timing] | None:
        """Label and timing of the best candidate in this role; a ratio against anything slower would flatter."""
        entries = [(label, timing) for label, timing in self.timings.items() if timing.role is role]
        return min(entries, key=lambda entry: entry[1].median_s, default=None)

    def speedup(self, role: Role) -> float | None:
        """How many times faster the kernel is than the best candidate in this role; None where there is none."""
        best = self.fastest(role)
        return None if best is None else best[1].median_s / self.kernel.median_s

    def _only(self, role: Role) -> Timing:
        [timing] = [timing for timing in self.timings.values() if timing.role is role]
        return timing


def time_case(built: Case, runs: int, *, only_kernel: bool = False, device: torch.device | None = None) -> Outcome:
    """Time every candidate, and reading memory, `runs` times (at least 2), in turns; by default on the CPU."""
    device = device or torch.device("cpu")
    buffer = torch.ones(_READ_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    candidates = (
        Candidate(Role.READ, "memory read", lambda _: buffer.sum()),
        *built.candidates(only_kernel=only_kernel),
    )
    seconds: dict[str, list[float]] = {candidate.label: [] for candidate in candidates}
    meter = OthersMeter()
    for turn in range(NUM_WARM_UPS + runs):
        for candidate in candidates:
            count = 1 if candidate.role is Role.READ else built.num_calls
            elapsed = _seconds(candidate.call, turn * count, count, device)
            if turn >= NUM_WARM_UPS:
                seconds[candidate.label].append(elapsed)
    timings = {entry.label: Timing.of(entry.role, seconds[entry.label]) for entry in candidates}
    return Outcome(built.num_bytes, buffer.nbytes, meter.share(), timings)


def _seconds(call: Call, first: int, count: int, device: torch.device) -> float:
    """Wall time of one call until its result is there, averaged over `count` of them in a row."""
    start = perf_counter()
    for number in range(first, first + count):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (perf_counter() - start) / count

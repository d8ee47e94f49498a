"""How fast a tier gives rows back, and so into how many jobs a load is cut."""

from __future__ import annotations

from time import perf_counter

from alisa.cache.offload.tiers import RowIndices
from alisa.cache.offload.transfer import JOB_ROWS, Read
from alisa.kernels.base import Bytes

SMALL_JOB_ROWS = 16
"""Rows of a job where rows take long, so that many of them are asked for at the same time.

A load of 60 rows from a disk takes less than half as long in jobs of 16 as in one of 64, and no less in jobs of 8; from
the page cache it takes as long or longer (docs/planner.md, benchmarks/results/prefetch_hint.jsonl).
"""

SLOW_ROW_S = 8e-6
"""Seconds for a row from which on it takes long: from the page cache it takes 1 to 4 us, from a disk 25."""

_FASTEST_ROW_S = 2.5e-7
_GROWTH = 1.1


class ReadPace:
    """Told of every job that reads from a tier.

    What it believes of a row follows a faster job at once and slower ones by a tenth each: a thread that had to wait
    for a processor says nothing of the tier.
    """

    def __init__(self) -> None:
        self._row_s = 0.0

    @property
    def job_rows(self) -> int:
        """Rows that one thread fetches in one go."""
        return SMALL_JOB_ROWS if self._row_s >= SLOW_ROW_S else JOB_ROWS

    def timed(self, read: Read) -> Read:
        """The same, and it is known how long that took; called by transfer threads."""

        def timed_read(memory: Bytes, rows: RowIndices) -> None:
            started = perf_counter()
            read(memory, rows)
            self.tell(len(rows), perf_counter() - started)

        return timed_read

    def tell(self, num_rows: int, seconds: float) -> None:
        """So many rows took a job so long. What a few rows take is mostly that of beginning."""
        if num_rows >= SMALL_JOB_ROWS:
            self._row_s = min(seconds / num_rows, max(self._row_s, _FASTEST_ROW_S) * _GROWTH)

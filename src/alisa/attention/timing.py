"""Where the time of a step goes: a stopwatch of named parts, always on, cheap enough not to matter.

Host clocks: exact on a CPU, where calls return when the work is done. On a GPU the parts show the time to launch the
work and only the whole step, which ends by reading the sampled tokens, is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from time import perf_counter


class Part(StrEnum):
    """What the time of a step is divided into."""

    BEGIN = "begin"
    """Moves started and room made, before the model runs."""
    MODEL = "model"
    """The decoder, the attend seam included."""
    ATTENTION = "attention"
    SELECTION = "selection"
    TRANSFER = "transfer"
    """Rows looked up, asked for and waited for, inside the model's time."""
    SAMPLING = "sampling"


class Stopwatch:
    """Seconds per part since the last `reset`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(Part, 0.0)
        self._start = perf_counter()

    def reset(self) -> None:
        """Begin a step."""
        self._seconds = dict.fromkeys(Part, 0.0)
        self._start = perf_counter()

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += perf_counter() - start

    def seconds(self, part: Part) -> float:
        """Time of one part so far."""
        return self._seconds[part]

    @property
    def wall_s(self) -> float:
        """Time since the step began."""
        return perf_counter() - self._start

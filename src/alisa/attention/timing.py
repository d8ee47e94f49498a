"""Where the time of a step goes: a timer of named sections, cheap enough to be always on.

Host clocks: exact on a CPU, where calls return when the work is done. On a GPU the sections show the time to launch the
work and only the whole step, which ends by reading the sampled tokens, is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StepSection(StrEnum):
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


class StepTimer:
    """Seconds of each section since the last `reset`.

    Sections are measured by wrapping the calls that they consist of, once, when the parts are put together (`timed`):
    the code that makes the calls reads as if nobody measured it.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(StepSection, 0.0)
        self._start = perf_counter()

    def reset(self) -> None:
        """A step begins."""
        # In place: the wrapped calls hold this dictionary.
        self._seconds.update(dict.fromkeys(StepSection, 0.0))
        self._start = perf_counter()

    def timed(self, section: StepSection, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, its time added to a section."""
        seconds = self._seconds

        def timed_call(*args: P.args, **kwargs: P.kwargs) -> T:
            start = perf_counter()
            result = call(*args, **kwargs)
            seconds[section] += perf_counter() - start
            return result

        return timed_call

    def add(self, section: StepSection, seconds: float) -> None:
        """Time that a call has measured itself."""
        self._seconds[section] += seconds

    def seconds(self, section: StepSection) -> float:
        """Time of one section so far."""
        return self._seconds[section]

    @property
    def wall_s(self) -> float:
        """Time since the step began."""
        return perf_counter() - self._start

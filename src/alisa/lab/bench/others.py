"""How busy other programs keep the machine: a figure that was taken meanwhile is not reliable."""

from __future__ import annotations

from time import perf_counter, sleep

import psutil

from alisa.machine import other_cpu_seconds

QUIET_SHARE = 0.05
"""Processor time of others that a measurement can bear: one of two threads late by so much delays the other."""


class OthersMeter:
    """Counts the processor time that is spent while it exists, but not by this process or children that have ended."""

    def __init__(self) -> None:
        self._started, self._others_s = perf_counter(), other_cpu_seconds()

    def share(self) -> float:
        """Time of others over all processor time there was, at most 1.

        The system counts in steps of 10 ms: in a shorter time there may be a step of more than there was.
        """
        available_s = (perf_counter() - self._started) * (psutil.cpu_count() or 1)
        return min(max(0.0, other_cpu_seconds() - self._others_s) / available_s, 1.0)


def wait_for_quiet(patience_s: float, *, look_s: float = 1.0) -> float:
    """Share of the processors that others take, once it is small enough, or when the patience is over."""
    waited = 0.0
    while True:
        meter = OthersMeter()
        sleep(look_s)
        share = meter.share()
        waited += look_s
        if share <= QUIET_SHARE or waited >= patience_s:
            return share

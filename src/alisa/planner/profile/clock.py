"""Timing a piece of work, and fitting what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np


def seconds(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Median of this many runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return median(times)


def fit(rows: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """Prices, none below 0, so that every row of amounts costs about what was measured: least relative squares.

    A price that would be negative is left out, and the others are fitted again.
    """
    amounts, times = np.array(rows, float), np.array(measured, float)
    scaled = amounts / times[:, None]
    prices = np.zeros(amounts.shape[1])
    used = list(range(amounts.shape[1]))
    while used:
        sizes = np.maximum(np.abs(scaled[:, used]).max(axis=0), 1e-300)
        found = np.linalg.lstsq(scaled[:, used] / sizes, np.ones(len(times)), rcond=None)[0] / sizes
        if (found >= 0).all():
            prices[used] = found
            break
        del used[int(np.argmin(found * sizes))]
    return prices.tolist()

"""Which combinations of options a test tries every time, and which it leaves to the slow suite."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def cover(sizes: Sequence[int], together: int) -> set[tuple[int, ...]]:
    """As few combinations as a greedy choice needs, so that any `together` axes have met in all their values.

    Most faults show where two options meet (Kuhn, Wallace and Gallo, 2004): the rest is for the slow suite.
    """

    def met(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(combination), together))

    every = list(product(*map(range, sizes)))
    missing, chosen = set[tuple[tuple[int, int], ...]]().union(*map(met, every)), set[tuple[int, ...]]()
    while missing:
        best = max(every, key=lambda combination: len(met(combination) & missing))
        chosen.add(best)
        missing -= met(best)
    return chosen


def each(together: int = 1, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Every combination of the axes as a case; those that no `together` axes need to meet are slow.

    1 tries each value, 2 each pair of values.
    """
    fast = cover([len(values) for values in axes.values()], together)
    cases = [
        pytest.param(
            *(values[index] for values, index in zip(axes.values(), combination, strict=True)),
            marks=() if combination in fast else pytest.mark.slow,
        )
        for combination in product(*(range(len(values)) for values in axes.values()))
    ]
    return pytest.mark.parametrize(list(axes), cases)

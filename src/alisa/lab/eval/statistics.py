"""Means with standard errors, plain and paired.

An evaluation measures units (a window of text, a question) that do not depend on each other. Two variants are run on
the same units, so that their difference is far better known than either level.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt
from typing import NamedTuple


class Estimate(NamedTuple):
    """A value and its standard error over the units; the error is NaN when there is one unit only."""

    value: float
    standard_error: float


def mean(units: Sequence[float]) -> Estimate:
    """Mean of the units."""
    count = len(units)
    value = sum(units) / count
    if count == 1:
        return Estimate(value, float("nan"))
    variance = sum((unit - value) ** 2 for unit in units) / (count - 1)
    return Estimate(value, sqrt(variance / count))


def difference(units: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of the differences to the baseline's units."""
    return mean([unit - other for unit, other in zip(units, baseline, strict=True)])


def exponential(estimate: Estimate) -> Estimate:
    """Exp of a mean, such as a perplexity or a ratio of perplexities; the error to first order (delta method)."""
    value = exp(estimate.value)
    return Estimate(value, value * estimate.standard_error)

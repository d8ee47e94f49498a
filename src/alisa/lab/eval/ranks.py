"""Rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(first: Tensor, second: Tensor) -> float:
    """Correlation of the ranks of two series Float[N]; equal values share their mean rank; NaN when one is constant."""
    ranks = torch.stack((_ranks(first), _ranks(second)))
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]

"""What several queries share, spelled out for each of them: for kernels that read a selection per query."""

from __future__ import annotations

import torch
from torch import Tensor


def own_slots(slots: Tensor, entries: Tensor | None) -> Tensor:
    """Slots Int32[B, J, K] of each query, of those `[S, J, K]` that `entries` Int32[B] point into."""
    return slots if entries is None else slots.index_select(0, entries)


def own_span(begins: Tensor, ends: Tensor, counts: Tensor, entries: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns Int32[B] that a piece brings to each query: none after its last one, `counts` Int32[B]."""
    if entries is None:
        return begins, ends
    begins, ends = begins.index_select(0, entries), ends.index_select(0, entries)
    return torch.minimum(begins, counts), torch.minimum(ends, counts)

"""What a layer with a sliding window reads."""

from __future__ import annotations

import torch

from alisa.kernels.base import Selection, StepBatch


def window_selection(batch: StepBatch, window: int) -> Selection:
    """What a sliding window of this many tokens leaves each sequence: its last ones, the new one among them."""
    num_tokens = tuple(min(length, window) for length in batch.lengths)
    counts = batch.length_counts.clamp(max=window)
    columns = torch.arange(max(num_tokens), dtype=torch.int32, device=counts.device)
    positions = columns + (batch.length_counts - counts)[:, None]
    if min(num_tokens) < len(columns):
        positions = positions.masked_fill(columns >= counts[:, None], 0)
    return Selection(positions[:, None], counts, num_tokens)

"""A selection that is larger than the pool: attention chunk by chunk, merged to what one call would give."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from alisa.cache.base import KVChunk
from alisa.kernels.base import Attended, Codec, DecodeKernel, Selection
from alisa.kernels.reference.decode import head_scores
from alisa.kernels.reference.merge import PartialAttention


def attend_in_pieces(
    kernel: DecodeKernel,
    query: Tensor,
    first: KVChunk,
    rest: Iterable[KVChunk],
    codec: Codec,
    selection: Selection,
    *,
    uses_mass: bool,
) -> Attended:
    """Attention of query `[B, H, D]` over all chunks of a selection; the mass is 0 where nobody uses it."""
    merged = PartialAttention(query)
    # Chunks come out in the dtype of the query: rounded to 16 bits before they are merged, they would not be what one
    # chunk is.
    exact = query.float()
    scores: list[tuple[KVChunk, Tensor]] = []
    for chunk in chain((first,), rest):
        assert chunk.sequences is not None, "a chunk that is not the whole selection names its sequences"
        some = exact[chunk.sequences]
        attended = kernel(some, chunk.rows, codec, chunk.slots, chunk.counts)
        merged.add(attended.out, attended.log_sum_exp, chunk.sequences)
        if uses_mass:
            scores.append((chunk, head_scores(some, chunk.rows, codec, chunk.slots)))
    mass = merged.log_sum_exp.new_zeros(selection.positions.shape)
    for chunk, of_heads in scores:  # weights need the sum over all chunks first
        assert chunk.sequences is not None, "such a chunk says whose entries it has"
        assert chunk.columns is not None, "and which"
        weights = (of_heads - merged.log_sum_exp[chunk.sequences, :, None]).exp().sum(dim=1)
        weights *= torch.arange(weights.shape[1], device=weights.device) < chunk.counts[:, None]
        mass[:, 0].index_put_((chunk.sequences[:, None], chunk.columns), weights, accumulate=True)
    return Attended(merged.out.to(query.dtype), mass, merged.log_sum_exp)

"""Decode attention over rows addressed by slot, in plain torch.

This is the reference of every kernel: same arguments, same three results. It gathers the selected rows, which on a CPU
costs more than it saves (a copy of every selected row); kernels read them in place.

A sequence gets the same bits whatever else is attended to, in one call or in pieces, on any number of threads. So its
selection is cut into blocks of `BLOCK_COLUMNS`, which are merged in order, and sums are written out as additions of
whole tensors: torch's own sums and products take an order that depends on shapes and threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alisa.kernels.base import Attended, Codec, DecodeKernel
from alisa.kernels.reference.entries import own_slots, own_span
from alisa.kernels.reference.softcap import softcapped
from alisa.spec import RowFormat

BLOCK_COLUMNS = 64
"""Columns of a selection that share a maximum."""

_LOWEST = -3e38
"""A maximum of nothing: with minus infinity, an empty block would make it minus infinity minus itself."""


class ReferenceDecode:
    """See `DecodeKernel`; scores and weights are computed in float32 whatever the dtype of q and the rows."""

    def __call__(
        self,
        q: Tensor,
        rows: Tensor,
        codec: Codec,
        slots: Tensor,
        counts: Tensor,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> Attended:
        """See `DecodeKernel`."""
        slots = own_slots(slots, entries)
        pieces = ReferencePieces(q, codec, counts, slots.shape[1], slots.shape[2], softcap)
        pieces.add(rows, slots, torch.zeros_like(counts), counts)
        return pieces.finish()

    def in_pieces(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_slots: int,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> ReferencePieces:
        """See `DecodeKernel`."""
        return ReferencePieces(q, codec, counts, 1, num_slots, softcap, entries)

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """See `DecodeKernel`."""
        return BLOCK_COLUMNS


decode_attention: DecodeKernel = ReferenceDecode()


class ReferencePieces:
    """See `AttentionPieces`; a softmax that goes on block by block, with the maximum so far as its reference.

    Args:
        q: `[B, H, D]`.
        codec: reads rows.
        counts: Int32[B], at least 1.
        num_sets: J, 1 or G.
        num_slots: K.
        softcap: as in `AttentionShape`.
        entries: as in `Selection`.
    """

    def __init__(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_sets: int,
        num_slots: int,
        softcap: float | None,
        entries: Tensor | None = None,
    ) -> None:
        self._softcap = softcap
        self._entries = entries
        num_seqs, num_heads, head_dim = q.shape
        groups = (num_seqs, codec.format.num_kv_heads, num_heads // codec.format.num_kv_heads)
        self._codec = codec
        self._counts = counts
        self._dtype = q.dtype
        self._num_sets = num_sets
        self._num_slots = num_slots
        self._q = q.float().view(*groups, head_dim) * head_dim**-0.5
        num_blocks = -(-num_slots // BLOCK_COLUMNS)
        self._out = self._q.new_zeros(*groups, head_dim)
        self._maximum = self._q.new_full(groups, _LOWEST)
        self._total = self._q.new_zeros(groups)
        self._weights = self._q.new_zeros(*groups, num_blocks * BLOCK_COLUMNS)  # relative to the maximum of their block
        self._maxima = self._q.new_full((*groups, num_blocks), _LOWEST)

    def add(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor) -> None:
        """See `AttentionPieces`."""
        slots = own_slots(slots, self._entries)
        begins, ends = own_span(begins, ends, self._counts, self._entries)
        # Whole blocks: how many terms a sum has must not depend on the longest sequence.
        slots = F.pad(slots, (0, self._weights.shape[-1] - self._num_slots))
        for block in range(int(begins.min()) // BLOCK_COLUMNS, -(-int(ends.max()) // BLOCK_COLUMNS)):
            first = block * BLOCK_COLUMNS
            columns = torch.arange(first, first + BLOCK_COLUMNS, device=slots.device)
            real = (columns >= begins[:, None]) & (columns < ends[:, None])
            self._add_block(block, rows, slots[:, :, first : first + BLOCK_COLUMNS], real)

    def finish(self) -> Attended:
        """See `AttentionPieces`."""
        factors = torch.exp(self._maxima - self._maximum[..., None]) / self._total[..., None]
        weights = self._weights.unflatten(-1, (-1, BLOCK_COLUMNS)) * factors[..., None]
        weights = weights.flatten(-2)[..., : self._num_slots]
        mass = ordered_sum(weights, 2)
        num_seqs, num_kv_heads, group, head_dim = self._out.shape
        return Attended(
            (self._out / self._total[..., None]).view(num_seqs, -1, head_dim).to(self._dtype),
            mass if self._num_sets > 1 else ordered_sum(mass, 1)[:, None],
            (self._maximum + self._total.log()).view(num_seqs, num_kv_heads * group),
        )

    def _add_block(self, block: int, rows: Tensor, slots: Tensor, real: Tensor) -> None:
        """One block of slots Int32[B, J, BLOCK_COLUMNS]; `real` Bool[B, BLOCK_COLUMNS] are attended to."""
        padding = ~real[:, None, :]
        num_seqs, num_kv_heads, _, _ = self._q.shape
        slots = slots.masked_fill(padding, 0)
        k, v = self._codec.decode(rows.index_select(0, slots.reshape(-1)))
        k = _per_kv_head(k, num_seqs, self._num_sets, slots.shape[2], num_kv_heads)[:, :, None]
        v = _per_kv_head(v, num_seqs, self._num_sets, slots.shape[2], num_kv_heads)[:, :, None]
        # [B, G, H/G, 1, D] x [B, G, 1, BLOCK_COLUMNS, D] -> [B, G, H/G, BLOCK_COLUMNS]
        scores = ordered_sum(self._q[..., None, :] * k, 4)
        if self._softcap is not None:
            scores = softcapped(scores, self._softcap)
        scores = scores.masked_fill(padding[:, None], -torch.inf)
        maximum = torch.maximum(self._maximum, scores.amax(dim=-1))
        kept = torch.exp(self._maximum - maximum)
        weights = torch.exp(scores - maximum[..., None])
        # Nobody knows what row 0 holds: 0 times infinity would be no number.
        values = v.masked_fill(padding[:, None, :, :, None], 0.0)
        self._total = self._total * kept + ordered_sum(weights, 3)
        self._out = self._out * kept[..., None] + ordered_sum(weights[..., None] * values, 3)
        self._maximum = maximum
        place = self._weights.unflatten(-1, (-1, BLOCK_COLUMNS))[..., block, :]
        place.copy_(torch.where(padding[:, None], place, weights))
        came = real.any(dim=1)[:, None, None]
        self._maxima[..., block] = torch.where(came, maximum, self._maxima[..., block])


def ordered_sum(terms: Tensor, dim: int) -> Tensor:
    """The sum over one dimension, added up in halves: an order that depends on its length only."""
    while (count := terms.shape[dim]) > 1:
        half = (count + 1) // 2
        folded = terms.narrow(dim, 0, half).clone()
        folded.narrow(dim, 0, count - half).add_(terms.narrow(dim, half, count - half))
        terms = folded
    return terms.squeeze(dim)


def _per_kv_head(values: Tensor, num_seqs: int, num_sets: int, num_slots: int, num_kv_heads: int) -> Tensor:
    """Gathered `[B*J*K, G, D]` as float32 `[B, G, K, D]`: with one set per KV head, head g reads its own set only."""
    values = values.view(num_seqs, num_sets, num_slots, num_kv_heads, -1).float()
    if num_sets == 1:
        return values[:, 0].transpose(1, 2)
    return values.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

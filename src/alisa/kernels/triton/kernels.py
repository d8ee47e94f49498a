"""The GPU kernels as functions of tensors, with the arguments and results of `CpuKernels`.

Each kernel's own file launches it. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Chosen, Codec, Completed, Ranking, Sketch
from alisa.kernels.checks import (
    check_append,
    check_decode,
    check_mean_add,
    check_mean_blend,
    check_observe,
    check_ranking,
    check_rest_blend,
    check_select,
    check_sketch_append,
    check_sketch_scores,
    check_sketch_values,
)
from alisa.kernels.reference.entries import own_slots
from alisa.kernels.triton.append import launch_append
from alisa.kernels.triton.decode import Decoding
from alisa.kernels.triton.mean_blend import launch_blend
from alisa.kernels.triton.observe import launch_observe
from alisa.kernels.triton.select import launch_select
from alisa.kernels.triton.settings import attend_settings
from alisa.kernels.triton.sketch_append import launch_sketch_append
from alisa.kernels.triton.sketch_rest import launch_rest, launch_rest_blend
from alisa.kernels.triton.sketch_scores import WeighedTokens, launch_sketch_scores
from alisa.kernels.triton.sketch_shares import launch_shares
from alisa.spec import RowFormat


class TritonKernels:
    """The Triton kernels; calling it is decode attention (see `DecodeKernel`).

    All tensors lie on the current CUDA device, or on the CPU where the kernels are interpreted.
    """

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
        """Attend with q `[B, H, D]` to `slots` Int32[S, J, K] of `rows` UInt8[R, row_bytes]; see `DecodeKernel`.

        Counts Int32[B] are at least 1, slots valid and without duplicates within a set.
        """
        check_decode(q, rows, codec.format, slots, counts, entries)
        slots = own_slots(slots, entries)
        num_sets, num_slots = slots.shape[1:]
        decoding = Decoding(q.contiguous(), codec.format, counts.contiguous(), num_sets, num_slots, softcap)
        decoding.add_all(rows, slots.contiguous())
        return decoding.finish()

    def in_pieces(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_slots: int,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> Decoding:
        """See `DecodeKernel`: q `[B, H, D]`, counts Int32[B]."""
        return Decoding(q.contiguous(), codec.format, counts.contiguous(), 1, num_slots, softcap, entries)

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """See `DecodeKernel`: a split, which one program reads."""
        return attend_settings(row_format, num_heads // row_format.num_kv_heads).split_len

    def append(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's pool; nothing else is touched."""
        check_append(rows, row_format, slots, k, v)
        launch_append(rows, row_format, slots.contiguous(), _whole_heads(k), _whole_heads(v))

    def select(
        self,
        scores: Tensor,
        starts: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
    ) -> Tensor:
        """See `SelectionKernels`."""
        check_select(scores, starts, older_ends, older_counts, counts)
        return launch_select(scores, starts, older_ends, older_counts, counts, num_slots, width)

    def observe(
        self,
        sums: Tensor,
        buckets: Tensor,
        sum_starts: Tensor,
        bucket_starts: Tensor,
        positions: Tensor,
        counts: Tensor,
        mass: Tensor,
    ) -> None:
        """See `SelectionKernels`."""
        check_observe(sums, buckets, sum_starts, bucket_starts, positions, counts, mass)
        launch_observe(sums, buckets, sum_starts, bucket_starts, positions, counts, mass)

    def sketch_append(self, sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
        """See `SelectionKernels`."""
        check_sketch_append(sketch, ids, vectors)
        launch_sketch_append(sketch, ids.contiguous(), _whole_heads(vectors))

    def sketch_scores(
        self,
        query: Tensor,
        keys: Sketch,
        starts: Tensor,
        lengths: Tensor,
        width: int,
        num_sets: int,
        softcap: float | None = None,
    ) -> Tensor:
        """Approximate attention weights Float32[B, num_sets, width], summed over the heads of each index set.

        For the query `[B, H, D]` over tokens `starts[b]` to `starts[b] + lengths[b] - 1` of the sketch (Int64[B] and
        Int32[B], at least 1 and at most `width`); 0 from `lengths[b]` on. One set is all heads, G sets are the heads of
        each KV head; `softcap` is that of `AttentionShape`.
        """
        check_sketch_scores(query, keys, starts, lengths, num_sets)
        starts, lengths = starts.contiguous(), lengths.contiguous()
        return launch_sketch_scores(query.contiguous(), keys, starts, lengths, width, num_sets, softcap).mass

    def sketch_select(self, query: Tensor, keys: Sketch, ranking: Ranking) -> Chosen:
        """See `SelectionKernels`; without a coverage."""
        check_ranking(query, keys, ranking)
        weighed = _weighed(query, keys, ranking)
        positions = _best(weighed, ranking)
        shares = launch_shares(weighed, positions, ranking.counts, ranking.lengths.contiguous())
        return Chosen(positions, shares, ranking.counts)

    def sketch_complete(self, query: Tensor, keys: Sketch, values: Sketch, ranking: Ranking) -> Completed:
        """See `SelectionKernels`; without a coverage."""
        check_ranking(query, keys, ranking)
        check_sketch_values(query, keys, values)
        starts, lengths = ranking.starts.contiguous(), ranking.lengths.contiguous()
        weighed = _weighed(query, keys, ranking)
        positions = _best(weighed, ranking)
        shares = launch_shares(weighed, positions, ranking.counts, lengths, erase=True)
        chosen = Chosen(positions, shares, ranking.counts)
        return Completed(chosen, launch_rest(weighed, values, starts, lengths, query.shape[2]))

    def rest_blend(self, out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
        """See `SelectionKernels`."""
        check_rest_blend(out, shares, rest)
        return launch_rest_blend(out.contiguous(), shares.contiguous(), rest.contiguous())

    def mean_add(self, sums: Tensor, req_index: Tensor, values: Tensor) -> None:
        """See `SelectionKernels`."""
        check_mean_add(sums, req_index, values)
        # In any order: in double precision no order shows in a mean of float32.
        sums.index_add_(0, req_index, values.to(torch.float64))

    def mean_blend(self, sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """See `SelectionKernels`."""
        check_mean_blend(sums, req_index, lengths, out, shares)
        return launch_blend(sums, req_index.contiguous(), lengths.contiguous(), out.contiguous(), shares.contiguous())


def _weighed(query: Tensor, keys: Sketch, ranking: Ranking) -> WeighedTokens:
    """Weights of all that is ranked."""
    starts, lengths = ranking.starts.contiguous(), ranking.lengths.contiguous()
    return launch_sketch_scores(
        query.contiguous(), keys, starts, lengths, ranking.width, ranking.num_sets, ranking.softcap
    )


def _best(weighed: WeighedTokens, ranking: Ranking) -> Tensor:
    """Positions Int32[B * J, K] that `select` chooses by these weights."""
    # Counts that depend on weights would have to be asked of the device in every layer.
    assert ranking.coverages is None, "an engine on a GPU refuses a coverage"
    _, _, older_ends, older_counts, counts, num_slots, *_ = ranking
    width = weighed.mass.shape[2]
    rows = torch.arange(len(counts), device=counts.device) * width
    return launch_select(weighed.mass.view(-1), rows, older_ends, older_counts, counts, num_slots, width)


def _whole_heads(values: Tensor) -> Tensor:
    """`[N, G, D]` with each head in one run; a copy only where they are not."""
    return values if values.stride(2) == 1 else values.contiguous()

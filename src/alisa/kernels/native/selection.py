"""Selection on a CPU: ranking tokens by scores or by a sketch of their keys, and what stands in for those not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alisa.kernels.base import Chosen, Completed, Ranking, Sketch
from alisa.kernels.checks import (
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
from alisa.kernels.native import library
from alisa.kernels.native.library import VALUE_CODES, dense_tokens

if TYPE_CHECKING:
    from alisa.kernels._native import SketchTask


class CpuSelection:
    """See `SelectionKernels`; the native ones, with their working memory.

    Args:
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses when a layer appends its rows.
        share_threads: run on torch's OpenMP threads where they can be found.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None, share_threads: bool = True) -> None:
        native = library.native()
        if isa is not None and isa not in library.isa_names():
            raise ValueError(f"{isa} kernels cannot run here; there are {', '.join(library.isa_names())}")
        self.isa = isa or library.isa_names()[0]
        self._team = library.Team(num_threads, share=share_threads)
        self._threads = self._team.threads()
        self._workspace = native.Workspace()

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
        """See `SelectionKernels`; `width` is of no influence here."""
        check_select(scores, starts, older_ends, older_counts, counts)
        positions = torch.empty(len(starts), num_slots, dtype=torch.int32)
        library.native().select(
            threads=self._threads,
            scores=scores.data_ptr(),
            wide=scores.dtype == torch.float64,
            stride=1,
            starts=starts.data_ptr(),
            older_ends=older_ends.data_ptr(),
            older_counts=older_counts.data_ptr(),
            counts=counts.data_ptr(),
            num_seqs=len(starts),
            num_slots=num_slots,
            positions=positions.data_ptr(),
        )
        return positions

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
        num_seqs, num_slots = positions.shape
        library.native().observe(
            sums=sums.data_ptr(),
            buckets=buckets.data_ptr(),
            sum_starts=sum_starts.data_ptr(),
            bucket_starts=bucket_starts.data_ptr(),
            positions=positions.data_ptr(),
            counts=counts.data_ptr(),
            mass=mass.data_ptr(),
            num_seqs=num_seqs,
            num_slots=num_slots,
        )

    def sketch_append(self, sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
        """See `SelectionKernels`."""
        check_sketch_append(sketch, ids, vectors)
        num_tokens, num_heads, head_dim = vectors.shape
        # The parts of a head are heads here: they lie in a row.
        vectors, ids = dense_tokens(vectors), ids.contiguous()
        self._workspace.sketch_append(
            isa=self.isa,
            threads=self._threads,
            bits=sketch.bits,
            num_kv_heads=num_heads * sketch.parts,
            head_dim=head_dim // sketch.parts,
            keys=vectors.data_ptr(),
            dtype=VALUE_CODES[vectors.dtype],
            stride=vectors.stride(0) * vectors.element_size(),
            codes=sketch.codes.data_ptr(),
            ranges=sketch.ranges.data_ptr(),
            ids=ids.data_ptr(),
            num_tokens=num_tokens,
        )

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
        """Approximate attention weights Float32[B, num_sets, width] of tokens starts[b] .. starts[b] + lengths[b] - 1.

        Softmax of query times sketched key over sqrt(D), for each head on its own, summed over the heads of each index
        set; 0 from lengths[b] on. The query is rounded to 1/32639 of its largest value, in each part of a head.

        Args:
            query: `[B, H, D]` in a float dtype.
            keys: sketched.
            starts: Int64[B], rows of the sketch.
            lengths: Int32[B], each at least 1.
            width: at least the largest length.
            num_sets: 1 for all heads together, G for the heads of one KV head each.
            softcap: of the scores, as in `AttentionShape`.
        """
        check_sketch_scores(query, keys, starts, lengths, num_sets)
        query, starts, lengths = query.contiguous(), starts.contiguous(), lengths.contiguous()
        scores = torch.empty(len(query), num_sets, width)
        self._workspace.sketch_scores(
            isa=self.isa,
            threads=self._threads,
            task=sketch_task(query, keys, starts, lengths, width, num_sets, softcap),
            out=scores.data_ptr(),
        )
        return scores

    def sketch_select(self, query: Tensor, keys: Sketch, ranking: Ranking) -> Chosen:
        """See `SelectionKernels`."""
        check_ranking(query, keys, ranking)
        return self._select(query.contiguous(), keys, ranking)

    def sketch_complete(self, query: Tensor, keys: Sketch, values: Sketch, ranking: Ranking) -> Completed:
        """See `SelectionKernels`."""
        check_ranking(query, keys, ranking)
        check_sketch_values(query, keys, values)
        rest = torch.empty(query.shape)
        return Completed(self._select(query.contiguous(), keys, ranking, (values, rest)), rest)

    def rest_blend(self, out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
        """See `SelectionKernels`."""
        check_rest_blend(out, shares, rest)
        out, shares, rest = out.contiguous(), shares.contiguous(), rest.contiguous()
        num_seqs, num_heads, head_dim = out.shape
        blended = torch.empty_like(out)
        self._workspace.rest_blend(
            isa=self.isa,
            threads=self._threads,
            head_dim=head_dim,
            num_heads=num_heads,
            read=out.data_ptr(),
            out=blended.data_ptr(),
            dtype=VALUE_CODES[out.dtype],
            shares=shares.data_ptr(),
            rest=rest.data_ptr(),
            num_seqs=num_seqs,
        )
        return blended

    def mean_add(self, sums: Tensor, req_index: Tensor, values: Tensor) -> None:
        """See `SelectionKernels`."""
        check_mean_add(sums, req_index, values)
        values, req_index = dense_tokens(values), req_index.contiguous()
        num_tokens, num_kv_heads, head_dim = values.shape
        self._workspace.mean_add(
            isa=self.isa,
            sums=sums.data_ptr(),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            values=values.data_ptr(),
            dtype=VALUE_CODES[values.dtype],
            stride=values.stride(0) * values.element_size(),
            req_index=req_index.data_ptr(),
            num_tokens=num_tokens,
        )

    def mean_blend(self, sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """See `SelectionKernels`."""
        check_mean_blend(sums, req_index, lengths, out, shares)
        out, req_index = out.contiguous(), req_index.contiguous()
        lengths, shares = lengths.contiguous(), shares.contiguous()
        num_seqs, num_heads, head_dim = out.shape
        blended = torch.empty_like(out)
        self._workspace.mean_blend(
            isa=self.isa,
            threads=self._threads,
            sums=sums.data_ptr(),
            num_kv_heads=sums.shape[1],
            head_dim=head_dim,
            num_heads=num_heads,
            read=out.data_ptr(),
            out=blended.data_ptr(),
            dtype=VALUE_CODES[out.dtype],
            shares=shares.data_ptr(),
            req_index=req_index.data_ptr(),
            lengths=lengths.data_ptr(),
            num_seqs=num_seqs,
        )
        return blended

    def _select(
        self, query: Tensor, keys: Sketch, ranking: Ranking, completion: tuple[Sketch, Tensor] | None = None
    ) -> Chosen:
        """For arguments that have been checked; `completion` as in `sketch_task`."""
        starts, lengths, older_ends, older_counts, counts, num_slots, width, num_sets, softcap, coverages = ranking
        starts, lengths = starts.contiguous(), lengths.contiguous()
        positions = torch.empty(counts.shape[0], num_slots, dtype=torch.int32)
        shares, chosen_counts = torch.empty(query.shape[:2]), torch.empty_like(counts)
        self._workspace.sketch_select(
            isa=self.isa,
            threads=self._threads,
            task=sketch_task(query, keys, starts, lengths, width, num_sets, softcap, completion),
            older_ends=older_ends.data_ptr(),
            older_counts=older_counts.data_ptr(),
            counts=counts.data_ptr(),
            num_slots=num_slots,
            coverages=0 if coverages is None else coverages.data_ptr(),
            positions=positions.data_ptr(),
            chosen_counts=chosen_counts.data_ptr(),
            shares=shares.data_ptr(),
        )
        return Chosen(positions, shares, chosen_counts)


def sketch_task(
    query: Tensor,
    keys: Sketch,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    num_sets: int,
    softcap: float | None,
    completion: tuple[Sketch, Tensor] | None = None,
) -> SketchTask:
    """Checked, contiguous tensors as addresses: they must live as long as it is used.

    `completion` are sketched values, and where the rest goes.
    """
    num_seqs, num_heads, head_dim = query.shape
    values, rest = completion or (None, None)
    return library.native().SketchTask(
        bits=keys.bits,
        num_kv_heads=keys.codes.shape[1],
        head_dim=head_dim // keys.parts,
        q=query.data_ptr(),
        q_dtype=VALUE_CODES[query.dtype],
        codes=keys.codes.data_ptr(),
        ranges=keys.ranges.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        num_seqs=num_seqs,
        num_heads=num_heads * keys.parts,
        num_sets=num_sets,
        width=width,
        parts=keys.parts,
        softcap=softcap or 0.0,
        value_bits=0 if values is None else values.bits,
        value_codes=0 if values is None else values.codes.data_ptr(),
        value_ranges=0 if values is None else values.ranges.data_ptr(),
        rest=0 if rest is None else rest.data_ptr(),
    )

"""What selection policies do in each layer, in plain torch.

It is the reference of the native and the Triton kernels, and what runs where neither can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Chosen, Completed, Ranking, Sketch
from alisa.kernels.reference.sketch import (
    make_sketch,
    sketch_rows,
    sketch_weights,
    token_ids,
    unsketch,
    value_not_read,
    weight_read,
)

_PADDING = torch.iinfo(torch.int32).max
"""Sorts after every position."""


class ReferenceSelection:
    """See `SelectionKernels`; on any device, without a state."""

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
        """The best older positions by a stable sort, then those after them."""
        columns = torch.arange(width, device=scores.device)
        older = columns < older_ends[:, None]
        ids = torch.where(older, starts[:, None] + columns, 0)
        ranked = scores[ids].masked_fill_(~older, -torch.inf)
        # A stable sort, not topk: among equal scores (0 for all that is forgotten) the older position wins, in every
        # batch alike. For 16 rows of 640 it takes 0.5 ms and topk 0.1.
        best = ranked.sort(dim=1, descending=True, stable=True).indices[:, :num_slots].to(torch.int32)
        ranks = torch.arange(max(num_slots, width), dtype=torch.int32, device=scores.device)
        best = best.masked_fill_(ranks[: best.shape[1]] >= older_counts[:, None], _PADDING)
        recent = older_ends[:, None] + ranks[:num_slots]
        recent = recent.masked_fill_(ranks[:num_slots] >= (counts - older_counts)[:, None], _PADDING)
        positions = torch.cat((best, recent), dim=1).sort(dim=1).values[:, :num_slots].contiguous()
        return positions.masked_fill_(positions == _PADDING, 0)

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
        """Indexed sums; padding adds 0."""
        real = torch.arange(positions.shape[1], device=positions.device) < counts[:, None]
        mass = torch.where(real, mass, 0.0)
        for table, starts in ((sums, sum_starts), (buckets, bucket_starts)):
            ids = torch.where(real, starts[:, None] + positions, 0)
            table.view(-1).index_add_(0, ids.view(-1), mass.view(-1).to(table.dtype))

    def sketch_append(self, sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
        """Sketched, then copied to their rows."""
        new = make_sketch(vectors, sketch.bits, sketch.parts)
        sketch.codes.index_copy_(0, ids, new.codes)
        sketch.ranges.index_copy_(0, ids, new.ranges)

    def sketch_select(self, query: Tensor, keys: Sketch, ranking: Ranking) -> Chosen:
        """All keys unpacked, weighed by a full softmax, and sorted."""
        return self._chosen(*self._weighed(query, keys, ranking))

    def sketch_complete(self, query: Tensor, keys: Sketch, values: Sketch, ranking: Ranking) -> Completed:
        """The same, and all values unpacked."""
        weights, ranking = self._weighed(query, keys, ranking)
        chosen = self._chosen(weights, ranking)
        rows = sketch_rows(values, token_ids(ranking.starts, ranking.lengths, ranking.width))
        rest = value_not_read(weights, unsketch(rows, query.shape[-1]), chosen.positions, chosen.counts)
        return Completed(chosen, rest)

    def rest_blend(self, out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
        """Blended in float32, rounded once."""
        return torch.addcmul(rest, out.float(), shares.unsqueeze(-1)).to(out.dtype)

    def mean_add(self, sums: Tensor, req_index: Tensor, values: Tensor) -> None:
        """An indexed sum in float64."""
        sums.index_add_(0, req_index, values.to(torch.float64))

    def mean_blend(self, sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """Blended in float32, rounded once."""
        means = (sums.index_select(0, req_index) / lengths[:, None, None]).float().unsqueeze(2)  # [B, G, 1, D]
        of_groups = (len(out), sums.shape[1], -1)
        read, share = out.float().view(*of_groups, out.shape[-1]), shares.view(*of_groups, 1)
        return torch.lerp(means, read, share).view(out.shape).to(out.dtype)

    def _weighed(self, query: Tensor, keys: Sketch, ranking: Ranking) -> tuple[Tensor, Ranking]:
        """Weights Float32[B, H, S], and the ranking."""
        return sketch_weights(query, keys, ranking.starts, ranking.lengths, ranking.width, ranking.softcap), ranking

    def _chosen(self, weights: Tensor, ranking: Ranking) -> Chosen:
        """By weights Float32[B, H, S], summed over the heads of each set."""
        _, lengths, older_ends, older_counts, counts, num_slots, width, num_sets, _, coverages = ranking
        scores = weights.unflatten(1, (num_sets, -1)).sum(dim=2).view(-1, width)
        if coverages is not None:
            recent = counts - older_counts
            targets = (coverages * (weights.shape[1] // num_sets) * 2.0**32).long().repeat_interleave(num_sets)
            fewest = _count_to_cover(scores, older_ends, older_counts, recent, targets)
            fewest = fewest.view(-1, num_sets).amax(dim=1).repeat_interleave(num_sets)
            older_counts = fewest.where(targets > 0, older_counts)
            counts = recent + older_counts
        rows = torch.arange(len(counts), device=weights.device) * width
        positions = self.select(scores.view(-1), rows, older_ends, older_counts, counts, num_slots, width)
        return Chosen(positions, weight_read(weights, positions, counts, lengths), counts)


def _count_to_cover(
    scores: Tensor, older_ends: Tensor, older_counts: Tensor, recent: Tensor, targets: Tensor
) -> Tensor:
    """Older tokens Int32[N], at most `older_counts`, that have at least `targets` together with the `recent` ones.

    Scores Float32[N, S] are counted in units of 2^-32, as targets Int64[N] are; `older_ends` and `recent` are Int32[N].
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    ends = older_ends[:, None]
    units = (scores.double() * 2.0**32).long()
    in_window = (columns >= ends) & (columns < ends + recent[:, None])
    needed = targets - units.masked_fill(~in_window, 0).sum(dim=1)
    best = units.masked_fill(columns >= ends, 0).sort(dim=1, descending=True).values
    before = best.cumsum(dim=1) - best
    wanted = (before < needed[:, None]) & (columns < older_counts[:, None])
    return wanted.sum(dim=1).to(torch.int32)

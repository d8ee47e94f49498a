"""A recent window and the best of the rest: what swa, swa-head and h2o share.

    positions   0 ........................ n-k ......... n-1   n
                [ older: top k by score     ][ k recent    ][ new token ]

A policy of this kind keeps one score per position, layer and index set; how scores come about is what tells them apart.
Index sets are rows: with J sets per layer, the row of set j of a request index is `req_idx * J + j`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Selection, SelectionKernels, StepBatch

_PADDING = torch.iinfo(torch.int32).max
"""Sorts behind every position."""


@dataclass(frozen=True, slots=True)
class _Masks:
    """What the selection in plain torch needs besides; native kernels work from the counts alone."""

    not_older: Tensor
    """Bool[B*J, width]: positions inside the recent window or behind the sequence."""
    beyond: Tensor
    """Bool[B*J, num_older]: ranks that a sequence with a smaller budget does not use."""
    recent: Tensor
    """Int32[B*J, Kr]: the recent positions and the new token, padded."""


@dataclass(frozen=True, slots=True)
class RankedStep:
    """The part of a selection that is the same for every layer of a decode step."""

    num_seqs: int
    num_sets: int
    """J"""
    rows: Tensor
    """Int64[B*J]: rows of the score table, sequence by sequence."""
    width: int
    """Earlier tokens of the longest sequence."""
    counts: Tensor
    """Int32[B]: tokens each sequence reads."""
    num_tokens: tuple[int, ...]
    """The counts on the host."""
    older_ends: Tensor
    """Int32[B*J]: where the recent window begins."""
    older_counts: Tensor
    """Int32[B*J]"""
    row_counts: Tensor
    """Int32[B*J]: `counts` for every row."""
    kernels: SelectionKernels | None
    masks: _Masks | None
    """Present where there are no kernels."""

    @classmethod
    def plan(cls, batch: StepBatch, budget: Budget, num_sets: int, kernels: SelectionKernels | None) -> RankedStep:
        """Lay out a step of these sequences."""
        device = batch.req_index.device
        splits = [budget.split(length - 1) for length in batch.lengths]
        counts = tuple(recent + older + 1 for recent, older in splits)

        def column(values: list[int]) -> Tensor:
            """One value per sequence as Int32[B*J]."""
            return torch.tensor(values, dtype=torch.int32, device=device).repeat_interleave(num_sets)

        older_ends = column([length - 1 - recent for length, (recent, _) in zip(batch.lengths, splits, strict=True)])
        older_counts = column([older for _, older in splits])
        width = max(batch.lengths) - 1
        masks = None
        if kernels is None:
            num_older = max(older for _, older in splits)
            num_recent = max(recent for recent, _ in splits) + 1
            columns = torch.arange(max(width, num_older, num_recent), dtype=torch.int32, device=device)
            recent = older_ends[:, None] + columns[:num_recent]
            masks = _Masks(
                not_older=columns[:width] >= older_ends[:, None],
                beyond=columns[:num_older] >= older_counts[:, None],
                recent=recent.masked_fill(recent >= column(list(batch.lengths))[:, None], _PADDING),
            )
        sets = torch.arange(num_sets, device=device)
        return cls(
            num_seqs=len(batch.req_indices),
            num_sets=num_sets,
            rows=(batch.req_index[:, None] * num_sets + sets).view(-1),
            width=width,
            counts=torch.tensor(counts, dtype=torch.int32, device=device),
            num_tokens=counts,
            older_ends=older_ends,
            older_counts=older_counts,
            row_counts=column(list(counts)),
            kernels=kernels,
            masks=masks,
        )

    def select(self, scores: Tensor, rows: Tensor) -> Selection:
        """The recent window and the older positions with the highest score, the older of two equals.

        Args:
            scores: `[R, capacity]` of one layer, none of them below 0.
            rows: Int64[B*J], the rows of this step's index sets.
        """
        num_slots = max(self.num_tokens)
        if self.kernels is None:
            positions = self._select(scores, rows, num_slots)
        else:
            positions = self.kernels.select(
                scores, rows, self.older_ends, self.older_counts, self.row_counts, num_slots
            )
        return self.selection(positions)

    def selection(self, positions: Tensor) -> Selection:
        """These positions Int32[B*J, K], one row for each index set, as what the step reads."""
        return Selection(positions.view(self.num_seqs, self.num_sets, -1), self.counts, self.num_tokens)

    def _select(self, scores: Tensor, rows: Tensor, num_slots: int) -> Tensor:
        """The reference in plain torch: contiguous Int32[B*J, K]."""
        masks = self.masks
        assert masks is not None, "a step without kernels has masks"
        positions = masks.recent
        num_older = masks.beyond.shape[1]
        if num_older:
            older = scores.index_select(0, rows)[:, : self.width].masked_fill_(masks.not_older, -1.0)
            # A stable sort, not topk: among equal scores (0 for all that is forgotten) the older position wins, in
            # every batch alike. For 16 rows of 640 it takes 0.5 ms and topk 0.1.
            best = older.sort(dim=1, descending=True, stable=True).indices[:, :num_older].to(torch.int32)
            positions = torch.cat((best.masked_fill_(masks.beyond, _PADDING), positions), dim=1).sort(dim=1).values
        positions = positions[:, :num_slots].contiguous()
        return positions.masked_fill(positions == _PADDING, 0)

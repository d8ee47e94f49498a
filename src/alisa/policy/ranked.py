"""A recent window and the best of the rest: what swa, swa-head, h2o and sketch share.

    positions   0 ........................ n-k ......... n-1   n
                [ older: top k by score     ][ k recent    ][ new token ]

With J index sets per layer there are J rows for each sequence, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Ranking, Selection, StepBatch


@dataclass(frozen=True, slots=True)
class RankedStep:
    """The part of a selection that is the same for every layer of a decode step."""

    num_seqs: int
    num_sets: int
    """J"""
    width: int
    """Tokens of the longest sequence."""
    num_slots: int
    """K: tokens that the sequence which reads most reads."""
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
    coverages: Tensor | None
    """As in `Ranking`: where one is above 0 the counts are the most, and each layer has its own."""

    @classmethod
    def plan(cls, batch: StepBatch, budget: Budget, num_sets: int) -> RankedStep:
        """Lay out a step of these sequences; `budget` is for those that have none of their own."""
        device = batch.req_index.device
        budgets = batch.budgets or (budget,) * len(batch.lengths)
        splits = [own.split(length - 1) for own, length in zip(budgets, batch.lengths, strict=True)]
        coverages = [own.coverage or 0.0 for own in budgets]
        counts = tuple(recent + older + 1 for recent, older in splits)
        older_ends = [length - 1 - recent for length, (recent, _) in zip(batch.lengths, splits, strict=True)]
        older_counts = [older for _, older in splits]
        # In one go: in a small model a step's every call shows.
        columns = torch.tensor((older_ends, older_counts, counts), dtype=torch.int32, device=device)
        of_rows = columns if num_sets == 1 else columns.repeat_interleave(num_sets, dim=1)
        return cls(
            num_seqs=len(batch.req_indices),
            num_sets=num_sets,
            width=max(batch.lengths),
            num_slots=max(counts),
            counts=columns[2],
            num_tokens=counts,
            older_ends=of_rows[0],
            older_counts=of_rows[1],
            row_counts=of_rows[2],
            coverages=torch.tensor(coverages, dtype=torch.float64, device=device) if any(coverages) else None,
        )

    def ranking(self, starts: Tensor, lengths: Tensor) -> Ranking:
        """What kernels rank by a sketch whose rows begin at `starts` Int64[B] and are `lengths` Int32[B]."""
        return Ranking(
            starts,
            lengths,
            self.older_ends,
            self.older_counts,
            self.row_counts,
            self.num_slots,
            self.width,
            self.num_sets,
            coverages=self.coverages,
        )

    def selection(self, positions: Tensor, row_counts: Tensor | None = None) -> Selection:
        """These positions Int32[B*J, K], one row for each index set, as what the step reads.

        `row_counts` Int32[B*J] are real, where a layer has counts of its own; all sets of a sequence have the same.
        """
        positions = positions.view(self.num_seqs, self.num_sets, -1)
        if row_counts is None:
            return Selection(positions, self.counts, self.num_tokens)
        counts = row_counts[:: self.num_sets].contiguous()
        num_tokens = tuple(counts.tolist())
        return Selection(positions[..., : max(num_tokens)].contiguous(), counts, num_tokens)

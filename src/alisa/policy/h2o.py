"""Heavy-Hitter Oracle: the most recent tokens, and the older ones with the largest sum over all rows so far.

H2O, arXiv 2306.14048, Algorithm 1. A token that is not selected is evicted: it loses the attention it had gathered, so
it returns only where a growing budget has room for more than the survivors (the published budget is fixed). The sum
runs over all heads of a layer; the published version decides head by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Selection, SelectionKernels, StepBatch
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.ranked import RankedStep
from alisa.policy.token_state import TokenState
from alisa.spec import AttentionShape


@dataclass(frozen=True)
class HeavyHitters(SelectionPolicy):
    """k recent and k older tokens of highest accumulated attention; what is not selected loses its score."""

    @property
    def uses_mass(self) -> bool:
        """The sum is made of it."""
        return True

    def observation_window(self, prompt_len: int) -> int:
        """All rows of the prompt: the sum runs over the whole history."""
        return prompt_len

    def start(
        self,
        shape: AttentionShape,
        *,
        max_num_seqs: int,
        num_tokens: int,
        max_len: int,
        device: torch.device,
        kernels: SelectionKernels,
    ) -> PolicyState:
        """A state of one number for each token of each layer."""
        return HeavyHittersState(
            self.budget,
            kernels,
            shape.num_layers,
            max_num_seqs=max_num_seqs,
            num_tokens=num_tokens,
            device=device,
        )


class HeavyHittersState(TokenState):
    """Accumulated mass Float64[L, T]; 0 for tokens that were evicted."""

    def __init__(
        self,
        budget: Budget,
        kernels: SelectionKernels,
        num_layers: int,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        self._budget = budget
        self._kernels = kernels
        self._sums = self._new_table((num_layers,), (), torch.float64, zeroed=True)
        self._step: RankedStep | None = None
        self._starts = self._all_ids = torch.empty(0)

    def observe_prompt(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Add prompt rows."""
        start += self._extents.start(req_idx)
        sums = self._sums[layer, None, start : start + mass.shape[2]]
        # Row after row: whatever pieces the rows come in, they are added up in the same order.
        sums.index_add_(0, torch.zeros(len(mass), dtype=torch.int64, device=mass.device), mass[:, 0].to(torch.float64))

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._step = RankedStep.plan(batch, self._budget, num_sets=1)
        super().begin(batch)

    def select(self, layer: int, query: Tensor) -> Selection:
        """The recent window and the heaviest older tokens."""
        step = self._step
        assert step is not None, "select comes after begin"
        positions = self._kernels.select(
            self._sums[layer],
            self._starts,
            step.older_ends,
            step.older_counts,
            step.row_counts,
            step.num_slots,
            step.width,
        )
        return step.selection(positions)

    def on_attended(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Add this step's row to what was read, and forget everything else."""
        sums, positions = self._sums[layer], selection.positions[:, 0]
        # Padding points at position 0: only real entries may keep or add anything there.
        real = torch.arange(positions.shape[1], device=positions.device) < selection.counts[:, None]
        ids = (self._starts[:, None] + positions).view(-1)
        kept = (sums.index_select(0, ids).view_as(mass[:, 0]) + mass[:, 0]) * real
        sums.index_fill_(0, self._all_ids, 0.0)
        sums.index_add_(0, ids, kept.view(-1))

    def _locate(self, batch: StepBatch, starts: Tensor) -> None:
        """Every token of every sequence, the last one repeated after its end."""
        columns = torch.arange(max(batch.lengths), device=starts.device)
        self._starts = starts
        self._all_ids = (starts[:, None] + columns.minimum(batch.length_counts[:, None] - 1)).view(-1)

"""Heavy-Hitter Oracle: the most recent tokens, and the older ones with the largest sum over all rows so far.

H2O, arXiv 2306.14048, Algorithm 1. A token that is not selected is evicted: it loses the attention it had gathered, so
it returns only where a growing budget has room for more than the survivors (the published budget is fixed). The sum
runs over all heads of a layer; the published version decides head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.policy.ranked import RankedStep
from alisa.spec import ModelSpec


@dataclass(frozen=True)
class HeavyHitters:
    """k recent and k older tokens of highest accumulated attention; what is not selected loses its score."""

    budget: Budget
    name: Literal["h2o"] = "h2o"
    timing: Literal["ahead", "in_layer"] = "ahead"

    @property
    def keeps_mass(self) -> bool:
        """The sum is made of it."""
        return True

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """The budget."""
        return self.budget.split(num_earlier)

    def num_sets(self, spec: ModelSpec) -> int:
        """One index set per layer."""
        return 1

    def seed_rows(self, prompt_len: int) -> int:
        """All rows of the prompt: the sum runs over the whole history."""
        return prompt_len

    def start(
        self,
        spec: ModelSpec,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> HeavyHittersState:
        """A state of one number per position, layer and sequence."""
        return HeavyHittersState(self.budget, spec.num_layers, max_num_seqs, capacity, device, kernels)


class HeavyHittersState:
    """Accumulated mass `[L, req_indices, capacity]`; 0 for tokens that were evicted."""

    def __init__(
        self,
        budget: Budget,
        num_layers: int,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None,
    ) -> None:
        self._kernels = kernels
        self._budget = budget
        self._sums = torch.zeros(num_layers, max_num_seqs, capacity, dtype=torch.float64, device=device)
        self._step: RankedStep | None = None

    @property
    def nbytes(self) -> int:
        """The sums."""
        return self._sums.nbytes

    def open(self, req_idx: int, num_tokens: int) -> None:
        """Clear the request index."""
        self._sums[:, req_idx, :num_tokens].zero_()

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Add prompt rows."""
        columns = slice(start, start + mass.shape[2])
        self._sums[layer, req_idx, columns] += mass[:, 0].sum(dim=0, dtype=torch.float64)

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys decide nothing here."""

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """Attention, as it is."""
        return attended.out

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._step = RankedStep.plan(batch, self._budget, num_sets=1, kernels=self._kernels)

    def select(self, layer: int, query: Tensor) -> Selection:
        """The recent window and the heaviest older tokens."""
        assert self._step is not None, "select comes after begin"
        return self._step.select(self._sums[layer], self._step.rows)

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Add this step's row to what was read, and forget everything else."""
        assert self._step is not None, "observe comes after begin"
        positions = selection.positions[:, 0].to(torch.int64)
        former = self._sums[layer].index_select(0, self._step.rows)
        # Padding points at position 0: only real entries may keep or add anything there.
        real = torch.arange(positions.shape[1], device=positions.device) < selection.counts[:, None]
        kept = torch.zeros_like(former)
        kept.scatter_add_(1, positions, (former.gather(1, positions) + mass[:, 0]) * real)
        self._sums[layer].index_copy_(0, self._step.rows, kept)

"""Every token, every time: the reference that each sparse policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from alisa.budget import Budget
from alisa.kernels.base import Selection, SelectionKernels, StepBatch
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.pattern import FixedState
from alisa.spec import AttentionShape


@dataclass(frozen=True)
class Dense(SelectionPolicy):
    """Attend to every cached token."""

    budget: Budget = field(default_factory=lambda: Budget(0.0))
    """Of no influence."""

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """All alike."""
        return 0, num_earlier

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
        """A state that holds the running step only."""
        return FixedState(_everything)


def _everything(batch: StepBatch) -> Selection:
    """All positions of every sequence; padding repeats 0."""
    longest = max(batch.lengths)
    positions = torch.arange(longest, dtype=torch.int32, device=batch.req_index.device)
    positions = positions.expand(len(batch.lengths), 1, longest)
    if min(batch.lengths) < longest:
        positions = positions.masked_fill(positions >= batch.length_counts[:, None, None], 0)
    return Selection(positions, batch.length_counts, batch.lengths)

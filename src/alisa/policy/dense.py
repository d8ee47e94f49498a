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

    @property
    def can_truncate(self) -> bool:
        """There is no state."""
        return True

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
        """See `make_state`."""
        return self.make_state()

    @staticmethod
    def make_state() -> PolicyState:
        """A state that holds the running step only."""
        return FixedState(_everything)


def _everything(batch: StepBatch) -> Selection:
    """All positions of every sequence, shared by its tokens; padding repeats 0."""
    device = batch.req_index.device
    lengths = dict(zip(batch.req_indices, batch.lengths, strict=True))  # the last token of a sequence sees most
    counts, entries = batch.length_counts, None
    if len(lengths) < len(batch.lengths):
        places = {req_idx: place for place, req_idx in enumerate(lengths)}
        entries = torch.tensor([places[req_idx] for req_idx in batch.req_indices], dtype=torch.int32, device=device)
        counts = torch.tensor(list(lengths.values()), dtype=torch.int32, device=device)
    longest = max(batch.lengths)
    positions = torch.arange(longest, dtype=torch.int32, device=device).expand(len(lengths), 1, longest)
    if min(lengths.values()) < longest:
        positions = positions.masked_fill(positions >= counts[:, None, None], 0)
    return Selection(positions, batch.length_counts, batch.lengths, entries)

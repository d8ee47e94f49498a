"""Patterns that look at nothing but the position: the baselines that every learned choice must beat.

`local` is the sliding window of Longformer (arXiv 2004.05150); `strided` adds older tokens at equal distances, as in
the Sparse Transformer (arXiv 1904.10509); `streaming` keeps the first tokens, the attention sinks of StreamingLLM
(arXiv 2309.17453), in addition to the window, at their original positions. All three read as many tokens as `swa` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alisa.kernels.base import Selection, SelectionKernels, StepBatch
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.spec import AttentionShape

NUM_SINKS = 4
"""First tokens that `streaming` keeps: StreamingLLM, section 3.2, finds that four suffice."""


class FixedState(PolicyState):
    """One selection for each step, the same for every layer.

    Args:
        choose: makes it from the lengths of the batch.
    """

    def __init__(self, choose: Callable[[StepBatch], Selection]) -> None:
        self._choose = choose
        self._selection: Selection | None = None

    def begin(self, batch: StepBatch) -> None:
        """Choose."""
        self._selection = self._choose(batch)

    def select(self, layer: int, query: Tensor) -> Selection:
        """What was chosen."""
        assert self._selection is not None, "select comes after begin"
        return self._selection

    def fixed_selection(self) -> Selection | None:
        """What was chosen."""
        return self._selection


@dataclass(frozen=True)
class Pattern(SelectionPolicy):
    """A fixed choice of positions for every length, the same in all layers; subclasses define `positions`."""

    @property
    def can_truncate(self) -> bool:
        """There is no state."""
        return True

    def positions(self, num_earlier: int) -> list[int]:
        """Positions below `num_earlier` that are read, ascending: as many as the two numbers of `reads` say."""
        raise NotImplementedError

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
        return FixedState(self._choose)

    def _choose(self, batch: StepBatch) -> Selection:
        """Positions of every sequence and its new token, padded to the longest list."""
        patterns = (self,) * len(batch.lengths)
        if batch.budgets is not None:
            patterns = tuple(replace(self, budget=budget) for budget in batch.budgets)
        lists = [[*own.positions(length - 1), length - 1] for own, length in zip(patterns, batch.lengths, strict=True)]
        counts = tuple(len(positions) for positions in lists)
        padded = [positions + [0] * (max(counts) - len(positions)) for positions in lists]
        device = batch.req_index.device
        return Selection(
            torch.tensor(padded, dtype=torch.int32, device=device)[:, None],
            torch.tensor(counts, dtype=torch.int32, device=device),
            counts,
        )


@dataclass(frozen=True)
class Local(Pattern):
    """The whole budget as one window."""

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """Recent tokens alone."""
        return sum(self.budget.split(num_earlier)), 0

    def positions(self, num_earlier: int) -> list[int]:
        """The most recent."""
        return list(range(num_earlier - sum(self.budget.split(num_earlier)), num_earlier))


@dataclass(frozen=True)
class Strided(Pattern):
    """A window, and tokens at equal distances before it."""

    def positions(self, num_earlier: int) -> list[int]:
        """Distances are counted back from the window."""
        recent, older = self.budget.split(num_earlier)
        window = num_earlier - recent
        spaced = [window - 1 - (window * i) // older for i in range(older)]
        return [*reversed(spaced), *range(window, num_earlier)]


@dataclass(frozen=True)
class Streaming(Pattern):
    """The first tokens, and the rest of the budget as a window."""

    def positions(self, num_earlier: int) -> list[int]:
        """Sinks first; all tokens while they fit."""
        num_read = sum(self.budget.split(num_earlier))
        sinks = min(NUM_SINKS, num_read)
        window = max(sinks, num_earlier - (num_read - sinks))
        return [*range(sinks), *range(window, num_earlier)]

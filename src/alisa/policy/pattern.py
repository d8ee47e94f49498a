"""Patterns that look at nothing but the position: the baselines that every learned choice must beat.

`local` is the sliding window of Longformer (arXiv 2004.05150); `strided` adds every so-manyth older token, as in the
Sparse Transformer (arXiv 1904.10509); `streaming` keeps the first tokens, the attention sinks of StreamingLLM
(arXiv 2309.17453), beside the window, at their original positions. All three read as many tokens as `swa` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.spec import ModelSpec

PatternName = Literal["local", "strided", "streaming"]

NUM_SINKS = 4
"""First tokens that `streaming` keeps: StreamingLLM, section 3.2, finds that four suffice."""


@dataclass(frozen=True)
class Pattern:
    """A fixed choice of positions for every length, the same in all layers."""

    name: PatternName
    budget: Budget
    timing: Literal["ahead", "in_layer"] = "ahead"

    @property
    def keeps_mass(self) -> bool:
        """The position decides."""
        return False

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """The budget; `local` spends all of it on its window."""
        recent, older = self.budget.split(num_earlier)
        return (recent + older, 0) if self.name == "local" else (recent, older)

    def num_sets(self, spec: ModelSpec) -> int:
        """One index set per layer."""
        return 1

    def seed_rows(self, prompt_len: int) -> int:
        """No history needed."""
        return 0

    def start(
        self,
        spec: ModelSpec,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> PatternState:
        """A state that holds the running step only."""
        return PatternState(self, device)

    def earlier(self, num_earlier: int) -> list[int]:
        """Positions below `num_earlier` that are read, ascending."""
        return _PATTERNS[self.name](num_earlier, *self.budget.split(num_earlier))


class PatternState:
    """The selection of the running step."""

    def __init__(self, pattern: Pattern, device: torch.device) -> None:
        self._pattern = pattern
        empty = torch.empty(0, dtype=torch.int32, device=device)
        self._selection = Selection(empty.view(0, 1, 0), empty, ())

    @property
    def nbytes(self) -> int:
        """Nothing is kept between steps."""
        return 0

    def open(self, req_idx: int, num_tokens: int) -> None:
        """Nothing to reset."""

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Never asked for: `seed_rows` is 0."""

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys decide nothing here."""

    def begin(self, batch: StepBatch) -> None:
        """Positions of every sequence, padded to the longest list."""
        lists = [[*self._pattern.earlier(length - 1), length - 1] for length in batch.lengths]
        counts = tuple(len(positions) for positions in lists)
        padded = [positions + [0] * (max(counts) - len(positions)) for positions in lists]
        device = batch.req_index.device
        self._selection = Selection(
            torch.tensor(padded, dtype=torch.int32, device=device)[:, None],
            torch.tensor(counts, dtype=torch.int32, device=device),
            counts,
        )

    def select(self, layer: int, query: Tensor) -> Selection:
        """The same for every layer."""
        return self._selection

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """History decides nothing here."""

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """Attention, as it is."""
        return attended.out


def _local(num_earlier: int, recent: int, older: int) -> list[int]:
    """The whole budget as one window."""
    return list(range(num_earlier - recent - older, num_earlier))


def _strided(num_earlier: int, recent: int, older: int) -> list[int]:
    """The window, and `older` of the rest at equal distances, counted back from the window."""
    window = num_earlier - recent
    spaced = [window - 1 - (window * i) // older for i in range(older)]
    return [*reversed(spaced), *range(window, num_earlier)]


def _streaming(num_earlier: int, recent: int, older: int) -> list[int]:
    """The first tokens, and the rest of the budget as a window."""
    sinks = min(NUM_SINKS, recent + older)
    window = max(sinks, num_earlier - (recent + older - sinks))
    return [*range(sinks), *range(window, num_earlier)]


_PATTERNS: dict[PatternName, Callable[[int, int, int], list[int]]] = {
    "local": _local,
    "strided": _strided,
    "streaming": _streaming,
}

"""Every token, every time: the reference that each sparse policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.spec import ModelSpec


class DenseState:
    """Holds nothing but the selection of the running step, which is the same for every layer."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._positions = torch.arange(capacity, dtype=torch.int32, device=device)
        self._selection = Selection(self._positions[:0].view(0, 1, 0), self._positions[:0], ())

    @property
    def nbytes(self) -> int:
        """One row of positions."""
        return self._positions.nbytes

    def open(self, req_idx: int, num_tokens: int) -> None:
        """Nothing to reset."""

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Never asked for: `seed_rows` is 0."""

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys decide nothing here."""

    def begin(self, batch: StepBatch) -> None:
        """All positions of every sequence; padding repeats 0."""
        longest = max(batch.lengths)
        positions = self._positions[:longest].expand(len(batch.lengths), 1, longest)
        if min(batch.lengths) < longest:
            positions = positions.masked_fill(positions >= batch.length_counts[:, None, None], 0)
        self._selection = Selection(positions, batch.length_counts, batch.lengths)

    def select(self, layer: int, query: Tensor) -> Selection:
        """The same for every layer."""
        return self._selection

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """History decides nothing here."""

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """Attention, as it is."""
        return attended.out


@dataclass(frozen=True)
class Dense:
    """Attend to every cached token."""

    name: Literal["dense"] = "dense"
    timing: Literal["ahead", "in_layer"] = "ahead"

    @property
    def keeps_mass(self) -> bool:
        """History decides nothing."""
        return False

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """All alike."""
        return 0, num_earlier

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
    ) -> DenseState:
        """A state that knows the longest sequence only."""
        return DenseState(capacity, device)

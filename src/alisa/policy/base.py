"""What a selection policy is: frozen parameters, and a state that holds all that changes.

A policy sees lengths and attention mass, never slots; keys and values only as they are appended. For each layer of each
decode step it says which positions are read, and may account for the others afterwards (`complete`). Once a step it is
told who is in the batch (`begin`), so that the work which does not depend on the layer is done once.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.spec import ModelSpec


class PolicyState(Protocol):
    """Everything that changes while a policy runs; made by `SelectionPolicy.start`."""

    @property
    def nbytes(self) -> int:
        """Memory of the state: counted in every comparison."""
        ...

    def open(self, req_idx: int, num_tokens: int) -> None:
        """A new sequence of up to `num_tokens` tokens takes this request index; nothing of its former owner remains."""
        ...

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Take in prompt rows: mass Float32[rows, J, N] of the queries at positions first, first + 1, ...

        The columns are positions start, start + 1, ...; a row may come in several pieces.
        """
        ...

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """New tokens at (req_idx, position), Int64[N] each, have these keys and values `[N, G, D]`; before `select`."""
        ...

    def begin(self, batch: StepBatch) -> None:
        """A decode step of these sequences starts; their new tokens are the last of their lengths."""
        ...

    def select(self, layer: int, query: Tensor) -> Selection:
        """Positions that this layer reads, the new token's own among them.

        The query `[B, H, D]` is for policies whose timing is `in_layer`.
        """
        ...

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Take in what the attention over `selection` gave: mass Float32[B, J, K], 0 on padding."""
        ...

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """The layer's output `[B, H, D]`: that of the attention, or what it is with the tokens not read in mind."""
        ...


class SelectionPolicy(Protocol):
    """Frozen parameters of a way to choose tokens."""

    @property
    def name(self) -> str:
        """The name users type."""
        ...

    @property
    def timing(self) -> Literal["ahead", "in_layer"]:
        """`ahead`: history decides, so the next step's rows are known a step early; `in_layer`: the query does."""
        ...

    @property
    def keeps_mass(self) -> bool:
        """Whether `observe` uses the mass; where it does not, nobody has to compute it."""
        ...

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """(recent, older): of n earlier tokens, the recent ones that every layer reads, and how many of the others."""
        ...

    def num_sets(self, spec: ModelSpec) -> int:
        """J: 1 for one index set per layer, G for one per KV head."""
        ...

    def seed_rows(self, prompt_len: int) -> int:
        """How many of the last rows of a prompt `seed` wants; 0 for none."""
        ...

    def start(
        self,
        spec: ModelSpec,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> PolicyState:
        """A fresh state for up to `max_num_seqs` sequences of up to `capacity` tokens."""
        ...

"""What a selection policy is: frozen parameters, and a state that holds all that changes.

A policy sees lengths and attention mass, never values or slots; keys only as they are appended. For each layer of each
decode step it says which positions are read. Once a step it is told who is in the batch (`begin`), so that the work
which does not depend on the layer is done once.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from alisa.budget import Budget as Budget  # policies take it from here
from alisa.spec import ModelSpec
from alisa.types import Selection, StepBatch


class PolicyState(Protocol):
    """Everything that changes while a policy runs; made by `SelectionPolicy.start`."""

    @property
    def nbytes(self) -> int:
        """Memory of the state: counted in every comparison."""
        ...

    def open(self, lane: int, num_tokens: int) -> None:
        """A new sequence of up to `num_tokens` tokens takes this lane; nothing of its former owner remains."""
        ...

    def seed(self, layer: int, lane: int, first: int, start: int, mass: Tensor) -> None:
        """Take in prompt rows: mass Float32[rows, J, N] of the queries at positions first, first + 1, ...

        The columns are positions start, start + 1, ...; a row may come in several pieces.
        """
        ...

    def remember(self, layer: int, lane_ids: Tensor, positions: Tensor, keys: Tensor) -> None:
        """New tokens at (lane, position), Int64[N] each, have these keys `[N, G, D]`; comes before `select`."""
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
        num_lanes: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> PolicyState:
        """A fresh state for up to `num_lanes` sequences of up to `capacity` tokens."""
        ...


class SelectionKernels(Protocol):
    """Native forms of what a scored policy does for each layer of each step; None: plain torch, their slow twin."""

    def select(
        self,
        scores: Tensor,
        lanes: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
    ) -> Tensor:
        """Positions Int32[N, num_slots], ascending, 0 behind `counts[i]`.

        Of positions [0, older_ends[i]) the `older_counts[i]` with the largest `scores[lanes[i]]` (the older of two
        equals), then those from `older_ends[i]` on. Scores are float rows; lanes Int64[N], the others Int32[N].
        """
        ...

    def observe(
        self,
        sums: Tensor,
        buckets: Tensor,
        sum_starts: Tensor,
        bucket_starts: Tensor,
        positions: Tensor,
        counts: Tensor,
        mass: Tensor,
    ) -> None:
        """Add mass Float32[N, K] at positions Int32[N, K] to sums (Float64) and buckets (Float32).

        Row i begins at element `sum_starts[i]` and `bucket_starts[i]` (Int64[N]); `counts[i]` entries are real.
        """
        ...

    def sketch_append(self, codes: Tensor, ranges: Tensor, ids: Tensor, keys: Tensor, bits: int) -> None:
        """The sketch holds keys `[N, G, D]`, a float dtype, at rows `ids` Int64[N]: see `alisa.policy.sketch`.

        `codes` is UInt8[T, G, P] with P = ceil(D * bits / 8), `ranges` Float16[T, G, 2]; bits are 2, 4 or 8.
        """
        ...

    def sketch_scores(
        self,
        query: Tensor,
        codes: Tensor,
        ranges: Tensor,
        bits: int,
        starts: Tensor,
        lengths: Tensor,
        width: int,
        num_sets: int,
    ) -> Tensor:
        """Approximate attention weights Float32[B, num_sets, width] for query `[B, H, D]`, 0 from `lengths[b]` on.

        Sequence b has rows `starts[b]` (Int64[B]) to `starts[b] + lengths[b] - 1` (Int32[B]) of the sketch. Weights
        are summed over the heads of an index set: all of them (1), or those of one KV head (G).
        """
        ...

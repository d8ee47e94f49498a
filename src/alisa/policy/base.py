"""What a selection policy is: frozen parameters, and a state that holds all that changes.

A policy sees lengths and attention mass, never slots; keys and values only as they are appended. For each layer of each
decode step it says which positions are read, and may account for the others afterwards (`complete`). Once a step it is
told who is in the batch (`begin`), so that the work which does not depend on the layer is done once.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from alisa.budget import Budget as Budget  # policies take it from here
from alisa.spec import ModelSpec
from alisa.types import Attended, Selection, StepBatch


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

    def remember(self, layer: int, lane_ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """New tokens at (lane, position), Int64[N] each, have these keys and values `[N, G, D]`; before `select`."""
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

    def sketch_select(
        self,
        query: Tensor,
        codes: Tensor,
        ranges: Tensor,
        bits: int,
        starts: Tensor,
        lengths: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
        num_sets: int,
    ) -> tuple[Tensor, Tensor]:
        """Positions Int32[B * J, num_slots] to read for query `[B, H, D]`, and each head's share of weight `[B, H]`.

        Sequence b has rows `starts[b]` (Int64[B]) to `starts[b] + lengths[b] - 1` (Int32[B], at most `width`) of the
        sketch. Their approximate attention weights, summed over the heads of an index set (J = `num_sets`: one set for
        all heads, or G, one for those of each KV head), rank them; the others are as in `select`, Int32[B * J]. A share
        is the part of a head's approximate weight that lies on the tokens read.
        """
        ...

    def mean_add(self, sums: Tensor, lane_ids: Tensor, values: Tensor) -> None:
        """Sums Float64[lanes, G, D] have grown by the values `[N, G, D]` of tokens of lanes Int64[N]."""
        ...

    def mean_blend(self, sums: Tensor, lane_ids: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """Blend: share * out + (1 - share) * mean, `[B, H, D]` as out; see `alisa.policy.mean_value`.

        The mean of lane `lane_ids[b]` (Int64[B]) is its sum by `lengths[b]` (Int32[B]); shares are Float32[B, H].
        """
        ...

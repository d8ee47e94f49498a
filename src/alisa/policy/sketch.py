"""Query-aware selection: rank all tokens against the current query by a low-bit sketch of their keys.

The sketch of every token stays on the device; it is small against the row it stands for (4 bits: 40 of 256 bytes for
a head of 64 values in 16 bits). Each step computes approximate attention weights of all tokens from it, sums them over
the heads of an index set and reads the winners in full. A token can return at any time, which the history-based
policies cannot offer. Ranking by cheap keys: SparQ (arXiv 2312.04985), InfiniGen (2406.19707), Quest (2406.10774).

`oracle` is the same with exact keys: the best that a choice of one index set per layer can do, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.policy.base import Budget, SelectionKernels
from alisa.policy.ranked import RankedStep
from alisa.spec import ModelSpec
from alisa.types import Selection, StepBatch

SketchBits = Literal[2, 4, 8]


@dataclass(frozen=True)
class KeySketch:
    """k recent tokens, and the k older ones with the largest approximate attention weight for the current query."""

    budget: Budget
    bits: SketchBits | None = 4
    """Bits per key value; None keeps the exact keys (the oracle)."""
    timing: Literal["ahead", "in_layer"] = "in_layer"

    @property
    def name(self) -> str:
        """`sketch` or `oracle`."""
        return "oracle" if self.bits is None else "sketch"

    @property
    def keeps_mass(self) -> bool:
        """The query decides."""
        return False

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """The budget."""
        return self.budget.split(num_earlier)

    def num_sets(self, spec: ModelSpec) -> int:
        """One index set per layer: weights are summed over all heads."""
        return 1

    def seed_rows(self, prompt_len: int) -> int:
        """No history needed."""
        return 0

    def start(
        self,
        spec: ModelSpec,
        num_lanes: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> KeySketchState:
        """A state of `bits / 8` bytes per key value, and 8 bytes per key."""
        return KeySketchState(self, spec, num_lanes, capacity, device, kernels)


class KeySketchState:
    """Codes `UInt8[L, lanes*capacity, G, D*bits/8]` with a step and a minimum for each key (or the keys themselves)."""

    def __init__(
        self,
        policy: KeySketch,
        spec: ModelSpec,
        num_lanes: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None,
    ) -> None:
        self._kernels = kernels
        self._budget = policy.budget
        self._bits = policy.bits
        self._capacity = capacity
        self._head_dim = spec.head_dim
        keys = (spec.num_layers, num_lanes * capacity, spec.num_kv_heads)
        if policy.bits is None:
            self._codes = torch.empty(*keys, spec.head_dim, device=device)
            self._range = torch.empty(0, device=device)
        else:
            self._codes = torch.empty(*keys, -(-spec.head_dim * policy.bits // 8), dtype=torch.uint8, device=device)
            self._range = torch.empty(*keys, 2, device=device)
        self._step: RankedStep | None = None
        self._ids = torch.empty(0)
        self._hidden = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Codes and their ranges."""
        return self._codes.nbytes + self._range.nbytes

    def open(self, lane: int, num_tokens: int) -> None:
        """Nothing to reset: a key is written before it is read."""

    def seed(self, layer: int, lane: int, first: int, start: int, mass: Tensor) -> None:
        """Never asked for: `seed_rows` is 0."""

    def remember(self, layer: int, lane_ids: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Sketch the new keys."""
        ids = lane_ids * self._capacity + positions
        if self._bits is None:
            self._codes[layer].index_copy_(0, ids, keys.float())
            return
        codes, ranges = sketch(keys.float(), self._bits)
        self._codes[layer].index_copy_(0, ids, codes)
        self._range[layer].index_copy_(0, ids, ranges)

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._step = RankedStep.plan(batch, self._budget, num_sets=1, kernels=self._kernels)
        columns = torch.arange(max(batch.lengths), device=batch.lane_ids.device)
        self._ids = (batch.lane_ids[:, None] * self._capacity + columns).view(-1)
        self._hidden = columns >= batch.length_counts[:, None]

    def select(self, layer: int, query: Tensor) -> Selection:
        """Approximate weights of every token for this query, and the best of them."""
        step = self._step
        assert step is not None, "select comes after begin"
        keys = self._codes[layer].index_select(0, self._ids)
        if self._bits is not None:
            keys = unsketch(keys, self._range[layer].index_select(0, self._ids), self._bits, self._head_dim)
        num_seqs, num_heads, head_dim = query.shape
        num_kv_heads = keys.shape[1]
        keys = keys.view(num_seqs, -1, num_kv_heads, head_dim).permute(0, 2, 3, 1)  # [B, G, D, S]
        grouped = query.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim) * head_dim**-0.5
        scores = (grouped @ keys).masked_fill(self._hidden[:, None, None], -torch.inf)
        return step.select(scores.softmax(dim=-1).sum(dim=(1, 2)), torch.arange(num_seqs, device=query.device))

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """History decides nothing here."""


def sketch(keys: Tensor, bits: SketchBits) -> tuple[Tensor, Tensor]:
    """Quantise keys Float32[N, G, D] between their own minimum and maximum, per token and head.

    Returns:
        Codes UInt8[N, G, D*bits/8], low bits first, and (step, minimum) Float32[N, G, 2].
    """
    low, high = keys.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((keys - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.uint8)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, bits, device=keys.device, dtype=torch.uint8)
    packed = (padded.unflatten(-1, (-1, per_byte)) << shifts).sum(dim=-1).to(torch.uint8)
    return packed, torch.cat((step, low), dim=-1)


def unsketch(codes: Tensor, ranges: Tensor, bits: SketchBits, head_dim: int) -> Tensor:
    """The keys `[N, G, D]` that the codes stand for."""
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    values = ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :head_dim]
    return values.float() * ranges[..., :1] + ranges[..., 1:]

"""The values that cross package borders: small, frozen, and free of torch at run time.

`kv`, `attention`, `policy` and `model` never import each other; what they hand around is defined here. Decisions
(`StepPlan`) are integers only, so that the engine can execute them, a simulator price them and a search rank them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from alisa.spec import DTYPE_BYTES

if TYPE_CHECKING:
    from torch import Tensor


class Medium(StrEnum):
    """Where a row lies. On a CPU-only machine DEVICE is a capped arena in RAM and HOST is absent."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Phase(StrEnum):
    """The three phases of token-level scheduling (ALISA, section 5)."""

    DEVICE = "device"
    DEVICE_HOST = "device-host"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive tokens of one sequence that goes through the model in one step.

    Positions [start, start + count) of lane `lane`; `count` is 1 in a decode step.
    """

    lane: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Length of the sequence after this step: the position behind the segment."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of positions [start, end) of one lane, all layers, that go from one medium to another (None: deleted).

    Moves go down only. One out of DEVICE may name positions that this step computes: they are written below at once.
    """

    lane: int
    start: int
    end: int
    source: Medium
    target: Medium | None

    @property
    def num_tokens(self) -> int:
        """Tokens that move."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that was decided about one step, before any of it is done."""

    step: int
    phase: Phase
    prefill: bool
    """True: the segments are pieces of prompts; False: one new token for each sequence."""
    segments: tuple[Segment, ...]
    moves: tuple[Move, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(segment.count for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the KV store moved and looked up in one step; a row is one token of one layer."""

    fetched_rows: int = 0
    """Read from a lower tier."""
    stored_rows: int = 0
    """Written to a lower tier, remnants included."""
    deleted_rows: int = 0
    rebuilt_rows: int = 0
    """Recomputed from their remnants because a layer wanted to read them."""
    moved_bytes: int = 0
    """Between the device and lower tiers, both ways, remnants included."""
    lookups: int = 0
    """Selected rows that have left the device's own part: each is in the hot cache or must be brought."""
    hits: int = 0
    """Those of them that the hot cache held."""
    wait_s: float = 0.0
    """Time the model stood still for rows that were on their way."""
    busy_s: float = 0.0
    """Time that transfers took in their own threads; what is not waited for is hidden behind the arithmetic."""

    @property
    def hidden_share(self) -> float:
        """Share of the transfer time that the model did not wait for; 1 when nothing was moved."""
        return max(0.0, 1 - self.wait_s / self.busy_s) if self.busy_s > 0 else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that the hot cache answered; 1 when there were none."""
        return self.hits / self.lookups if self.lookups else 1.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, measured. Times are host seconds; the parts add up to `wall_s`."""

    step: int
    phase: Phase
    prefill: bool
    num_sequences: int
    num_tokens: int
    tokens_attended: int
    """Cached tokens read by decode attention, summed over sequences and layers."""
    tokens_dense: int
    """What dense attention would have read, counted the same way."""
    kv_rows: int
    """Tokens that are cached after the step, wherever their rows lie, deleted ones not counted."""
    kv_bytes: int
    """Bytes of the device arena in use after the step, over all layers, the hot cache included."""
    host_bytes: int
    disk_bytes: int
    """Bytes in use in the lower tiers, remnants included."""
    deleted_tokens: int
    """Tokens of running sequences whose rows are deleted."""
    num_preempted: int
    """Sequences that had to give way before this step."""
    traffic: Traffic
    linear_s: float
    """The decoder without the attend seam: linear layers, norms, activations, embedding and logits."""
    attention_s: float
    """Writing new rows and attending over rows."""
    selection_s: float
    """Choosing the tokens to read and keeping the scores that choose them."""
    transfer_s: float
    """Looking rows up, asking for them, and waiting for those that were not there in time."""
    sampling_s: float
    other_s: float
    wall_s: float


CODE_BITS: dict[str, int] = {"int8": 8, "int4": 4}
"""Bits of one value in an integer row."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What the bytes of one row mean: K then V of one token of one layer, `[2, G, D]` of `dtype`.

        float       [ K: G x D values        ][ V: G x D values        ]
        int8, int4  [ K: G x head_bytes codes ][ V: G x head_bytes codes ][ (scale, minimum) float16: G of K, G of V ]

    A head of int4 codes has ceil(D / 2) bytes; byte i holds code i (low half) and code i + ceil(D / 2) (high half).
    """

    dtype: str
    num_kv_heads: int
    """G"""
    head_dim: int
    """D"""

    @property
    def head_bytes(self) -> int:
        """Bytes of the values or codes of one head of K or of V."""
        if self.dtype in CODE_BITS:
            return -(-self.head_dim * CODE_BITS[self.dtype] // 8)
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one layer."""
        scale_bytes = 4 if self.dtype in CODE_BITS else 0
        return 2 * self.num_kv_heads * (self.head_bytes + scale_bytes)


class Codec(Protocol):
    """Turns K and V into rows of bytes and back; the only place besides the kernels that knows what a row holds."""

    @property
    def format(self) -> RowFormat:
        """Layout of the rows this codec writes."""
        ...

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """K and V `[N, G, D]` of any float dtype as rows `UInt8[N, row_bytes]`."""
        ...

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `UInt8[N, row_bytes]` as k, v `[N, G, D]` in a float dtype."""
        ...


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The sequences of one decode step: counts on the host, indices on the device."""

    lanes: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each sequence, the one of this step included; its position is `length - 1`."""
    lane_ids: Tensor
    """Int64[B], the lanes on the device."""
    length_counts: Tensor
    """Int32[B], the lengths on the device."""


Rebuild = Callable[[int, "Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""layer, hidden `[N, C]`, positions Int64[N] -> k, v `[N, G, D]`: what a deleted row is made from again."""


class Selection(NamedTuple):
    """The tokens one layer attends to in one decode step."""

    positions: Tensor
    """Int32[B, J, K]: logical positions, ascending, without duplicates; entries from `counts[b]` on are padding (0)."""
    counts: Tensor
    """Int32[B]: how many entries of each row are real."""
    num_tokens: tuple[int, ...]
    """The same counts, known on the host without asking the device."""


class Attended(NamedTuple):
    """What a decode-attention kernel returns."""

    out: Tensor
    """[B, H, D], in the dtype of the queries."""
    mass: Tensor
    """Float32[B, J, K]: attention weights summed over the heads that share the index set; 0 on padding."""
    log_sum_exp: Tensor
    """Float32[B, H]: log of the sum of exponentials of the scaled scores; merges partial results exactly."""

"""Every protocol between the kernels and those who call them, documented once.

`alisa.kernels.choose` finds who implements it.
Values that cross the border are plain tuples of tensors: counts are known on the host, indices lie on the device.

A little over 400 lines, because it is all of that border, and half of it is words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alisa.budget import Budget
from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels import _native

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
Bytes = NDArray[np.uint8]
Slots = NDArray[np.int64]


Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""The seam between a model and everything that knows a cache: one function, called once per layer.

layer, q `[B, T, H, D]`, k `[B, T, G, D]`, v `[B, T, G, D]`, hidden `[B, T, C]` -> out `[B, T, H, D]`.

hidden is what q, k and v were projected from: `project_kv` makes k and v from it again.

q and k are already rotated. k and v may be views into the joint K and V product: their last dimension is contiguous,
their token stride `2 * G * D`. The next layer may overwrite all four: whoever wants to keep them takes a copy.
"""

AttendAll = Callable[[Tensor, Tensor, Tensor], AbstractContextManager["_native.LayerAttention"]]
"""The seam for a decode step whose layers are all native, attention included: no Python runs between them.

q `[B, 1, H, D]`, k and v `[B, 1, G, D]`: where those of every layer will be, one layer after the other. Inside the
context the layers run; when it ends, what they read is known.
"""


class Codec(Protocol):
    """Turns K and V into rows of bytes and back; only it and the kernels know what a row holds."""

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
    """The new tokens of one decode step: counts on the host, indices on the device.

    Several of one sequence follow each other. Each sees the sequence up to itself, as if it had a step of its own.
    """

    req_indices: tuple[int, ...]
    """Whose token it is."""
    lengths: tuple[int, ...]
    """Tokens of the sequence up to this one; its position is `length - 1`."""
    req_index: Tensor
    """Int64[B], the req_indices on the device."""
    length_counts: Tensor
    """Int32[B], the lengths on the device."""
    budgets: tuple[Budget, ...] | None = None
    """How much may be read for each token; None: what the policy's own budget says."""


Rebuild = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""layer, hidden `[N, C]`, positions Int64[N] -> k, v `[N, G, D]`: what a deleted row is made from again."""


class Selection(NamedTuple):
    """The tokens one layer attends to in one decode step, of B queries."""

    positions: Tensor
    """Int32[S, J, K]: logical positions, ascending, without duplicates; what no query reads is padding (0)."""
    counts: Tensor
    """Int32[B]: how many positions each query reads, from the first on."""
    num_tokens: tuple[int, ...]
    """The same counts, known on the host without asking the device."""
    entries: Tensor | None = None
    """Int32[B], ascending: which of the S each query reads; None: each its own, and S is B.

    The queries of a sequence that read all of it share one, the S in the order of the step's chunks: what they read is
    looked up, loaded and read from memory once.
    """

    def by_query(self) -> Tensor:
        """Int32[B, J, K]: `positions` of each query."""
        return self.positions if self.entries is None else self.positions[self.entries.long()]


class Attended(NamedTuple):
    """What a decode-attention kernel returns."""

    out: Tensor
    """[B, H, D], in the dtype of the queries."""
    mass: Tensor
    """Float32[B, J, K]: attention weights summed over the heads that share the index set; 0 on padding."""
    log_sum_exp: Tensor
    """Float32[B, H]: log of the sum of exponentials of the scaled scores; merges partial results exactly."""


class AttentionPieces(Protocol):
    """One selection that is attended to piece by piece."""

    def add(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor) -> None:
        """Attend to columns begins[s] to ends[s] - 1 of each selection s; none where these are equal.

        Every column comes once, those of a selection in ascending order. A piece begins at a multiple of the kernel's
        `piece_columns`, and ends at one or at the last column.

        Args:
            rows: UInt8[R, row_bytes]; only read during this call.
            slots: Int32[S, 1, K]; only read where the piece is.
            begins: Int32[S], on the device of the kernel as all of these are.
            ends: Int32[S].
        """
        ...

    def finish(self) -> Attended:
        """What one call gives for the whole selection, to the last bit; all pieces have been added."""
        ...


class DecodeKernel(Protocol):
    """Attention of new tokens over selected rows of one layer.

    What a token gets depends on its own query, rows and slots only, to the last bit.
    """

    def __call__(
        self,
        q: Tensor,
        rows: Tensor,
        codec: Codec,
        slots: Tensor,
        counts: Tensor,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> Attended:
        """Attend with q `[B, H, D]` to rows UInt8[R, row_bytes] at slots Int32[S, J, K].

        Query b reads the first `counts[b]` (Int32[B], at least 1) slots of each set of `entries[b]` (see `Selection`).
        J = 1: one index set for all heads; J = G: one for each KV head. `softcap` is that of `AttentionShape`.
        """
        ...

    def in_pieces(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_slots: int,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> AttentionPieces:
        """The same for one index set of width `num_slots` whose rows do not lie in one place at one time."""
        ...

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """Columns of the smallest piece: pieces begin and end at multiples of it."""
        ...


class KeyBlock(NamedTuple):
    """Consecutive cached tokens: k and v `[N, G, D]` of positions start, start + 1, ..."""

    start: int
    k: Tensor
    v: Tensor


class ObservedMass(NamedTuple):
    """What rows of attention show of consecutive tokens."""

    first: int
    """Position of the first row."""
    start: int
    """Position of the first token attended."""
    mass: Tensor
    """Float32[rows, J, N]: weights summed over the heads of each index set."""


class PrefillKernel(Protocol):
    """Dense attention of one piece of a prompt, and the weights of its last rows.

    Into which pieces a section of the prompt is cut changes no bit of a token's result on a CPU.
    """

    def __call__(
        self,
        q: Tensor,
        own: KeyBlock,
        section_len: int,
        past: Callable[[], Iterable[KeyBlock]],
        num_observed: int,
        num_sets: int,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Iterator[ObservedMass]]:
        """Attend causally with q `[T, H, D]` to `own`, of which it is the last T tokens, and to everything before.

        Args:
            q: `[T, H, D]`.
            own: keys and values `[N, G, D]` of a section of the prompt from its begin to the last of these tokens.
            section_len: tokens of the whole section, at least N; the rest of it comes in later pieces.
            past: reads the blocks before it, in order; asked again for the weights. Empty when `own` starts at 0.
                With a window, those that no query sees may be left out.
            num_observed: how many of the last rows are wanted, 0 to T.
            num_sets: J, 1 for one index set per layer or G for one per KV head.
            window: tokens that each query sees, itself included; None: all. No rows are observed through one.
            softcap: of the scores, as in `AttentionShape`.
            sinks: Float32[H], logits that join the softmax of each head; None: none do. They are left out of the
                weights of the last rows.

        Returns:
            The output `[T, H, D]`, and the weights of the last rows, computed as they are asked for.
        """
        ...


class SparsePrefillKernel(Protocol):
    """Attention of one piece of a prompt to chosen blocks of earlier keys.

    Blocks are of 64 tokens from the first of the sequence on, and the queries of a block share a choice. So into which
    pieces a section is cut changes no bit, as long as they end where blocks do.
    """

    def __call__(
        self,
        q: Tensor,
        own: KeyBlock,
        past: Callable[[], Iterable[KeyBlock]],
        alpha: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally with q `[T, H, D]` to `own`, of which it is the last T tokens, and to what is chosen before.

        Blocks before a query's own are chosen by the means of their keys: see `reference.sparse_prefill`. A last block
        that is not whole reads all.

        Args:
            q: `[T, H, D]`; the first is the first of a block.
            own: as in `PrefillKernel`.
            past: reads the blocks before `own`, each whole blocks of 64 keys; asked twice, first for the keys' means.
            alpha: part of the largest weight that a block's has to be, 0 (all are read) up to but not 1.
            softcap: as in `PrefillKernel`; so are the sinks.
            sinks: None: the model has none.

        Returns:
            The output `[T, H, D]`.
        """
        ...


class AppendKernel(Protocol):
    """Writes new rows where they will stay, as the codec of the format would."""

    def __call__(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's pool UInt8[R, row_bytes]."""
        ...


class HeadTurn(Protocol):
    """Heads in another basis."""

    def __call__(self, heads: Tensor) -> Tensor:
        """Heads `[..., H, D]`, each times the matrix of its KV head and less a vector, in their dtype.

        The sums are in float32. On a CPU what a token gets depends on it alone, to the last bit.
        """
        ...


class MoveRows(Protocol):
    """Moves rows between a file and memory; a native one does not hold the interpreter."""

    def __call__(self, file: int, offsets: Slots, memory: Bytes, rows: Slots, *, write: bool) -> int:
        """Rows Int64[n] of memory UInt8[N, row_bytes] are read from, or written to, ascending offsets Int64[n].

        Returns the bytes moved: fewer than asked for if the file ends.

        Raises:
            OSError: the system refused.
        """
        ...


class Sketch(NamedTuple):
    """Low-bit copies of keys or values, one for each token and KV head: see `alisa.kernels.reference.sketch`.

    A long head is cut into equal parts, each with a range of its own; those of a head follow each other.
    """

    codes: Tensor
    """UInt8[T, G * parts, P], contiguous, with P = ceil(D / parts * bits / 8)."""
    ranges: Tensor
    """Float16[T, G * parts, 2], contiguous: (step, minimum) of each part."""
    bits: int
    """2, 4 or 8."""
    parts: int = 1
    """Of a head; D is a multiple of it."""

    @property
    def num_kv_heads(self) -> int:
        """G, heads of keys or values."""
        return self.codes.shape[1] // self.parts


class Panels(NamedTuple):
    """A weight `[out, in]` in the order in which native products read it; kernels/native/csrc/model/matrix.h explains.

    Output channels lie in panels of 64. The channels of each part begin with a panel of their own.
    """

    format: WeightFormat
    codes: Tensor
    """`[panels, steps, 64, inputs of a step]`: one float32, two bfloat16, four UInt8; or UInt8[panels, steps, 64, 4]
    with eight inputs in 4 bits."""
    scales: Tensor | None
    """int8: Float32[out]."""
    ranges: Tensor | None
    """int4: Float16[panels, spans, 2, 64], scales and minima of 32 inputs each."""
    num_in: int
    num_out: int
    parts: int
    """2: gate and up of a gated MLP."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.ranges) if tensor is not None)


class Ranking(NamedTuple):
    """What a step ranks and how much it chooses: the same for every layer. J index sets make J rows of a sequence."""

    starts: Tensor
    """Int64[B]: first row of each sequence in the sketch."""
    lengths: Tensor
    """Int32[B]: rows of each sequence, at least 1."""
    older_ends: Tensor
    """Int32[B * J]: this and the next four as in `SelectionKernels.select`."""
    older_counts: Tensor
    """Int32[B * J]"""
    counts: Tensor
    """Int32[B * J], the same for all sets of a sequence."""
    num_slots: int
    """K"""
    width: int
    """At least the largest length."""
    num_sets: int
    """J: 1 for all heads together, or G, one for the heads of each KV head."""
    softcap: float | None = None
    """Of the scores, as in `AttentionShape`."""
    coverages: Tensor | None = None
    """Float64[B]. Where one is above 0, the counts of its sequence are the most, and as few older tokens are chosen as
    have this part of the weight of every index set, together with those from `older_ends` on; as many in all sets of a
    sequence. Weights of single tokens, summed over the heads of a set, are cut to whole 2^-32, so that sums do not
    depend on an order. None: all are 0."""


class Chosen(NamedTuple):
    """What a step reads."""

    positions: Tensor
    """Int32[B * J, K]"""
    shares: Tensor
    """Float32[B, H]: the part of each head's approximate weight that lies on the tokens read."""
    counts: Tensor
    """Int32[B * J], of the positions; those of the ranking where it asks for no coverage."""


class Completed(NamedTuple):
    """What a step reads, and what takes the place of what it does not."""

    chosen: Chosen
    rest: Tensor
    """Float32[B, H, D]: the values of the other tokens at their approximate weights, added up."""


class SelectionKernels(Protocol):
    """What a scored policy does for each layer of each step; `kernels.reference.selection` is it in plain torch."""

    def select(
        self,
        scores: Tensor,
        starts: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
    ) -> Tensor:
        """Positions Int32[N, num_slots], ascending, 0 after `counts[i]`.

        Of positions [0, older_ends[i]) the `older_counts[i]` with the largest scores (the older of two equals), then
        those from `older_ends[i]` on. Position p of row i has the score at element `starts[i] + p` (Int64[N]) of
        scores, contiguous Float32 or Float64 `[T]`; the others are Int32[N], and `width` is at least the largest of
        `older_ends`.
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

    def sketch_append(self, sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
        """The sketch holds these keys or values `[N, G, D]`, a float dtype, at rows `ids` Int64[N]."""
        ...

    def sketch_select(self, query: Tensor, keys: Sketch, ranking: Ranking) -> Chosen:
        """What to read for query `[B, H, D]`.

        The approximate attention weights of a sequence's rows, summed over the heads of an index set, rank them. A
        share is the part of a head's weight that lies on the tokens read: exactly 1 where everything is.
        """
        ...

    def sketch_complete(self, query: Tensor, keys: Sketch, values: Sketch, ranking: Ranking) -> Completed:
        """As `sketch_select`, and what the tokens that are not read add, by a sketch of the values of the same rows.

        Where a sequence reads everything its rest is exactly 0.
        """
        ...

    def rest_blend(self, out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
        """Blend: share * out + rest, `[B, H, D]` as out; where a share is 1, out to the bit.

        Shares are Float32[B, H], the rest Float32[B, H, D].
        """
        ...

    def mean_add(self, sums: Tensor, req_index: Tensor, values: Tensor) -> None:
        """Sums Float64[req_indices, G, D] have grown by the values `[N, G, D]` of tokens of req_indices Int64[N]."""
        ...

    def mean_blend(self, sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """Blend: share * out + (1 - share) * mean, `[B, H, D]` as out; see `alisa.policy.sketch`.

        The mean of req_idx `req_index[b]` (Int64[B]) is its sum by `lengths[b]` (Int32[B]); shares are Float32[B, H].
        """
        ...

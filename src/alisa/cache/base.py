"""What the attend seam needs of a KV store, whether its rows are all on the device or lie in several tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from alisa.errors import CapacityError
from alisa.kernels.base import Codec, Selection
from alisa.kernels.sketch_step import StepSlots
from alisa.outputs import Medium, Traffic
from alisa.scheduler.plan import ScheduledChunk, StepPlan


class Span(NamedTuple):
    """Columns begins[s] to ends[s] - 1 of each of the S entries of a selection."""

    begins: Tensor
    """Int32[S]."""
    ends: Tensor
    """Int32[S]."""


class KVChunk(NamedTuple):
    """Rows that one call of a decode kernel attends to; a selection is one chunk unless it is larger than the pool."""

    rows: Tensor
    """UInt8[N, row_bytes]: a pool and, after it, buffers that are valid until the next chunk is asked for."""
    slots: Tensor
    """Int32[S, J, K] into `rows`, where the chunk is."""
    span: Span | None
    """The columns that this chunk brings, see `AttentionPieces.add`; None: all of them."""


class DeviceRows(NamedTuple):
    """Where all rows of a step are."""

    layers: Sequence[Tensor]
    """Of each layer UInt8[R, row_bytes], always the same ones."""
    slots: StepSlots


class RowStore(Protocol):
    """Rows by (req_idx, position); see `KVStore` and `TieredStore`."""

    @property
    def codec(self) -> Codec:
        """Writes and reads rows."""
        ...

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        ...

    @property
    def max_length(self) -> int:
        """Longest sequence that can be opened, in tokens."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Sequences that can be open at the same time; their request indices are below this."""
        ...

    def open(self, req_idx: int, num_tokens: int) -> None:
        """The request index belongs to a sequence of up to `num_tokens` tokens; no rows are taken yet.

        The caller chooses an index that is not in use.

        Raises:
            CapacityError: sequences of this length were not provided for; nothing has changed.
        """
        ...

    def release(self, req_idx: int) -> None:
        """Every row of the sequence is gone from every tier; its room and its request index may be used at once.

        Callable between steps, in every state: rows may be on their way to the device or down, or prefetched for a
        step that does not come.
        """
        ...

    def length(self, req_idx: int) -> int:
        """Tokens stored for an open sequence, deleted ones included."""
        ...

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """Where each lower tier ends, see `alisa.scheduler.placement.base`; `(0,)` with no tiers."""
        ...

    def rebuildable(self, req_idx: int) -> int:
        """Positions below this have a hidden state, so that their rows may be deleted."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """The plan's moves are under way and its chunks have room; rows then come through `append`, layer by layer.

        A chunk with a source needs no room where the store shares rows; what is appended for it is there already.

        Raises:
            CapacityError: a chunk does not continue its sequence (nothing has changed), or there is no room.
        """
        ...

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """Write K and V `[N, G, D]` of one layer, tokens in the order of the step's chunks.

        hidden `[N, C]` is what they were projected from; a store that may delete rows needs it.
        """
        ...

    def copy(self, layer: int, chunk: ScheduledChunk) -> None:
        """The step's only chunk has the rows of its source, byte by byte; instead of `append`.

        The store keeps no hidden states.
        """
        ...

    def truncate(self, req_idx: int, length: int) -> None:
        """The sequence ends after `length` tokens, no more than it has; between steps."""
        ...

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """The rows that the tokens of the running decode step selected, ready to be read; usually one chunk."""
        ...

    def device_rows(self) -> DeviceRows | None:
        """The pool and the running step's slots, for a kernel that looks rows up itself; None: not all are there."""
        ...

    def prefetch(self, layer: int, req_indices: tuple[int, ...], selection: Selection) -> None:
        """A hint: the next step asks for this selection of these sequences. Missing rows start to load."""
        ...

    def read(self, layer: int, req_idx: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V `[end - start, G, D]` of these positions, wherever they lie."""
        ...

    @property
    def used_rows(self) -> int:
        """Tokens whose rows exist somewhere; rows that sequences share count once."""
        ...

    @property
    def deleted_tokens(self) -> int:
        """Tokens of open sequences whose rows are deleted."""
        ...

    def nbytes(self, medium: Medium) -> int:
        """Bytes of rows and hidden states in one medium."""
        ...

    @property
    def table_bytes(self) -> int:
        """Bytes that say where rows lie: in main memory, or on the device where kernels look them up."""
        ...

    def traffic(self) -> Traffic:
        """What was moved since the last call."""
        ...

    def failed(self) -> dict[int, str]:
        """Sequences whose rows could not be read or written since the last call, and why."""
        ...

    def check(self) -> None:
        """Assert that the bookkeeping is sound; callable whenever no step is running."""
        ...

    def close(self) -> None:
        """Files and threads are gone; the store is not used any more."""
        ...


def check_opening(store: RowStore, req_idx: int, num_tokens: int, *, in_use: bool) -> None:
    """See `RowStore.open`."""
    if num_tokens > store.max_length:
        raise CapacityError(
            f"A sequence of {num_tokens} tokens is longer than the {store.max_length} that the KV store was made for; "
            "raise --max-model-len."
        )
    assert 0 <= req_idx < store.max_num_seqs, f"request index {req_idx} of {store.max_num_seqs}"
    assert not in_use, f"request index {req_idx} is in use"


def check_continues(chunk: ScheduledChunk, length: int, max_length: int) -> None:
    """See `RowStore.begin`; the sequence has `length` tokens."""
    if chunk.start != length or chunk.end > max_length:
        raise CapacityError(
            f"Request index {chunk.req_idx} has {length} of at most {max_length} tokens; positions "
            f"{chunk.start} to {chunk.end - 1} do not continue it."
        )

"""What the attend seam needs of a KV store, whether its rows are all on the device or lie in several tiers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from alisa.types import Codec, Medium, RowFormat, Selection, StepPlan, Traffic


class AppendKernel(Protocol):
    """Writes new rows where they will stay, as the codec of the format would."""

    def __call__(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's arena UInt8[R, row_bytes]."""
        ...


class Span(NamedTuple):
    """Columns begins[b] to ends[b] - 1 of a selection, for each sequence b."""

    begins: Tensor
    """Int32[B]."""
    ends: Tensor
    """Int32[B]."""


class Part(NamedTuple):
    """Rows that one call of a decode kernel attends to; a selection is one part unless it is larger than the arena."""

    rows: Tensor
    """UInt8[N, row_bytes]: an arena and, behind it, buffers that are valid until the next part is asked for."""
    slots: Tensor
    """Int32[B, J, K] into `rows`, where the part is."""
    span: Span | None
    """The columns that this part brings, see `AttentionPieces.add`; None: all of them."""


class RowStore(Protocol):
    """Rows by (lane, position); see `KVStore` and `TieredStore`."""

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
    def has_free_lane(self) -> bool:
        """Whether another sequence can be opened."""
        ...

    def open(self, num_tokens: int) -> int:
        """A lane for a sequence of up to `num_tokens` tokens; no rows are taken yet.

        Raises:
            CapacityError: no lane is free, or sequences of this length were not provided for; nothing has changed.
        """
        ...

    def release(self, lane: int) -> None:
        """Every row of the sequence is gone from every tier; its lane may be reused at once."""
        ...

    def length(self, lane: int) -> int:
        """Tokens stored for an open sequence, deleted ones included."""
        ...

    def bounds(self, lane: int) -> tuple[int, ...]:
        """Where each lower tier ends, see `alisa.schedule.base`; `(0,)` with no tiers."""
        ...

    def rebuildable(self, lane: int) -> int:
        """Positions below this have a remnant."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """The plan's moves are under way and its segments have room; rows then come through `append`, layer by layer.

        Raises:
            CapacityError: a segment does not continue its sequence (nothing has changed), or there is no room.
        """
        ...

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """Write K and V `[N, G, D]` of one layer, tokens in the order of the step's segments.

        hidden `[N, C]` is what they were projected from; a store that may delete rows keeps it.
        """
        ...

    def parts(self, layer: int, selection: Selection) -> Iterator[Part]:
        """The selected rows, ready to be read; usually one part."""
        ...

    def prefetch(self, layer: int, lanes: tuple[int, ...], selection: Selection) -> None:
        """A hint: the next step will ask for this selection of these lanes. Rows that are missing start to come."""
        ...

    def read(self, layer: int, lane: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V `[end - start, G, D]` of these positions, wherever they lie."""
        ...

    @property
    def used_rows(self) -> int:
        """Tokens whose rows exist somewhere."""
        ...

    @property
    def deleted_tokens(self) -> int:
        """Tokens of open sequences whose rows are deleted."""
        ...

    def nbytes(self, medium: Medium) -> int:
        """Bytes in use in one medium."""
        ...

    def traffic(self) -> Traffic:
        """What was moved since the last call."""
        ...

    def failed(self) -> dict[int, str]:
        """Lanes whose rows could not be read or written since the last call, and why; their results are worthless."""
        ...

    def check(self) -> None:
        """Assert that the bookkeeping is sound; callable whenever no step is running."""
        ...

    def close(self) -> None:
        """Files and threads are gone; the store is not used any more."""
        ...

"""The KV store while everything fits the device: which sequence has which rows, and where they lie.

Rows are bytes, one token of one layer each, in a pool `[L, R, row_bytes]`; a row is written once and never changes,
so a copy anywhere is never stale. A sequence has a request index (a small integer that also indexes the policy's
state); its tokens map to slots of the pool through a table, the same in every layer. Sequences that begin with the same
rows share them: several rows of the table name the same slots, and each slot belongs to one sequence. The store knows
nothing of heads, policies or batches of requests. `TieredStore` is its counterpart for rows that do not fit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.base import DeviceRows, KVChunk, check_continues, check_opening
from alisa.cache.free_slots import FreeSlots
from alisa.cache.pool import allocate_pool
from alisa.cache.row_ids import grown_size
from alisa.config import format_bytes
from alisa.errors import CapacityError
from alisa.kernels.base import AppendKernel, Codec, Selection
from alisa.kernels.sketch_step import StepSlots
from alisa.outputs import Medium, Traffic
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.scheduler.shared_rows import SharedRows

CHUNK_TOKENS = 16
"""Slots that a sequence takes at once while there are plenty: its rows lie together, and the slot table on the device
is written once in 16 steps."""

_COPIED_TOKENS = 1024
"""Rows are copied in pieces of so many tokens: what is in between takes no more memory."""


@dataclass(slots=True)
class _Sequence:
    """Bookkeeping of one open sequence."""

    slots: array[int]
    """Its own, for the tokens after those that it shares; some may be a reserve."""
    length: int = 0
    """Tokens that have rows, shared ones included."""


class KVStore:
    """A capped pool of rows on one device, addressed by (req_idx, position).

    What a cap of the device's memory covers: the pool, and the tables that say where rows lie (`table_bytes`), which
    grow with the longest sequence; `alisa.cache.capacity` knows how far. A pool on a CPU takes no memory until rows are
    written.

    Args:
        num_layers: L.
        codec: writes and reads rows; fixes `row_bytes`.
        num_rows: R, tokens that the pool holds over all layers.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence that can be opened, in tokens.
        device: where the pool lies.
        append: writes rows in place; None: through the codec.
        spare_rows: rows of one layer after the pool in the same memory, for whoever takes it over.

    Raises:
        CapacityError: the machine has less memory than the pool.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        codec: Codec,
        num_rows: int,
        max_num_seqs: int,
        max_length: int,
        device: torch.device,
        append: AppendKernel | None = None,
        spare_rows: int = 0,
    ) -> None:
        self.codec = codec
        self.num_rows = num_rows
        self.max_num_seqs = max_num_seqs
        self.max_length = max_length
        self.device = device
        self.token_bytes = num_layers * codec.format.row_bytes
        self.num_layers = num_layers
        self.spare_rows = spare_rows
        row_bytes, pool_rows = codec.format.row_bytes, num_layers * num_rows
        self.memory = allocate_pool(1, pool_rows + spare_rows, row_bytes, device)[0]
        """UInt8[L * R + spare rows, row_bytes]: the pool, then the spare rows."""
        self._pool = self.memory[:pool_rows].view(num_layers, num_rows, row_bytes)
        self._layers = self._pool.unbind()
        self._table = torch.zeros(max_num_seqs, 0, dtype=torch.int32, device=device)
        self.append_kernel = append
        self._free_slots = FreeSlots(num_rows)
        self._open: dict[int, _Sequence] = {}
        self._shared = SharedRows()
        self._own_tokens: Tensor | None = None
        """Int64[n]: tokens of the step whose rows are written; None: all."""
        self._new_slots = torch.empty(0, dtype=torch.int64)
        self._step_table = torch.empty(0)
        self._chunk_of_token: Tensor | None = None
        self._last: tuple[Selection, Tensor] | None = None

    def open(self, req_idx: int, num_tokens: int) -> None:
        """See `RowStore.open`."""
        check_opening(self, req_idx, num_tokens, in_use=req_idx in self._open)
        self._open[req_idx] = _Sequence(array("i"))

    def release(self, req_idx: int) -> None:
        """See `RowStore.release`."""
        self._hand_over(req_idx, 0)
        self._free_slots.give_back(reversed(self._open.pop(req_idx).slots))

    def begin(self, plan: StepPlan) -> None:
        """See `RowStore.begin`; a refused plan changes nothing."""
        assert not plan.moves, "there is nowhere to move rows to"
        for chunk in plan.chunks:
            check_continues(chunk, self._open[chunk.req_idx].length, self.max_length)
        needed = self._missing(plan.chunks)
        if needed > len(self._free_slots):
            self._trim()
            needed = self._missing(plan.chunks)
        if needed > len(self._free_slots):
            raise CapacityError(
                f"{plan.num_tokens} new tokens need {format_bytes(needed * self.token_bytes)} of KV rows; "
                f"{len(self._free_slots)} of {self.num_rows} rows are free."
            )
        roomy = len(self._free_slots) - needed >= CHUNK_TOKENS * len(plan.chunks)
        slots = array("i")
        for chunk in plan.chunks:
            sequence = self._open[chunk.req_idx]
            if chunk.source is None:
                self._grow(chunk.req_idx, sequence, chunk.end, spare=CHUNK_TOKENS - 1 if roomy else 0)
                shared = self._shared.num_shared(chunk.req_idx)
                slots += sequence.slots[chunk.start - shared : chunk.end - shared]
            else:
                self._share(chunk, chunk.source)
            sequence.length = chunk.end
        self._own_tokens = self._tokens_of_their_own(plan.chunks)
        self._new_slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        req_index = torch.tensor([chunk.req_idx for chunk in plan.chunks], dtype=torch.int64, device=self.device)
        self._step_table = self.slot_table(req_index, max((chunk.end for chunk in plan.chunks), default=0))
        self._chunk_of_token = None
        if not plan.prefill and plan.num_tokens > len(plan.chunks):
            counts = torch.tensor([chunk.count for chunk in plan.chunks], device=self.device)
            self._chunk_of_token = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        self._last = None

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """See `RowStore.append`."""
        if self._own_tokens is not None:
            k, v = k[self._own_tokens], v[self._own_tokens]
            if not len(k):
                return
        if self.append_kernel is not None:
            self.append_kernel(self._pool[layer], self.codec.format, self._new_slots, k, v)
        else:
            self._pool[layer].index_copy_(0, self._new_slots, self.codec.encode(k, v))

    def copy(self, layer: int, chunk: ScheduledChunk) -> None:
        """See `RowStore.copy`: they are the same rows."""

    def truncate(self, req_idx: int, length: int) -> None:
        """See `RowStore.truncate`; slots that nobody else reads stay with the sequence."""
        assert length <= self._open[req_idx].length, "a sequence does not grow by being cut"
        self._hand_over(req_idx, length)
        self._open[req_idx].length = length

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """See `RowStore.chunks`: always one."""
        # Dense attention and fixed patterns choose once for all layers.
        if self._last is None or self._last[0] is not selection:
            table = self._step_table
            if selection.entries is None and self._chunk_of_token is not None:
                table = table.index_select(0, self._chunk_of_token)
            positions = selection.positions
            slots = table.gather(1, positions.view(len(positions), -1).to(torch.int64))
            self._last = (selection, slots.view_as(positions))
        return iter((KVChunk(self._pool[layer], self._last[1], None),))

    def device_rows(self) -> DeviceRows:
        """See `RowStore.device_rows`."""
        return DeviceRows(self._layers, StepSlots(self._new_slots, self._step_table, self._chunk_of_token))

    def num_shared(self, req_idx: int) -> int:
        """First tokens of an open sequence whose rows belong to another one."""
        return self._shared.num_shared(req_idx)

    def unshare(self) -> None:
        """Every row that sequences share has been copied for each of them; there is room, or an AssertionError."""
        self._trim()
        for req_idx, sequence in self._open.items():
            if not (count := self._shared.num_shared(req_idx)):
                continue
            taken = self._free_slots.take(count)
            row, slots = self._table[req_idx, :count], torch.from_numpy(taken).to(self.device, torch.int64)
            for source, target in zip(row.split(_COPIED_TOKENS), slots.split(_COPIED_TOKENS), strict=True):
                for rows in self._layers:
                    rows.index_copy_(0, target, rows.index_select(0, source))
            row.copy_(slots)
            sequence.slots = array("i", taken.tobytes()) + sequence.slots
        self._shared = SharedRows()

    def sequences(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """(req_idx, slots Int32[length] of its rows) of every open sequence, none of which shares rows."""
        for req_idx, sequence in self._open.items():
            yield req_idx, np.array(sequence.slots[: sequence.length], np.int32)

    def clear(self) -> None:
        """No sequence is open."""
        self._open.clear()
        self._shared = SharedRows()
        self._free_slots = FreeSlots(self.num_rows)

    def prefetch(self, layer: int, req_indices: tuple[int, ...], selection: Selection) -> None:
        """Everything is there."""

    def rows(self, layer: int) -> Tensor:
        """The pool of one layer, `UInt8[R, row_bytes]`; kernels read it in place by slot."""
        return self._pool[layer]

    def slot_table(self, req_index: Tensor, length: int) -> Tensor:
        """Slots of the first `length` positions of these sequences, Int32[B, length]: a small copy, once a step."""
        return self._table[:, :length].index_select(0, req_index)

    def read(self, layer: int, req_idx: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        return self.codec.decode(self._pool[layer].index_select(0, self._table[req_idx, start:end]))

    def length(self, req_idx: int) -> int:
        """See `RowStore.length`."""
        return self._open[req_idx].length

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """Nothing lies below."""
        return (0,)

    def rebuildable(self, req_idx: int) -> int:
        """Nothing is ever deleted."""
        return 0

    @property
    def used_rows(self) -> int:
        """See `RowStore.used_rows`."""
        return sum(sequence.length - self._shared.num_shared(i) for i, sequence in self._open.items())

    @property
    def deleted_tokens(self) -> int:
        """Nothing is ever deleted."""
        return 0

    @property
    def table_bytes(self) -> int:
        """See `RowStore.table_bytes`."""
        return self._table.nbytes + self._step_table.nbytes + self._free_slots.nbytes + 4 * self._free_slots.num_taken

    def nbytes(self, medium: Medium) -> int:
        """See `RowStore.nbytes`."""
        return self.used_rows * self.token_bytes if medium is Medium.DEVICE else 0

    def traffic(self) -> Traffic:
        """Nothing moves."""
        return Traffic()

    def failed(self) -> dict[int, str]:
        """Memory does not fail."""
        return {}

    def check(self) -> None:
        """See `RowStore.check`: every slot is free or owned once, and the tables agree."""
        self._free_slots.check(slot for sequence in self._open.values() for slot in sequence.slots)
        for req_idx, sequence in self._open.items():
            shared, end = self._shared.num_shared(req_idx), self._end(req_idx)
            assert shared <= sequence.length <= end, f"req_idx {req_idx} has rows without slots"
            assert self._table[req_idx, shared:end].tolist() == sequence.slots.tolist(), (
                f"req_idx {req_idx}: table and slots differ"
            )
            for other in self._open:
                if other != req_idx:
                    count = self._shared.common(req_idx, other)
                    assert torch.equal(self._table[req_idx, :count], self._table[other, :count]), (
                        f"req_idx {req_idx} and {other} do not have the same first {count} rows"
                    )

    def close(self) -> None:
        """Nothing is open."""

    def _missing(self, chunks: Sequence[ScheduledChunk]) -> int:
        """Slots that these tokens need beyond those that their sequences have."""
        return sum(max(chunk.end - self._end(chunk.req_idx), 0) for chunk in chunks if chunk.source is None)

    def _end(self, req_idx: int) -> int:
        """Positions of the sequence that have a slot."""
        return self._shared.num_shared(req_idx) + len(self._open[req_idx].slots)

    def _trim(self) -> None:
        """Take back the slots that sequences hold in reserve."""
        for req_idx, sequence in self._open.items():
            own = sequence.length - self._shared.num_shared(req_idx)
            self._free_slots.give_back(reversed(sequence.slots[own:]))
            del sequence.slots[own:]

    def _grow(self, req_idx: int, sequence: _Sequence, length: int, spare: int) -> None:
        """Give a sequence slots for `length` tokens and up to `spare` more."""
        have = self._end(req_idx)
        if length <= have:
            return
        end = min(length + spare, self.max_length)
        self._widen(end)
        taken = self._free_slots.take(end - have)
        sequence.slots.frombytes(taken.tobytes())
        self._table[req_idx, have:end] = torch.from_numpy(taken).to(self.device)

    def _share(self, chunk: ScheduledChunk, source: int) -> None:
        """The tokens of a chunk have the slots of its source."""
        assert self._end(chunk.req_idx) == chunk.start == self._shared.num_shared(chunk.req_idx), (
            "it has rows of its own"
        )
        assert chunk.end <= self._open[source].length, f"req_idx {source} has no rows at {chunk.end - 1}"
        self._shared.share(chunk.req_idx, source, chunk.end)
        self._widen(chunk.end)
        self._table[chunk.req_idx, chunk.start : chunk.end] = self._table[source, chunk.start : chunk.end]

    def _hand_over(self, req_idx: int, length: int) -> None:
        """Slots from position `length` on that others read belong to one of them."""
        sequence, shared = self._open[req_idx], self._shared.num_shared(req_idx)
        handover = self._shared.cut(req_idx, length)
        if handover is None and length >= shared:
            return
        start = end = 0
        if handover is not None:
            start, end = handover.start - shared, handover.end - shared
            heir = self._open[handover.heir]
            heir.slots = sequence.slots[start:end] + heir.slots
        self._free_slots.give_back(reversed(sequence.slots[end:]))
        del sequence.slots[start:]

    def _tokens_of_their_own(self, chunks: Sequence[ScheduledChunk]) -> Tensor | None:
        """See `_own_tokens`."""
        if all(chunk.source is None for chunk in chunks):
            return None
        is_own = torch.tensor([chunk.source is None for chunk in chunks])
        counts = torch.tensor([chunk.count for chunk in chunks])
        return is_own.repeat_interleave(counts).nonzero().flatten().to(self.device)

    def _widen(self, length: int) -> None:
        """The table has columns for positions below `length`."""
        width = self._table.shape[1]
        if length > width:
            wider = self._table.new_zeros(self.max_num_seqs, min(grown_size(width, length), self.max_length))
            wider[:, :width] = self._table
            self._table = wider

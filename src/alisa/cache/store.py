"""The KV store while everything fits the device: which sequence has which rows, and where they lie.

Rows are bytes, one token of one layer each, in a pool `[L, R, row_bytes]`; a row is written once and never changes,
so a copy anywhere is never stale. A sequence has a request index (a small integer that also indexes the policy's
state); its tokens map to slots of the pool through a table, the same in every layer. The store knows nothing of heads,
policies or batches of requests. `TieredStore` is its counterpart for rows that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.cache.base import KVChunk
from alisa.config import format_bytes
from alisa.errors import CapacityError
from alisa.kernels.base import AppendKernel, Codec, Selection
from alisa.outputs import Medium, Traffic
from alisa.scheduler.plan import StepPlan

CHUNK_TOKENS = 16
"""Slots that a sequence takes at once while there are plenty: its rows lie together, and the slot table on the device
is written once in 16 steps."""


@dataclass(slots=True)
class _Seq:
    """Bookkeeping of one open sequence: its slots, and how many of them hold rows."""

    slots: list[int]
    length: int = 0


class KVStore:
    """A capped pool of rows on one device, addressed by (req_idx, position).

    Args:
        num_layers: L.
        codec: writes and reads rows; fixes `row_bytes`.
        num_rows: R, tokens that the pool holds over all layers.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence that can be opened, in tokens.
        device: where the pool lies.
        append: writes rows in place; None: through the codec.
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
    ) -> None:
        self.codec = codec
        self.num_rows = num_rows
        self.max_num_seqs = max_num_seqs
        self.device = device
        self.token_bytes = num_layers * codec.format.row_bytes
        # empty, not zeros: on a CPU the operating system hands out pages as rows are written, so a generous cap
        # costs nothing until it is used.
        self._rows_pool = torch.empty(num_layers, num_rows, codec.format.row_bytes, dtype=torch.uint8, device=device)
        self._table = torch.zeros(max_num_seqs, max_length, dtype=torch.int32, device=device)
        self._append = append
        self.max_length = max_length
        self._free_slots = list(range(num_rows - 1, -1, -1))
        self._open: dict[int, _Seq] = {}
        self._new_slots = torch.empty(0, dtype=torch.int64)
        self._step_table = torch.empty(0)
        self._last: tuple[Selection, Tensor] | None = None

    def open(self, req_idx: int, num_tokens: int) -> None:
        """See `RowStore.open`."""
        if num_tokens > self.max_length:
            raise CapacityError(
                f"A sequence of {num_tokens} tokens is longer than the {self.max_length} that the KV store was made "
                "for; raise --max-model-len."
            )
        assert 0 <= req_idx < self.max_num_seqs, f"request index {req_idx} of {self.max_num_seqs}"
        assert req_idx not in self._open, f"request index {req_idx} is in use"
        self._open[req_idx] = _Seq([])

    def release(self, req_idx: int) -> None:
        """See `RowStore.release`."""
        self._free_slots.extend(reversed(self._open.pop(req_idx).slots))

    def begin(self, plan: StepPlan) -> None:
        """See `RowStore.begin`; a refused plan changes nothing."""
        needed = 0
        for segment in plan.segments:
            req_idx = self._open[segment.req_idx]
            if segment.start != req_idx.length or segment.end > self.max_length:
                raise CapacityError(
                    f"Request index {segment.req_idx} has {req_idx.length} of at most {self.max_length} tokens; "
                    f"positions {segment.start} to {segment.end - 1} do not continue it."
                )
            needed += max(segment.end - len(req_idx.slots), 0)
        if needed > len(self._free_slots):
            self._trim()
            needed = sum(max(segment.end - len(self._open[segment.req_idx].slots), 0) for segment in plan.segments)
        if needed > len(self._free_slots):
            raise CapacityError(
                f"{plan.num_tokens} new tokens need {format_bytes(needed * self.token_bytes)} of KV rows; "
                f"{len(self._free_slots)} of {self.num_rows} rows are free."
            )
        assert not plan.moves, "there is nowhere to move rows to"
        roomy = len(self._free_slots) - needed >= CHUNK_TOKENS * len(plan.segments)
        slots: list[int] = []
        for segment in plan.segments:
            req_idx = self._open[segment.req_idx]
            self._grow(segment.req_idx, req_idx, segment.end, spare=CHUNK_TOKENS - 1 if roomy else 0)
            slots += req_idx.slots[segment.start : segment.end]
            req_idx.length = segment.end
        self._new_slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        req_index = torch.tensor([segment.req_idx for segment in plan.segments], dtype=torch.int64, device=self.device)
        self._step_table = self.slot_table(req_index, max((segment.end for segment in plan.segments), default=0))
        self._last = None

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """See `RowStore.append`."""
        if self._append is not None:
            self._append(self._rows_pool[layer], self.codec.format, self._new_slots, k, v)
        else:
            self._rows_pool[layer].index_copy_(0, self._new_slots, self.codec.encode(k, v))

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """See `RowStore.chunks`: always one."""
        # Dense attention and fixed patterns choose once for all layers.
        if self._last is None or self._last[0] is not selection:
            num_seqs, num_sets, num_slots = selection.positions.shape
            slots = self._step_table.gather(1, selection.positions.view(num_seqs, -1).to(torch.int64))
            self._last = (selection, slots.view(num_seqs, num_sets, num_slots))
        yield KVChunk(self._rows_pool[layer], self._last[1], selection.counts, None, None)

    def prefetch(self, layer: int, req_indices: tuple[int, ...], selection: Selection) -> None:
        """Everything is there."""

    def rows(self, layer: int) -> Tensor:
        """The pool of one layer, `UInt8[R, row_bytes]`; kernels read it in place by slot."""
        return self._rows_pool[layer]

    def slot_table(self, req_index: Tensor, length: int) -> Tensor:
        """Slots of the first `length` positions of these sequences, Int32[B, length]: a small copy, once a step."""
        return self._table[:, :length].index_select(0, req_index)

    def read(self, layer: int, req_idx: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        return self.codec.decode(self._rows_pool[layer].index_select(0, self._table[req_idx, start:end]))

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
        """Tokens that hold rows now."""
        return sum(req_idx.length for req_idx in self._open.values())

    @property
    def deleted_tokens(self) -> int:
        """Nothing is ever deleted."""
        return 0

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
        """Assert that every slot and req_idx is free or owned exactly once; callable whenever no step is running."""
        owned = [slot for req_idx in self._open.values() for slot in req_idx.slots]
        assert sorted(owned + self._free_slots) == list(range(self.num_rows)), "a slot is lost or owned twice"
        for index, req_idx in self._open.items():
            assert req_idx.length <= len(req_idx.slots), f"req_idx {index} has rows without slots"
            assert self._table[index, : len(req_idx.slots)].tolist() == req_idx.slots, (
                f"req_idx {index}: table and slots differ"
            )

    def close(self) -> None:
        """Nothing is open."""

    def _trim(self) -> None:
        """Take back the slots that sequences hold in reserve."""
        for req_idx in self._open.values():
            self._free_slots.extend(reversed(req_idx.slots[req_idx.length :]))
            del req_idx.slots[req_idx.length :]

    def _grow(self, index: int, req_idx: _Seq, length: int, spare: int) -> None:
        """Give a request index slots for `length` tokens and up to `spare` more."""
        have = len(req_idx.slots)
        if length <= have:
            return
        wanted = min(length + spare, self.max_length) - have
        split = len(self._free_slots) - wanted
        taken = self._free_slots[split:][::-1]
        del self._free_slots[split:]
        req_idx.slots += taken
        self._table[index, have : have + wanted] = torch.tensor(taken, dtype=torch.int32, device=self.device)

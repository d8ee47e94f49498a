"""The KV store while everything fits the device: which sequence has which rows, and where they lie.

Rows are bytes, one token of one layer each, in an arena `[L, R, row_bytes]`; a row is written once and never changes,
so a copy anywhere is never stale. A sequence has a lane (a small integer that also indexes the policy's state); its
tokens map to slots of the arena through a table, the same in every layer. The store knows nothing of heads, policies or
batches of requests. `TieredStore` is its counterpart for rows that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.config import format_bytes
from alisa.errors import CapacityError
from alisa.kv.base import AppendKernel, Part
from alisa.types import Codec, Medium, Selection, StepPlan, Traffic

CHUNK_TOKENS = 16
"""Slots that a sequence takes at once while there are plenty: its rows lie together, and the slot table on the device
is written once in 16 steps."""


@dataclass(slots=True)
class _Lane:
    """Bookkeeping of one open sequence: its slots, and how many of them hold rows."""

    slots: list[int]
    length: int = 0


class KVStore:
    """A capped arena of rows on one device, addressed by (lane, position).

    Args:
        num_layers: L.
        codec: writes and reads rows; fixes `row_bytes`.
        num_rows: R, tokens that the arena holds over all layers.
        num_lanes: sequences that can be open at the same time.
        max_length: longest sequence that can be opened, in tokens.
        device: where the arena lies.
        append: writes rows in place; None: through the codec.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        codec: Codec,
        num_rows: int,
        num_lanes: int,
        max_length: int,
        device: torch.device,
        append: AppendKernel | None = None,
    ) -> None:
        self.codec = codec
        self.num_rows = num_rows
        self.num_lanes = num_lanes
        self.device = device
        self.token_bytes = num_layers * codec.format.row_bytes
        # empty, not zeros: on a CPU the operating system hands out pages as rows are written, so a generous cap
        # costs nothing until it is used.
        self._arena = torch.empty(num_layers, num_rows, codec.format.row_bytes, dtype=torch.uint8, device=device)
        self._table = torch.zeros(num_lanes, max_length, dtype=torch.int32, device=device)
        self._append = append
        self.max_length = max_length
        self._free_slots = list(range(num_rows - 1, -1, -1))
        self._free_lanes = list(range(num_lanes - 1, -1, -1))
        self._open: dict[int, _Lane] = {}
        self._new_slots = torch.empty(0, dtype=torch.int64)
        self._step_table = torch.empty(0)
        self._last: tuple[Selection, Tensor] | None = None

    @property
    def has_free_lane(self) -> bool:
        """Whether another sequence can be opened."""
        return bool(self._free_lanes)

    def open(self, num_tokens: int) -> int:
        """See `RowStore.open`."""
        if num_tokens > self.max_length or not self._free_lanes:
            raise CapacityError(
                f"A sequence of {num_tokens} tokens is to be opened; a sequence may have {self.max_length}, and "
                f"{len(self._free_lanes)} of {self.num_lanes} lanes are free."
            )
        lane = self._free_lanes.pop()
        self._open[lane] = _Lane([])
        return lane

    def release(self, lane: int) -> None:
        """See `RowStore.release`."""
        self._free_slots.extend(reversed(self._open.pop(lane).slots))
        self._free_lanes.append(lane)

    def begin(self, plan: StepPlan) -> None:
        """See `RowStore.begin`; a refused plan changes nothing."""
        needed = 0
        for segment in plan.segments:
            lane = self._open[segment.lane]
            if segment.start != lane.length or segment.end > self.max_length:
                raise CapacityError(
                    f"Lane {segment.lane} has {lane.length} of at most {self.max_length} tokens; positions "
                    f"{segment.start} to {segment.end - 1} do not continue it."
                )
            needed += max(segment.end - len(lane.slots), 0)
        if needed > len(self._free_slots):
            self._trim()
            needed = sum(max(segment.end - len(self._open[segment.lane].slots), 0) for segment in plan.segments)
        if needed > len(self._free_slots):
            raise CapacityError(
                f"{plan.num_tokens} new tokens need {format_bytes(needed * self.token_bytes)} of KV rows; "
                f"{len(self._free_slots)} of {self.num_rows} rows are free."
            )
        assert not plan.moves, "there is nowhere to move rows to"
        roomy = len(self._free_slots) - needed >= CHUNK_TOKENS * len(plan.segments)
        slots: list[int] = []
        for segment in plan.segments:
            lane = self._open[segment.lane]
            self._grow(segment.lane, lane, segment.end, spare=CHUNK_TOKENS - 1 if roomy else 0)
            slots += lane.slots[segment.start : segment.end]
            lane.length = segment.end
        self._new_slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        lane_ids = torch.tensor([segment.lane for segment in plan.segments], dtype=torch.int64, device=self.device)
        self._step_table = self.slot_table(lane_ids, max((segment.end for segment in plan.segments), default=0))
        self._last = None

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """See `RowStore.append`."""
        if self._append is not None:
            self._append(self._arena[layer], self.codec.format, self._new_slots, k, v)
        else:
            self._arena[layer].index_copy_(0, self._new_slots, self.codec.encode(k, v))

    def parts(self, layer: int, selection: Selection) -> Iterator[Part]:
        """See `RowStore.parts`: always one."""
        # Dense attention and fixed patterns choose once for all layers.
        if self._last is None or self._last[0] is not selection:
            num_seqs, num_sets, num_slots = selection.positions.shape
            slots = self._step_table.gather(1, selection.positions.view(num_seqs, -1).to(torch.int64))
            self._last = (selection, slots.view(num_seqs, num_sets, num_slots))
        yield Part(self._arena[layer], self._last[1], None)

    def prefetch(self, layer: int, lanes: tuple[int, ...], selection: Selection) -> None:
        """Everything is there."""

    def rows(self, layer: int) -> Tensor:
        """The arena of one layer, `UInt8[R, row_bytes]`; kernels read it in place by slot."""
        return self._arena[layer]

    def slot_table(self, lane_ids: Tensor, length: int) -> Tensor:
        """Slots of the first `length` positions of the given lanes, Int32[B, length]: a small copy, once a step."""
        return self._table[:, :length].index_select(0, lane_ids)

    def read(self, layer: int, lane: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        return self.codec.decode(self._arena[layer].index_select(0, self._table[lane, start:end]))

    def length(self, lane: int) -> int:
        """See `RowStore.length`."""
        return self._open[lane].length

    def bounds(self, lane: int) -> tuple[int, ...]:
        """Nothing lies below."""
        return (0,)

    def rebuildable(self, lane: int) -> int:
        """Nothing is ever deleted."""
        return 0

    @property
    def used_rows(self) -> int:
        """Tokens that hold rows now."""
        return sum(lane.length for lane in self._open.values())

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
        """Assert that every slot and lane is free or owned exactly once; callable whenever no step is running."""
        owned = [slot for lane in self._open.values() for slot in lane.slots]
        assert sorted(owned + self._free_slots) == list(range(self.num_rows)), "a slot is lost or owned twice"
        assert sorted([*self._open, *self._free_lanes]) == list(range(self.num_lanes)), "a lane is lost or owned twice"
        for index, lane in self._open.items():
            assert lane.length <= len(lane.slots), f"lane {index} has rows without slots"
            assert self._table[index, : len(lane.slots)].tolist() == lane.slots, f"lane {index}: table and slots differ"

    def close(self) -> None:
        """Nothing is open."""

    def _trim(self) -> None:
        """Take back the slots that sequences hold in reserve."""
        for lane in self._open.values():
            self._free_slots.extend(reversed(lane.slots[lane.length :]))
            del lane.slots[lane.length :]

    def _grow(self, index: int, lane: _Lane, length: int, spare: int) -> None:
        """Give a lane slots for `length` tokens and up to `spare` more."""
        have = len(lane.slots)
        if length <= have:
            return
        wanted = min(length + spare, self.max_length) - have
        split = len(self._free_slots) - wanted
        taken = self._free_slots[split:][::-1]
        del self._free_slots[split:]
        lane.slots += taken
        self._table[index, have : have + wanted] = torch.tensor(taken, dtype=torch.int32, device=self.device)
